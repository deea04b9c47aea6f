"""Whatever can score the next token of an identifier: a model in this process, vLLM in this process, or a vLLM server.

`base` has the protocol and the two drivers; `fake` serves tests; `transformers`, `vllm` and `vllm_offline` load on
first use.
"""
