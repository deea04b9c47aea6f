"""Answer questions about an image closed-book: the model has memorised the image and does not see it again.

The prompt contains the identifier of the image. `genret train` trains such prompts as the task `remember`. For
comparison, the same model also answers with the image in its prompt. Both answers are decoded greedily.

Depends on the index and on a model in this process or a vLLM server; independent of LlamaIndex.
Needs torch only for a model in this process.
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
    """Two answers to one question about an image.

    from_memory: the answer to a prompt with the identifier.
    from_image: the answer to a prompt with the image, None if the file of the image is missing.
    """

    image_id: str
    question: str
    from_memory: str
    from_image: str | None


@dataclass(frozen=True)
class QuestionPrompts:
    """The two prompts for one question about an image.

    from_memory: the prompt with the identifier.
    from_image: the prompt with the image, None if the file of the image is missing.
    image: path of the image.
    text: the question in `from_image`.
    """

    from_memory: Prompt
    from_image: Prompt | None
    image: Path
    text: str


class Speaker(Protocol):
    """A model of the index that generates both answers."""

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """Return both answers; the second is None without a prompt with the image."""

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """Return the same as `say`, without blocking the event loop."""


class ImageMemory:
    """Answers of the model of an index about its images, by image id.

    Args:
        index: from `load_index`. `genret train --mix ...,remember=4` trains the model to answer the records' own
            questions from memory. A model trained without it has learned only to describe an image by its identifier.
        speaker: an `InProcessSpeaker` or a `ServerSpeaker`.
        max_tokens: the longest answer in tokens, default 64.
    """

    def __init__(self, index: Index, speaker: Speaker, *, max_tokens: int = 64) -> None:
        self.index = index
        self._speaker = speaker
        self._max_tokens = max_tokens

    @classmethod
    def from_index_dir(
        cls, index_dir: str | Path, *, model: str | None = None, device: str = "auto", **kwargs: Any
    ) -> ImageMemory:
        """Load the index and its own model into this process.

        Args:
            index_dir: folder of the index.
            model: new path of the base model if it has moved, None for the path in the index.
            device: device of the model, default "auto".
            kwargs: further arguments of the constructor.
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
        """Use a vLLM server that serves the index's exported model (`genret serve`). Needs no torch in this process.

        Raises:
            ServerUnreachable: the server does not respond.
            ServerError: the server does not serve the model, or serves it with other weights.
        """
        index = load_index(Path(index_dir))
        scorer = VllmScorer(api_base, model=model, weights_id=index.weights_id, api_key=api_key, timeout_s=timeout_s)
        return cls(index, ServerSpeaker(scorer.server, scorer.served_model()), **kwargs)

    def answer_from_memory(self, image_id: str, question: str = "") -> MemoryAnswer:
        """Answer a question about an image from memory, and for comparison from the image itself.

        Args:
            image_id: id of an image of the index.
            question: text of the question, "" for a description of the image.
        Raises:
            UnknownImage: the index has no such image.
            QueryError: the question is longer than a query may be.
            ImageError: the file of the image exists, but does not decode.
        """
        prompts = self._prompts(image_id, question)
        return MemoryAnswer(image_id, question, *self._speaker.say(prompts, self._max_tokens))

    async def aanswer_from_memory(self, image_id: str, question: str = "") -> MemoryAnswer:
        """Run `answer_from_memory` in an event loop."""
        prompts = self._prompts(image_id, question)
        return MemoryAnswer(image_id, question, *await self._speaker.asay(prompts, self._max_tokens))

    def _prompts(self, image_id: str, question: str) -> QuestionPrompts:
        if image_id not in self.index.rows_by_id:
            raise UnknownImage(
                f"the index {self.index.folder} has no image {image_id!r}: pass the image_id of one of its images."
            )
        row, text = self.index.rows_by_id[image_id], question.strip()
        prompts, tokenizer, identifier = self.index.prompts, self.index.tokenizer, self.index.token_ids(row)
        from_memory = (
            prompts.about_identifier(tokenizer, identifier, text)
            if text
            else prompts.for_identifier(tokenizer, identifier)
        )
        image, text = self.index.records[row].path, text or CAPTION_QUESTION
        from_image = prompts.about_image(tokenizer, image, text) if image.is_file() else None
        return QuestionPrompts(from_memory, from_image, image, text)


class InProcessSpeaker:
    """A speaker with an `Mllm` in this process. Needs torch."""

    def __init__(self, mllm: Any) -> None:
        self._mllm = mllm

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.say`."""
        from_image = None if prompts.from_image is None else self._generate(prompts.from_image, max_tokens)
        return self._generate(prompts.from_memory, max_tokens), from_image

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.asay`. Generates in a thread."""
        return await asyncio.to_thread(self.say, prompts, max_tokens)

    def _generate(self, prompt: Prompt, max_tokens: int) -> str:
        import torch

        if prompt.image is None:
            input_ids = torch.tensor([prompt.token_ids], device=self._mllm.model.device)
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        else:
            inputs = self._mllm.process([prompt.text], [load_image(prompt.image)], [prompt.rest])
        output = self._mllm.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self._mllm.processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()


class ServerSpeaker:
    """A speaker with the model that a vLLM server serves under a name. Needs httpx only."""

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model

    def say(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.say`."""
        with self._server.connection() as connection:
            responses = [connection.request("POST", *post) for post in self._posts(prompts, max_tokens)]
        return _read_answers(responses)

    async def asay(self, prompts: QuestionPrompts, max_tokens: int) -> tuple[str, str | None]:
        """See `Speaker.asay`. Sends both requests at once."""
        posts = await asyncio.to_thread(self._posts, prompts, max_tokens)
        async with self._server.async_connection() as connection:
            responses = await asyncio.gather(*(connection.request("POST", *post) for post in posts))
        return _read_answers(responses)

    def _posts(self, prompts: QuestionPrompts, max_tokens: int) -> list[tuple[str, dict[str, Any]]]:
        """Return path and body of each request.

        The prompt from memory is sent as token ids, so that the server does not parse the user's text as markup.
        """
        options: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": 0}
        prompt = [list(prompts.from_memory.token_ids)]
        posts = [("/completions", {**options, "prompt": prompt, "add_special_tokens": False})]
        if prompts.from_image is not None:
            image = {"type": "image_url", "image_url": {"url": to_data_url(prompts.image)}}
            message = {"role": "user", "content": [image, {"type": "text", "text": prompts.text}]}
            posts.append(("/chat/completions", {**options, "messages": [message]}))
        return posts


def _read_answers(responses: list[httpx.Response]) -> tuple[str, str | None]:
    answers = [_read_answer(response) for response in responses]
    return answers[0], answers[1] if len(answers) > 1 else None


def _read_answer(response: httpx.Response) -> str:
    try:
        (choice,) = json_object(response)["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(
            f"{response.url} returned no completion ({error!r}). Check that it is a vLLM server."
        ) from error
    return str(text or "").strip()
