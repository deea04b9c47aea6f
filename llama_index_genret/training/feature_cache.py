"""Caches for frozen modules: vision features per image, and activations of the lower layers per text.

A vision tower takes a batch in one of two shapes: (images, channels, height, width), or the patches of all images in
one sequence with the grid of each. A decoder is a Hugging Face module with a list `layers`.

Depends on torch modules; independent of training, prompts and tasks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

CACHED_BYTES = 2**32
"""Maximum bytes of each cache: in bfloat16, 20,000 images of 256 patches x 384, or 100,000 texts of 32 tokens x 576.

The tower's cache evicts the oldest entries, the decoder's the least recently used ones.
"""

_SKIPPED = "_skipped_by_frozen_layers"
"""Attribute of a KV cache: the inputs that its frozen layers have not seen."""


@contextmanager
def cached_tower(model: Any) -> Iterator[None]:
    """Cache the vision features of each image within the context.

    Towers with trainable weights are not cached, nor are batches of other shapes. Under autocast, features are stored
    in its dtype.

    Args:
        model: a Hugging Face image-text-to-text model.
    """
    tower = model.get_encoder(modality="image")
    if tower is model or any(parameter.requires_grad for parameter in tower.parameters()):
        yield
        return
    cache: OrderedDict[bytes, Any] = OrderedDict()
    original, held = tower.forward, 0

    def forward(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal held
        lengths = _lengths(pixel_values, kwargs.get("grid_thw"))
        if lengths is None or args:
            return original(pixel_values, *args, **kwargs)
        outputs = []
        for i, pixels in enumerate(torch.split(pixel_values, lengths)):
            own = {name: _one(value, i, len(lengths)) for name, value in kwargs.items()}
            key = _digest([pixels, *(value for value in own.values() if isinstance(value, torch.Tensor))])
            if key not in cache:
                with torch.no_grad():
                    cache[key] = _cast_to_autocast(original(pixels, **own))
                held += _bytes(cache[key])
            outputs.append(cache[key])
        joined = type(outputs[0])(**{name: _concatenate([output[name] for output in outputs]) for name in outputs[0]})
        while held > CACHED_BYTES:
            held -= _bytes(cache.popitem(last=False)[1])
        return joined

    tower.forward = forward
    try:
        yield
    finally:
        tower.forward = original


def _cast_to_autocast(output: Any) -> Any:
    device = next(value for value in output.values() if isinstance(value, torch.Tensor)).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return type(output)(**{name: _cast(value, dtype) for name, value in output.items()})


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else [_cast(entry, dtype) for entry in value]


def _lengths(pixel_values: torch.Tensor, grid_thw: torch.Tensor | None) -> list[int] | None:
    """Return the number of rows of `pixel_values` per image, None for an unknown shape."""
    if grid_thw is not None:
        return list(map(int, grid_thw.prod(-1)))
    return [1] * len(pixel_values) if pixel_values.ndim == 4 else None


def _one(value: Any, i: int, n_images: int) -> Any:
    """Return image i of a batched argument, or the argument itself if it is not batched."""
    return value[i : i + 1] if isinstance(value, torch.Tensor) and len(value) == n_images else value


def _digest(tensors: Sequence[torch.Tensor]) -> bytes:
    """Hash shapes and contents: the same patches in another grid are another image."""
    digest = hashlib.blake2b()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _concatenate(values: Sequence[Any]) -> Any:
    """Concatenate one field of several outputs: tensors, or lists of tensors (one per layer) entry by entry."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [_concatenate(entries) for entries in zip(*values, strict=True)]


def _bytes(output: Any) -> int:
    if isinstance(output, torch.Tensor):
        return output.nbytes
    return sum(map(_bytes, output.values() if isinstance(output, dict) else output))


@contextmanager
def cached_layers(decoder: Any, n_layers: int) -> Iterator[None]:
    """Cache the activations of the first `n_layers` of `decoder` for each text, within the context.

    These layers must be frozen. Batches whose embeddings need a gradient are not cached, nor are decoders with several
    types of layers. Under autocast, activations are stored in its dtype. Rows must be padded on the left, as
    `collator.collate` does. The frozen layers' part of a KV cache is computed when a text is continued.
    """
    if not n_layers or len(set(getattr(decoder.config, "layer_types", None) or ())) > 1:
        yield
        return
    cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
    original = decoder.forward
    lower, upper = decoder.layers[:n_layers], decoder.layers[n_layers:]

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = decoder.get_input_embeddings()(input_ids)
        past = kwargs.get("past_key_values")
        if inputs_embeds.requires_grad or attention_mask is None or attention_mask.ndim != 2:
            if (skipped := getattr(past, _SKIPPED, None)) is not None:
                delattr(past, _SKIPPED)
                with _only(decoder, lower, torch.nn.Identity()):
                    original(**skipped, past_key_values=past, use_cache=True)
            return original(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        rows = _strip_padding(inputs_embeds, attention_mask)
        keys = [hashlib.blake2b(row.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest() for row in rows]
        missing = [place for place, key in enumerate(keys) if key not in cache]
        if missing:
            with torch.no_grad(), _only(decoder, lower, torch.nn.Identity()):
                outputs = original(
                    inputs_embeds=inputs_embeds[missing], attention_mask=attention_mask[missing], use_cache=False
                ).last_hidden_state
            dtype = (
                torch.get_autocast_dtype(outputs.device.type)
                if torch.is_autocast_enabled(outputs.device.type)
                else None
            )
            for place, row in zip(missing, _strip_padding(outputs.to(dtype), attention_mask[missing]), strict=True):
                cache[keys[place]] = row.clone()
        for key in keys:
            cache.move_to_end(key)
        hidden = torch.zeros_like(inputs_embeds)
        for row, key in zip(hidden, keys, strict=True):
            row[len(row) - len(cache[key]) :] = cache[key]
        while sum(row.nbytes for row in cache.values()) > CACHED_BYTES:
            cache.popitem(last=False)
        if past is not None:
            positions = kwargs.get("position_ids")
            skipped = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": positions}
            setattr(past, _SKIPPED, skipped)
        with _only(decoder, upper, decoder.norm):
            return original(inputs_embeds=hidden, attention_mask=attention_mask, **kwargs)

    decoder.forward = forward
    try:
        yield
    finally:
        decoder.forward = original


@contextmanager
def _only(decoder: Any, layers: Any, norm: Any) -> Iterator[None]:
    """Let a decoder have these layers and this norm only, within the context."""
    everything = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = layers, norm
    try:
        yield
    finally:
        decoder.layers, decoder.norm = everything


def _strip_padding(rows: torch.Tensor, attention_mask: torch.Tensor) -> Sequence[torch.Tensor]:
    lengths = attention_mask.sum(1).tolist()
    return [row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)]
