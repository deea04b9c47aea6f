"""Two LLMs that answer from recalled images: the model of a vLLM server, and the same model in this process."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from functools import cache
from threading import Thread
from typing import Any

import httpx
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_serializer
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.llms.openai_like import OpenAILike
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ModelError
from llama_index_genret.scorers.http_client import shown_address


def genret_llm(
    api_base: str, *, model: str = "genret", context_window: int = 32768, max_tokens: int = 64, **kwargs: Any
) -> OpenAILike:
    """Return an `OpenAILike` with the settings that a vLLM server needs to receive images.

    - It is a chat model, because LlamaIndex drops images for a completion model.
    - It is greedy.
    - It requests structured output by JSON schema, because `output_cls` otherwise gives an empty answer.
    - It opens a client per request. In a second event loop, a reused client makes `OpenAILike` send each request twice.

    Args:
        api_base: URL of the server, http://HOST:PORT/v1.
        model: served model name, default "genret".
        context_window: tokens that LlamaIndex fills at most, default 32768. LlamaIndex counts 2,125 tokens for its own
            image blocks. If the images do not fit, it sends one request per image instead of one for all.
        max_tokens: tokens per answer at most, default 64.
        kwargs: further arguments of `OpenAILike`, which override the settings. Agents need
            `is_function_calling_model=True` and a vLLM with `--enable-auto-tool-choice --tool-call-parser ...`.
    """
    options: dict[str, Any] = {
        "api_key": "EMPTY",
        "is_chat_model": True,
        "temperature": 0.0,
        "should_use_structured_outputs": True,
        "reuse_client": False,
        **kwargs,
    }
    return _ServerLLM(model=model, api_base=api_base, context_window=context_window, max_tokens=max_tokens, **options)


class _ServerLLM(OpenAILike):  # type: ignore[misc]  # OpenAILike has no types
    """An `OpenAILike` with cheap clients, so that every request may use a new one.

    All clients share one TLS context, because loading one takes 30 ms. No connection is kept open after its response,
    because LlamaIndex does not close the client of a stream.

    LlamaIndex's chat engines begin each request with their system prompt, by default an empty one. A model that was
    trained without a system prompt would read the words of its template for it. An empty system prompt is not sent.

    Key, headers and login are not in `repr`, `to_dict` or `model_dump`. With a key, pickling raises TypeError.
    """

    api_key: str | None = Field(default=None, exclude=True, repr=False)
    default_headers: dict[str, str] | None = Field(default=None, exclude=True, repr=False)
    api_base: str | None = Field(default=None, repr=False)

    @field_serializer("api_base")
    def _redact_login(self, api_base: str | None) -> str | None:
        return None if api_base is None else shown_address(api_base)

    def __getstate__(self) -> dict[str, Any]:
        if self.api_key not in (None, "EMPTY"):
            raise TypeError("an LLM with an API key cannot be pickled. Create it with genret_llm in each process.")
        state: dict[str, Any] = super().__getstate__()
        return state

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Chat without empty system messages. See `LLM.chat`."""
        response: ChatResponse = super().chat(_without_empty_system(messages), **kwargs)
        return response

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Stream a chat without empty system messages. See `LLM.stream_chat`."""
        response: ChatResponseGen = super().stream_chat(_without_empty_system(messages), **kwargs)
        return response

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Chat without empty system messages. See `LLM.achat`."""
        response: ChatResponse = await super().achat(_without_empty_system(messages), **kwargs)
        return response

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Stream a chat without empty system messages. See `LLM.astream_chat`."""
        response: ChatResponseAsyncGen = await super().astream_chat(_without_empty_system(messages), **kwargs)
        return response

    def _get_credential_kwargs(self, is_async: bool = False) -> dict[str, Any]:
        options: dict[str, Any] = super()._get_credential_kwargs(is_async=is_async)
        if options["http_client"] is None and not self.reuse_client:
            client = DefaultAsyncHttpxClient if is_async else DefaultHttpxClient
            options["http_client"] = client(verify=_tls_context(), limits=_NO_KEEP_ALIVE)
        return options


def _without_empty_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Drop empty system messages. Other empty messages stay, because they may be tool calls."""
    return [m for m in messages if m.role != MessageRole.SYSTEM or any(getattr(b, "text", True) for b in m.blocks)]


_NO_KEEP_ALIVE = httpx.Limits(max_keepalive_connections=0)


@cache
def _tls_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class InProcessLLM(CustomLLM):
    """A greedy chat LLM over an `Mllm` in this process, images included.

    max_tokens: tokens per answer at most, default 64. context_window: tokens, default 8192.
    """

    max_tokens: int = 64
    context_window: int = 8192
    _mllm: Any = PrivateAttr()

    def __init__(self, mllm: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mllm = mllm

    @classmethod
    def class_name(cls) -> str:
        """Return the name for LlamaIndex's events."""
        return "genret_in_process_llm"

    @property
    def metadata(self) -> LLMMetadata:
        """See `LLM.metadata`."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=self._mllm.name_or_path,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `LLM.chat`."""
        inputs = self._inputs(messages)
        output = self._mllm.model.generate(**inputs, **self._generation(kwargs))
        return _response(self._decode(output[0, inputs["input_ids"].shape[1] :]))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """See `LLM.stream_chat`."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self._mllm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {**self._inputs(messages), **self._generation(kwargs), "streamer": streamer}
        failures: list[Exception] = []

        def generate() -> None:
            try:
                self._mllm.model.generate(**arguments)
            except Exception as error:  # passed to the reader of the stream, which would wait forever
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate)
        thread.start()

        def deltas() -> ChatResponseGen:
            text = ""
            for delta in streamer:
                text += delta
                yield _response(text, delta)
            thread.join()
            for failure in failures:
                raise failure

        return deltas()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Run `chat` in a thread. See `LLM.achat`."""
        return await asyncio.to_thread(self.chat, messages, **kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Chat with the prompt as one user message. See `LLM.complete`."""
        return CompletionResponse(text=self.chat([_user(prompt)], **kwargs).message.content or "")

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """See `LLM.stream_complete`."""
        for part in self.stream_chat([_user(prompt)], **kwargs):
            yield CompletionResponse(text=part.message.content or "", delta=part.delta)

    def _generation(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"max_new_tokens": kwargs.get("max_tokens", self.max_tokens), "do_sample": False}

    def _inputs(self, messages: Sequence[ChatMessage]) -> dict[str, Any]:
        messages = [m for m in messages if m.content or any(isinstance(block, ImageBlock) for block in m.blocks)]
        images = [
            load_image(block.resolve_image().read())
            for message in messages
            for block in message.blocks
            if isinstance(block, ImageBlock)
        ]
        chat = [{"role": m.role.value, "content": [self._part(block) for block in m.blocks]} for m in messages]
        processor = self._mllm.processor
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        return {key: value.to(self._mllm.model.device) for key, value in inputs.items()}

    def _part(self, block: Any) -> dict[str, str]:
        """Return a block for the chat template. Special tokens in a text are broken up, so that they stay text."""
        if isinstance(block, ImageBlock):
            return {"type": "image"}
        if not isinstance(block, TextBlock):
            raise ModelError(f"this model cannot read a {type(block).__name__}. Pass only text and images.")
        text = block.text
        for token in self._mllm.processor.tokenizer.added_tokens_encoder:
            text = text.replace(token, f"{token[:1]}\u200b{token[1:]}")
        return {"type": "text", "text": text}

    def _decode(self, token_ids: Any) -> str:
        return str(self._mllm.processor.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def _user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=text)


def _response(text: str, delta: str | None = None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)
