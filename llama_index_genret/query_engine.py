"""Recall, then look: LlamaIndex's own query engine, set up so that the recalled image reaches the model."""

from __future__ import annotations

from typing import Any

from llama_index.core.llms import LLM
from llama_index.core.prompts import RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine

from llama_index_genret.retriever import GenerativeImageRetriever

LOOK_AND_ANSWER = RichPromptTemplate(
    """{% chat role="user" %}{% for message in context_messages %}{% for block in message.blocks %}"""
    """{% if block.block_type == 'text' %}{{ block.text }}
{% elif block.block_type == 'image' %}{{ block.inline_url() | image }}{% endif %}"""
    """{% endfor %}{% endfor %}{{ query_str }}{% endchat %}"""
)
"""Images first, then the question: the form in which `genret train` teaches the model to answer."""


def image_query_engine(retriever: GenerativeImageRetriever, llm: LLM, **kwargs: Any) -> RetrieverQueryEngine:
    """A stock `RetrieverQueryEngine(multimodal=True)`: sync, async and streaming.

    Args:
        llm: `genret_llm(...)` for a server, `InProcessLLM(...)` for a model in this process, or any chat LLM.
        kwargs: further arguments of `RetrieverQueryEngine.from_args`; they win.
    """
    options: dict[str, Any] = {"multimodal": True, "chat_content_qa_template": LOOK_AND_ANSWER, **kwargs}
    return RetrieverQueryEngine.from_args(retriever, llm=llm, **options)
