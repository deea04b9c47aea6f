"""Closed-book answers: what the model says of an image that it has memorised, without looking at it again.

It is told the image by its identifier, in a prompt that `genret train` teaches as the task `remember`. Beside it stands
what the same model says when it is shown the image. Greedy, both.

Knows the index, a model in this process or a vLLM server; nothing of LlamaIndex. Loads torch where the model is here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from llama_index_genret.corpus.images import load_image, to_data_url
from llama_index_genret.errors import ServerError, UnknownImage
from llama_index_genret.models.prompts import CAPTION_QUESTION, Prompt
from llama_index_genret.scorers.http_client import Server, json_object
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.store import Index, load_index


@dataclass(frozen=True)
class MemoryAnswer:
    """Both answers to one question. seeing: None where the image's file is gone."""

    image_id: str
    question: str
    from_memory: str
    seeing: str | None


@dataclass(frozen=True)
class QuestionPrompts:
    """A question in both forms. image, text: what is looked at, and the question about it; no image, no second form."""

    remembering: Prompt
    looking: Prompt | None
    image: Path
    text: str


class Speaker(Protocol):
    """Lets the index's model speak: the answer from memory, and the one with the image in view."""

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """Both answers, the second None where nothing can be looked at."""

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """The same for an event loop; it never blocks it."""


class ImageMemory:
    """Asks the model of an index about its images by their ids.

    Args:
        index: from `load_index`. `genret train --mix ...,remember=4` teaches to answer from memory what the records'
            own questions ask; a model without it knows of an identifier only how the image is described.
        speaker: an `InProcessSpeaker` or a `ServerSpeaker`.
        max_tokens: of an answer.
    """

    def __init__(self, index: Index, speaker: Speaker, *, max_tokens: int = 64) -> None:
        self.index = index
        self._speaker = speaker
        self._max_tokens = max_tokens

    @classmethod
    def from_index_dir(
        cls, index_dir: str | Path, *, model: str | None = None, device: str = "auto", **kwargs: Any
    ) -> ImageMemory:
        """With the index's own model, loaded into this process.

        Args:
            model: another place of the same base model, if it has moved.
        """
        from llama_index_genret.store.model_loading import load_trained

        index = load_index(Path(index_dir))
        return cls(index, InProcessSpeaker(load_trained(index, device=device, base=model)), **kwargs)

    @classmethod
    def from_server(
        cls,
        index_dir: str | Path,
        api_base: str,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        timeout_s: float = 60.0,
        **kwargs: Any,
    ) -> ImageMemory:
        """With a vLLM server that serves the index's exported model (`genret serve`). Needs no torch here.

        Raises:
            ServerUnreachable, ServerError: nothing answers, or the model is not served, or with other weights.
        """
        index = load_index(Path(index_dir))
        scorer = VllmScorer(api_base, model=model, weights_id=index.weights_id, api_key=api_key, timeout_s=timeout_s)
        return cls(index, ServerSpeaker(scorer.server, scorer.served_model()), **kwargs)

    def answer_from_memory(self, image_id: str, question: str = "") -> MemoryAnswer:
        """What the model says of an image by heart, and what it says when it looks at it.

        Args:
            question: empty for a description.
        Raises:
            UnknownImage: the index has no such image. QueryError: the question is longer than a query may be.
            ImageError: the image's file is there, but does not decode.
        """
        prompts = self._prompts(image_id, question)
        return MemoryAnswer(image_id, question, *self._speaker.say(prompts, self._max_tokens))

    async def aanswer_from_memory(self, image_id: str, question: str = "") -> MemoryAnswer:
        """`answer_from_memory` for an event loop."""
        prompts = self._prompts(image_id, question)
        return MemoryAnswer(image_id, question, *await self._speaker.asay(prompts, self._max_tokens))

    def _prompts(self, image_id: str, question: str) -> QuestionPrompts:
        if image_id not in self.index.rows_by_id:
            raise UnknownImage(
                f"{self.index.folder} has no image {image_id!r}: ask with the image_id of one of its own."
            )
        row, text = self.index.rows_by_id[image_id], question.strip()
        prompts, tokenizer, name = self.index.prompts, self.index.tokenizer, self.index.token_ids(row)
        by_heart = prompts.about_identifier(tokenizer, name, text) if text else prompts.for_identifier(tokenizer, name)
        image, text = self.index.records[row].path, text or CAPTION_QUESTION
        shown = prompts.about_image(tokenizer, image, text) if image.is_file() else None
        return QuestionPrompts(by_heart, shown, image, text)


class InProcessSpeaker:
    """Speaks with an `Mllm`. Needs torch."""

    def __init__(self, mllm: Any) -> None:
        self._mllm = mllm

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.say`."""
        shown = None if prompts.looking is None else self._generated(prompts.looking, max_tokens)
        return self._generated(prompts.remembering, max_tokens), shown

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.asay`: computes in a thread."""
        return await asyncio.to_thread(self.say, prompts, max_tokens)

    def _generated(self, prompt: Prompt, max_tokens: int) -> str:
        import torch

        if prompt.image is None:
            input_ids = torch.tensor([prompt.token_ids], device=self._mllm.model.device)
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        else:
            inputs = self._mllm.process([prompt.text], [load_image(prompt.image)], [prompt.rest])
        said = self._mllm.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer = said[0, inputs["input_ids"].shape[1] :]
        return str(self._mllm.processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


class ServerSpeaker:
    """Speaks with the model that a vLLM server serves under a name. Needs httpx only."""

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.say`."""
        with self._server.connection() as connection:
            answers = [connection.request("POST", *post) for post in self._posts(prompts, max_tokens)]
        return _both(answers)

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.asay`: both requests at once."""
        posts = await asyncio.to_thread(self._posts, prompts, max_tokens)
        async with self._server.async_connection() as connection:
            answers = await asyncio.gather(*(connection.request("POST", *post) for post in posts))
        return _both(answers)

    def _posts(self, prompts: QuestionPrompts, max_tokens: int) -> list[tuple[str, dict[str, Any]]]:
        """Path and body. What is remembered goes as token ids, so that no text of a user is parsed as markup."""
        options: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": 0}
        prompt = [list(prompts.remembering.token_ids)]
        posts = [("/completions", {**options, "prompt": prompt, "add_special_tokens": False})]
        if prompts.looking is not None:
            picture = {"type": "image_url", "image_url": {"url": to_data_url(prompts.image)}}
            message = {"role": "user", "content": [picture, {"type": "text", "text": prompts.text}]}
            posts.append(("/chat/completions", {**options, "messages": [message]}))
        return posts


def _both(answers: list[httpx.Response]) -> tuple[str, str | None]:
    said = [_said(answer) for answer in answers]
    return said[0], said[1] if len(said) > 1 else None


def _said(answer: httpx.Response) -> str:
    try:
        (choice,) = json_object(answer)["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{answer.url} answered no completion ({error!r}). Is it a vLLM server?") from error
    return str(text or "").strip()
