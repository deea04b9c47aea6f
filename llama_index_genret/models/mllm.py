"""A multimodal LLM of Hugging Face in this process: loading, fingerprint, rendered prompts, processor inputs.

Works with any `AutoModelForImageTextToText`. Needs torch and transformers; loads on first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index_genret.errors import MissingExtra, ModelError
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.models.prompts import (
    ANSWER,
    DESCRIBE,
    MEMORISE,
    PREFIX_BLOCK,
    RETRIEVE,
    Blank,
    PromptSet,
)
from llama_index_genret.models.tokenizer import IndexTokenizer

try:
    import torch
    import transformers
    from tokenizers import Tokenizer
except ImportError as error:
    raise MissingExtra(
        "a model in this process needs torch and transformers: pip install 'llama-index-genret[train]'. "
        "To use a running server instead, give its address (--server URL)."
    ) from error

BLANK = "\u2063blank\u2063"
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Mllm:
    """A loaded model with its processor. `model` is in evaluation mode."""

    name_or_path: str
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> IndexTokenizer:
        """The processor's tokenizer as an `IndexTokenizer`, which needs no transformers."""
        return IndexTokenizer(Tokenizer.from_str(self.processor.tokenizer.backend_tokenizer.to_str()))

    def entry(self) -> ModelEntry:
        """Return the name and the fingerprints that an index stores. A folder is stored as its absolute path."""
        folder = Path(self.name_or_path)
        return ModelEntry(
            name_or_path=str(folder.resolve()) if folder.is_dir() else self.name_or_path,
            fingerprint=fingerprint(self.model),
            base_tokenizer=self.tokenizer.fingerprint,
        )

    def process(
        self, texts: Sequence[str], images: Sequence[Any], rests: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any]:
        """Return the processor's tensors for one image per text, left-padded, on the model's device.

        Args:
            texts: rendered chat text with the image placeholder.
            images: one RGB image per text.
            rests: for each text, the token ids that follow it. Default: none.
        """
        inputs = self.processor(
            text=list(texts), images=[[i] for i in images], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = dict(inputs) if not any(rests) else _append_tokens(dict(inputs), rests)
        return {key: value.to(self.model.device) for key, value in inputs.items()}


def _append_tokens(inputs: dict[str, Any], rests: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Append token ids to each row of left-padded inputs, and keep them left-padded."""
    longest = max(map(len, rests))
    shape = inputs["input_ids"].shape

    def append(name: str, tensor: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, rest in zip(tensor, rests, strict=True):
            end = {"input_ids": torch.tensor(rest, dtype=row.dtype), "attention_mask": row.new_ones(len(rest))}
            rows.append(torch.cat([row.new_zeros(longest - len(rest)), row, end.get(name, row.new_zeros(len(rest)))]))
        return torch.stack(rows)

    return {name: append(name, value) if value.shape == shape else value for name, value in inputs.items()}


def load_mllm(name_or_path: str, *, device: str = "auto", dtype: str = "auto") -> Mllm:
    """Load a model with its processor.

    Args:
        name_or_path: a local folder or a hub id.
        device: "cpu", "cuda", ... Default "auto": the GPU if there is one.
        dtype: "float32" or "bfloat16". Default "auto": float32 on a CPU, bfloat16 elsewhere.
    Raises:
        ModelError: the model is missing or is not an image-text-to-text model, or the device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        processor = transformers.AutoProcessor.from_pretrained(name_or_path)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            name_or_path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{name_or_path!r} does not load as an image-text-to-text model: {error}. "
            "Give a folder with config.json, weights and processor files, or a hub id."
        ) from error
    return Mllm(name_or_path, model.to(device).eval(), processor)


def _check_device(device: str) -> None:
    """Refuse an unusable device before any weights are read."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"the device {device!r} cannot be used: {str(error).partition(chr(10))[0]}. Give cpu, auto, or a GPU that "
            "this machine has, such as cuda:0."
        ) from error


def fingerprint(model: Any) -> str:
    """Return the SHA-256 of the names, shapes and a sample of all weights. It is the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step].to(torch.bfloat16).to(torch.float32).cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


def render_prompts(mllm: Mllm) -> PromptSet:
    """Render the prompts of all tasks with the model's chat template.

    Raises:
        ModelError: the model has no chat template, or the template changes the text of a message.
    """
    try:
        turn = mllm.processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "text", "text": "?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": BLANK}]},
            ],
            tokenize=False,
        )
    except ValueError as error:
        raise ModelError(
            f"{mllm.name_or_path} has no chat template: {error}. Use an instruction-tuned model."
        ) from error
    end = str(turn).partition(BLANK)[2].strip()
    return PromptSet(
        block=PREFIX_BLOCK,
        retrieve=_blank(mllm, RETRIEVE),
        compose=_blank(mllm, RETRIEVE, n_images=1),
        memorise=_render(mllm, MEMORISE, n_images=1),
        describe=_blank(mllm, DESCRIBE),
        answer=answer_prompt(mllm, 1),
        end=end or mllm.processor.tokenizer.eos_token,
    )


def answer_prompt(mllm: Mllm, n_images: int) -> Blank:
    """Render the prompt of a question after its images, as `image_query_engine` sends it.

    Raises:
        ModelError: as for `render_prompts`.
    """
    return _blank(mllm, ANSWER, n_images=n_images)


def _blank(mllm: Mllm, template: str, *, n_images: int = 0) -> Blank:
    before, mark, after = _render(mllm, template.format(BLANK), n_images=n_images).partition(BLANK)
    if not mark:
        raise ModelError(
            f"the chat template of {mllm.name_or_path} drops or changes the text of a message. "
            "Use a model whose template keeps it."
        )
    return Blank(before=before, after=after)


def _render(mllm: Mllm, text: str, *, n_images: int) -> str:
    message = {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": text}]}
    return str(mllm.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
