"""Base model, prompts, tokenizer and text encoder. Independent of indexes.

`mllm` and `features` need torch and transformers; `encoder` needs sentence-transformers. They load on first use.
"""
