"""Score the next token of an identifier with a model in this process, vLLM in this process, or a vLLM server.

`base` has the protocol and the two drivers, and `fake` serves tests. `transformers`, `vllm_offline` and `vllm_request`
load on first use.
"""
