"""A multimodal LLM of Hugging Face, in this process: loading, fingerprints, prompts, image features, adapters.

Works on any `AutoModelForImageTextToText`. Needs torch and transformers; loads on first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import MissingExtra, ModelError, ModelMismatch, NotTrained
from llama_index_genret.images import load_image
from llama_index_genret.prompts import ANSWER, DESCRIBE, MEMORISE, PREFIX_BLOCK, RETRIEVE, Blank, PromptSet
from llama_index_genret.store import Index, ModelEntry
from llama_index_genret.tokenization import IndexTokenizer

try:
    import torch
    import transformers
    from tokenizers import Tokenizer
    from torch.nn.utils.rnn import pad_sequence
except ImportError as error:
    raise MissingExtra(
        "a model in this process needs torch and transformers: pip install 'llama-index-genret[train]'. "
        "To use a running server instead, name its address (--server URL)."
    ) from error

BLANK = "\u2063blank\u2063"
IMAGE_BATCH = 16
TEXT_BATCH = 64
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Mllm:
    """A loaded model with its processor. `model` is in evaluation mode."""

    name_or_path: str
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> IndexTokenizer:
        """The processor's tokenizer, as the light parts use it."""
        return IndexTokenizer(Tokenizer.from_str(self.processor.tokenizer.backend_tokenizer.to_str()))

    def entry(self) -> ModelEntry:
        """What an index records of its base model; a folder by its whole path, so that it is found from any other."""
        folder = Path(self.name_or_path)
        return ModelEntry(
            name_or_path=str(folder.resolve()) if folder.is_dir() else self.name_or_path,
            fingerprint=fingerprint(self.model),
            base_tokenizer=self.tokenizer.fingerprint,
        )

    def processed(
        self, texts: Sequence[str], images: Sequence[Any], rests: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any]:
        """The processor's tensors for one image a text, left-padded, on the model's device.

        Args:
            rests: for each text, the tokens that follow it.
        """
        inputs = self.processor(
            text=list(texts), images=[[i] for i in images], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = dict(inputs) if not any(rests) else _followed(dict(inputs), rests)
        return {key: value.to(self.model.device) for key, value in inputs.items()}


def _followed(inputs: dict[str, Any], rests: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Left-padded inputs with more tokens after each row."""
    longest = max(map(len, rests))
    shape = inputs["input_ids"].shape

    def longer(name: str, tensor: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, rest in zip(tensor, rests, strict=True):
            end = {"input_ids": torch.tensor(rest, dtype=row.dtype), "attention_mask": row.new_ones(len(rest))}
            rows.append(torch.cat([row.new_zeros(longest - len(rest)), row, end.get(name, row.new_zeros(len(rest)))]))
        return torch.stack(rows)

    return {name: longer(name, value) if value.shape == shape else value for name, value in inputs.items()}


def load_mllm(name_or_path: str, *, device: str = "auto", dtype: str = "auto") -> Mllm:
    """Load a local folder or a hub id.

    Args:
        device: "cpu", "cuda", ... or "auto": the GPU where there is one.
        dtype: "float32", "bfloat16" or "auto": float32 on a CPU, bfloat16 elsewhere.
    Raises:
        ModelError: it is missing, or is no image-text-to-text model; names the folder. Or there is no such device.
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
    """Refuse one that cannot compute, before weights are read."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"the device {device!r} cannot be used: {str(error).partition(chr(10))[0]}. Give cpu, auto, or a GPU that "
            "this machine has, such as cuda:0."
        ) from error


def load_trained(
    index: Index, *, device: str = "auto", dtype: str = "auto", base: str | None = None, update: bool = True
) -> Mllm:
    """The index's model with its trained weights merged in.

    Args:
        base: another place of the same base model, if it has moved.
        update: whether that of the index, if it has one, is among the weights.
    Raises:
        NotTrained: the index has no trained weights. ModelMismatch: `base` is another model or tokenizer.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights yet: run `genret train {index.folder}`.")
    from peft import PeftModel

    mllm = load_base(index, device=device, dtype=dtype, base=base)
    _set_new_rows(mllm.model, index)
    merged = PeftModel.from_pretrained(mllm.model, index.adapter_folder()).merge_and_unload()
    if update and index.has_update:
        merged = PeftModel.from_pretrained(merged, index.update_folder()).merge_and_unload()
    return Mllm(mllm.name_or_path, merged.eval(), mllm.processor)


@torch.no_grad()
def _set_new_rows(model: Any, index: Index) -> None:
    """In place. What is merged in later replaces those of symbols that it was trained on."""
    new = index.new_rows()
    if new is None:
        return
    for name, module in model.named_modules():
        rows = new.rows.get(name.rpartition(".")[2])
        if rows is not None:
            module.weight[torch.from_numpy(new.token_ids)] = torch.from_numpy(rows).to(module.weight)


def load_base(index: Index, *, device: str = "auto", dtype: str = "auto", base: str | None = None) -> Mllm:
    """The index's base model, checked to be the same, with room for the index's symbols."""
    where = base or index.manifest.model.name_or_path
    mllm = load_mllm(where, device=device, dtype=dtype)
    index.check_tokenizer(mllm.tokenizer, where)
    found = fingerprint(mllm.model)
    if found != index.manifest.model.fingerprint:
        raise ModelMismatch(
            f"the weights of {where} (fingerprint {found[:12]}) are not those that {index.folder} was made with "
            f"({index.manifest.model.name_or_path}, {index.manifest.model.fingerprint[:12]}). Name the right model."
        )
    rows = mllm.model.get_input_embeddings().weight.shape[0]
    if index.tokenizer.vocab_size > rows:
        mllm.model.resize_token_embeddings(index.tokenizer.vocab_size, mean_resizing=False)
    mllm.processor.tokenizer._tokenizer = Tokenizer.from_str(index.tokenizer.to_json())
    return mllm


def fingerprint(model: Any) -> str:
    """Sha256 of the names, shapes and a sample of all weights; the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step].to(torch.bfloat16).to(torch.float32).cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


def render_prompts(mllm: Mllm) -> PromptSet:
    """The model's chat template around our four tasks, as text.

    Raises:
        ModelError: it has no chat template, or the template changes what stands in a message.
    """

    def render(text: str, *, image: bool = False) -> str:
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        return str(mllm.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))

    def blank(template: str, *, image: bool = False) -> Blank:
        before, mark, after = render(template.format(BLANK), image=image).partition(BLANK)
        if not mark:
            raise ModelError(f"the chat template of {mllm.name_or_path} drops or changes the text of a message.")
        return Blank(before=before, after=after)

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
        retrieve=blank(RETRIEVE),
        compose=blank(RETRIEVE, image=True),
        memorise=render(MEMORISE, image=True),
        describe=blank(DESCRIBE),
        answer=blank(ANSWER, image=True),
        end=end or mllm.processor.tokenizer.eos_token,
    )


def vision_features(
    mllm: Mllm, pictures: Sequence[Any], progress: Progress = iter, *, load: Callable[[Any], Any] = load_image
) -> NDArray[np.float32]:
    """(n, d) float32: the mean of the vision tower's patch features of each image.

    Args:
        pictures: files, or what else `load` makes an RGB image of.
    Raises:
        ModelError: the model has no `get_image_features`.
    """
    text, core = render_prompts(mllm).memorise, _seeing(mllm)
    rows: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for start in progress(range(0, len(pictures), IMAGE_BATCH)):
            images = [load(picture) for picture in pictures[start : start + IMAGE_BATCH]]
            rows.append(_mean_patches(core, mllm, text, images).float().cpu().numpy())
    return np.concatenate(rows)


def last_hidden_states(mllm: Mllm, prompts: Sequence[Sequence[int]], progress: Progress = iter) -> NDArray[np.float32]:
    """(n, d) float32: what the LM head reads at the end of each prompt of token ids, of text alone."""
    decoder, device = mllm.model.get_decoder(), mllm.model.device
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    parts: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in progress(range(0, len(order), TEXT_BATCH)):
            rows = [torch.tensor(prompts[place]) for place in order[start : start + TEXT_BATCH]]
            token_ids = pad_sequence(rows, batch_first=True, padding_side="left").to(device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            output = decoder(input_ids=token_ids, attention_mask=mask.to(device), use_cache=False)
            parts.append(output.last_hidden_state[:, -1].float().cpu().numpy())
    return np.concatenate(parts)[np.argsort(order)]


def last_hidden_states_of_pictures(
    mllm: Mllm, pictures: Sequence[Any], progress: Progress = iter, *, load: Callable[[Any], Any] = load_image
) -> NDArray[np.float32]:
    """(n, d) float32: what the LM head reads at the end of the prompt that asks for the name of each picture.

    Args:
        pictures: files, or what else `load` makes an RGB image of.
    Raises:
        ModelError: the model has no `get_image_features`.
    """
    text, core = render_prompts(mllm).memorise, _seeing(mllm)
    rows: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for start in progress(range(0, len(pictures), IMAGE_BATCH)):
            images = [load(picture) for picture in pictures[start : start + IMAGE_BATCH]]
            output = core(**mllm.processed([text] * len(images), images), use_cache=False)
            rows.append(output.last_hidden_state[:, -1].float().cpu().numpy())
    return np.concatenate(rows)


def _seeing(mllm: Mllm) -> Any:
    """The model below the LM head: vision tower, connector and decoder."""
    core = getattr(mllm.model, "model", mllm.model)
    if not hasattr(core, "get_image_features"):
        raise ModelError(f"{mllm.name_or_path} gives no image features: choose the scheme `numeric`.")
    return core


def _mean_patches(core: Any, mllm: Mllm, text: str, images: Sequence[Any]) -> Any:
    """(images, d): the mean of each image's patch features."""
    inputs = mllm.processed([text] * len(images), images)
    pixels = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}
    features = core.get_image_features(**pixels, return_dict=True).last_hidden_state
    lengths = pixels["image_grid_thw"].prod(-1).tolist() if "image_grid_thw" in pixels else []
    if sum(lengths) == len(features):  # the patches of all images in one sequence
        each = features.split(lengths)
    elif len(images) == 1 or (features.ndim == 3 and len(features) == len(images)):
        each = features.reshape(len(images), -1, features.shape[-1])
    else:  # tiles: not known which are whose
        return torch.cat([_mean_patches(core, mllm, text, [image]) for image in images])
    return torch.stack([patches.mean(0) for patches in each])
