"""Teaching a multimodal LLM the identifiers of an index: LoRA on four interleaved tasks.

`examples` is light; `recipe` and `export` need torch, transformers and peft and load on first use.
"""
