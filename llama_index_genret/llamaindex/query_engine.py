"""Recall, then look: LlamaIndex's own query engine, set up so that the recalled image reaches the model."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.llms import LLM
from llama_index.core.prompts import PromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine

from llama_index_genret.llamaindex.nodes import MissingPictureBlock


class LookAndAnswer(RichPromptTemplate):
    """One message: what was recalled, then the question, in the form in which `genret train` teaches to answer.

    The blocks go on as they are: a template that renders them writes each picture into a text and parses it again, and
    into every event.

    Args:
        show_text: whether the model reads captions and metadata too; else it is shown the pictures only, and told
            where one is missing.
    """

    show_text: bool = False

    def __init__(self, *, show_text: bool = False, **kwargs: Any) -> None:
        text = "{% chat role='user' %}{{ context_messages }}{{ query_str }}{% endchat %}"
        super().__init__(text, **kwargs)
        self.show_text = show_text

    def format_messages(self, llm: BaseLLM | None = None, **kwargs: Any) -> list[ChatMessage]:
        """See `BasePromptTemplate.format_messages`; nothing in a text is read as a template."""
        values = self._map_all_vars({**self.kwargs, **kwargs})
        shown = (ImageBlock, MissingPictureBlock, *([TextBlock] if self.show_text else []))
        blocks = [
            block for message in values["context_messages"] for block in message.blocks if isinstance(block, shown)
        ]
        return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text=values["query_str"])])]


QUESTION_AFTER_CONTEXT = PromptTemplate(
    "{context_str}{query_str}",
    function_mappings={"context_str": lambda **given: f"{given['context_str']}\n\n" if given["context_str"] else ""},
)
"""For LlamaIndex's multimodal chat engines, which put the pictures before it: texts if there are any, the question."""


def image_query_engine(
    retriever: BaseRetriever, llm: LLM, *, show_text: bool | None = None, **kwargs: Any
) -> RetrieverQueryEngine:
    """A stock `RetrieverQueryEngine(multimodal=True)`: sync, async and streaming.

    Args:
        retriever: a `GenerativeImageRetriever`, or one that fuses it with others.
        llm: `genret_llm(...)` for a server, `InProcessLLM(...)` for a model in this process, or any chat LLM.
        show_text: whether the model reads captions and metadata beside the pictures; by default where the retriever
            has `llm_metadata_keys`. Without, it has the pictures only, as in its training: a small model answers best
            so, and nothing but the picture can give the answer away. A large chat LLM gains by the captions.
        kwargs: further arguments of `RetrieverQueryEngine.from_args`; they win.
    """
    shown = bool(getattr(retriever, "llm_metadata_keys", ())) if show_text is None else show_text
    options: dict[str, Any] = {"multimodal": True, "chat_content_qa_template": LookAndAnswer(show_text=shown), **kwargs}
    return RetrieverQueryEngine.from_args(retriever, llm=llm, **options)
