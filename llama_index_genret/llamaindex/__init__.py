"""The LlamaIndex side: retriever, index, query engine and LLMs.

The only package beside `cli` that imports `llama_index`.
"""
