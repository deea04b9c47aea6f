"""Vectors that a multimodal LLM computes for images and texts: vision features and last hidden states.

Depends on a loaded `Mllm`; independent of indexes. Needs torch and transformers; loads on first use.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm, Progress, render_prompts  # isort: skip  # first: it names the extra that brings torch

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ModelError

IMAGE_BATCH = 16
TEXT_BATCH = 64


def vision_features(
    mllm: Mllm, images: Sequence[Any], progress: Progress = iter, *, load: Callable[[Any], Any] = load_image
) -> NDArray[np.float32]:
    """Return (n, d) float32: for each image, the mean of the patch features of the vision tower.

    Args:
        images: n files, or other inputs of `load`.
        load: returns the RGB image of one input. Default: decode the file.
    Raises:
        ModelError: the model has no `get_image_features`.
    """
    text, core = render_prompts(mllm).memorise, _vision_language_core(mllm)
    rows: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for start in progress(range(0, len(images), IMAGE_BATCH)):
            batch = [load(image) for image in images[start : start + IMAGE_BATCH]]
            rows.append(_mean_patches(core, mllm, text, batch).float().cpu().numpy())
    return np.concatenate(rows)


def last_hidden_states(mllm: Mllm, prompts: Sequence[Sequence[int]], progress: Progress = iter) -> NDArray[np.float32]:
    """Return (n, d) float32: the hidden state that the LM head reads at the end of each text prompt of token ids."""
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


def last_hidden_states_of_images(
    mllm: Mllm, images: Sequence[Any], progress: Progress = iter, *, load: Callable[[Any], Any] = load_image
) -> NDArray[np.float32]:
    """Return (n, d) float32: the hidden state that the LM head reads at the end of each image's `memorise` prompt.

    Args:
        images: n files, or other inputs of `load`.
        load: returns the RGB image of one input. Default: decode the file.
    Raises:
        ModelError: the model has no `get_image_features`.
    """
    text, core = render_prompts(mllm).memorise, _vision_language_core(mllm)
    rows: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for start in progress(range(0, len(images), IMAGE_BATCH)):
            batch = [load(image) for image in images[start : start + IMAGE_BATCH]]
            output = core(**mllm.process([text] * len(batch), batch), use_cache=False)
            rows.append(output.last_hidden_state[:, -1].float().cpu().numpy())
    return np.concatenate(rows)


def _vision_language_core(mllm: Mllm) -> Any:
    """Return the model below the LM head: vision tower, connector and decoder."""
    core = getattr(mllm.model, "model", mllm.model)
    if not hasattr(core, "get_image_features"):
        raise ModelError(
            f"{mllm.name_or_path} has no `get_image_features`: choose the scheme `numeric`, which needs none."
        )
    return core


def _mean_patches(core: Any, mllm: Mllm, text: str, images: Sequence[Any]) -> Any:
    """Return (images, d): the mean of the patch features of each image."""
    inputs = mllm.process([text] * len(images), images)
    pixels = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}
    features = core.get_image_features(**pixels, return_dict=True).last_hidden_state
    lengths = pixels["image_grid_thw"].prod(-1).tolist() if "image_grid_thw" in pixels else []
    if sum(lengths) == len(features):  # the patches of all images in one sequence
        patches = features.split(lengths)
    elif len(images) == 1 or (features.ndim == 3 and len(features) == len(images)):
        patches = features.reshape(len(images), -1, features.shape[-1])
    else:  # tiles: the output does not say which image each belongs to
        return torch.cat([_mean_patches(core, mllm, text, [image]) for image in images])
    return torch.stack([one.mean(0) for one in patches])
