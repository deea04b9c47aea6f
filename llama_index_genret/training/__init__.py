"""Train a multimodal LLM on the identifiers of an index, with LoRA on interleaved tasks.

`tasks` and `options` are light. `recipe` needs torch, transformers and peft, and loads on first use.
"""
