"""Set up LlamaIndex's query engine so that the recalled images reach the model."""

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
    """A prompt of one message: the recalled images, then the question, as in the training by `genret train`.

    The blocks are passed on unchanged. A template that renders them would write each image into a text, parse it again,
    and put it into every event.

    Args:
        show_text: whether the model also reads captions and metadata. Default False: it reads only the images, and a
            text in place of a missing one.
    """

    show_text: bool = False

    def __init__(self, *, show_text: bool = False, **kwargs: Any) -> None:
        text = "{% chat role='user' %}{{ context_messages }}{{ query_str }}{% endchat %}"
        super().__init__(text, **kwargs)
        self.show_text = show_text

    def format_messages(self, llm: BaseLLM | None = None, **kwargs: Any) -> list[ChatMessage]:
        """Return the message. Texts are not parsed as templates. See `BasePromptTemplate.format_messages`."""
        values = self._map_all_vars({**self.kwargs, **kwargs})
        shown = (ImageBlock, MissingPictureBlock, *([TextBlock] if self.show_text else []))
        blocks = [
            block for message in values["context_messages"] for block in message.blocks if isinstance(block, shown)
        ]
        return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text=values["query_str"])])]


QUESTION_AFTER_CONTEXT = PromptTemplate(
    "{context_str}{query_str}",
    function_mappings={"context_str": lambda **values: f"{values['context_str']}\n\n" if values["context_str"] else ""},
)
"""Prompt of LlamaIndex's multimodal chat engines, which put the images first: the texts, if any, then the question."""


def image_query_engine(
    retriever: BaseRetriever, llm: LLM, *, show_text: bool | None = None, **kwargs: Any
) -> RetrieverQueryEngine:
    """Return a stock `RetrieverQueryEngine(multimodal=True)`: sync, async and streaming.

    Args:
        retriever: a `GenerativeImageRetriever`, or one that fuses it with others.
        llm: `genret_llm(...)` for a server, `InProcessLLM(...)` for a model in this process, or any chat LLM.
        show_text: whether the model reads captions and metadata beside the images. Default: True if the retriever has
            `llm_metadata_keys`. False gives the model only the images, as in its training: a small model answers best
            so, and no text can reveal the answer. A large chat LLM benefits from captions.
        kwargs: further arguments of `RetrieverQueryEngine.from_args`, which override ours.
    """
    shown = bool(getattr(retriever, "llm_metadata_keys", ())) if show_text is None else show_text
    options: dict[str, Any] = {"multimodal": True, "chat_content_qa_template": LookAndAnswer(show_text=shown), **kwargs}
    return RetrieverQueryEngine.from_args(retriever, llm=llm, **options)
