"""The activations below the trained layers of a language model, computed once per distinct text.

Knows a decoder of Hugging Face as a list of layers; nothing of training, prompts or images.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

CACHED_BYTES = 2**32
"""Activations kept in memory: in bfloat16 of 100,000 texts of 32 tokens x 576. The oldest make room."""


@contextmanager
def cached_layers(decoder: Any, n_layers: int) -> Iterator[None]:
    """While inside, the first `n_layers` of `decoder`, which must be frozen, see a text once.

    Batches whose embeddings need a gradient run as they are, and so does a decoder whose layers are not all of one
    kind. Rows are padded on the left, as `batches.collate` does. Under autocast activations are kept in its type.
    """
    if not n_layers or len(set(getattr(decoder.config, "layer_types", None) or ())) > 1:
        yield
        return
    cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
    original, layers, norm = decoder.forward, decoder.layers, decoder.norm
    lower, upper = layers[:n_layers], layers[n_layers:]

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = decoder.get_input_embeddings()(input_ids)
        if inputs_embeds.requires_grad or attention_mask is None or attention_mask.ndim != 2:
            return original(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        rows = _unpadded(inputs_embeds, attention_mask)
        keys = [hashlib.blake2b(row.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest() for row in rows]
        missing = [place for place, key in enumerate(keys) if key not in cache]
        if missing:
            decoder.layers, decoder.norm = lower, torch.nn.Identity()
            try:
                with torch.no_grad():
                    found = original(
                        inputs_embeds=inputs_embeds[missing], attention_mask=attention_mask[missing], use_cache=False
                    ).last_hidden_state
            finally:
                decoder.layers, decoder.norm = layers, norm
            dtype = (
                torch.get_autocast_dtype(found.device.type) if torch.is_autocast_enabled(found.device.type) else None
            )
            for place, row in zip(missing, _unpadded(found.to(dtype), attention_mask[missing]), strict=True):
                cache[keys[place]] = row.clone()
        for key in keys:
            cache.move_to_end(key)
        hidden = torch.zeros_like(inputs_embeds)
        for row, key in zip(hidden, keys, strict=True):
            row[len(row) - len(cache[key]) :] = cache[key]
        while sum(row.nbytes for row in cache.values()) > CACHED_BYTES:
            cache.popitem(last=False)
        decoder.layers = upper
        try:
            return original(inputs_embeds=hidden, attention_mask=attention_mask, **kwargs)
        finally:
            decoder.layers = layers

    decoder.forward = forward
    try:
        yield
    finally:
        decoder.forward = original


def _unpadded(rows: torch.Tensor, attention_mask: torch.Tensor) -> Sequence[torch.Tensor]:
    lengths = attention_mask.sum(1).tolist()
    return [row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)]
