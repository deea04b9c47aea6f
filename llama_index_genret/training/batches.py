"""Examples as padded tensors, for any model's processor.

Image inputs are concatenated along their first dimension whatever their names; text is padded on the left, so that
all targets end at the right edge and the loss needs the last few positions only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_index_genret.images import load_image
from llama_index_genret.modeling import Mllm
from llama_index_genret.store import Index
from llama_index_genret.training.examples import Example, Interleaved

IGNORED = -100
"""Label of a position without loss, as in transformers."""

CACHED_IMAGES = 1024
"""Processed images kept in memory."""


class ExampleTensors(torch.utils.data.Dataset[dict[str, Any]]):
    """Item i: `input_ids` (t,), `labels` (t,) and, of an example with an image, what else the processor gives.

    That is image tensors, and for some models a kind of each token (t,), by which they count positions.
    """

    def __init__(self, index: Index, mllm: Mllm, examples: Interleaved) -> None:
        self._index = index
        self._mllm = mllm
        self._examples = examples
        self._end = index.tokenizer.encode_markup(index.prompts.end)
        self._images: OrderedDict[Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._examples[i]
        item, target = self._prompt(example), torch.tensor(self._target(example) + self._end)
        item["labels"] = torch.full_like(item["input_ids"], IGNORED)
        ends = {"input_ids": target, "labels": target}
        text = torch.zeros_like(target)  # the kind of a token that is text
        return item | {name: torch.cat([item[name], ends.get(name, text)]) for name in _per_token(item)}

    def _target(self, example: Example) -> list[int]:
        if example.target is None:
            return list(self._index.token_ids(example.row))
        return self._index.tokenizer.encode_text(example.target)

    def _prompt(self, example: Example) -> dict[str, Any]:
        prompts, tokenizer = self._index.prompts, self._index.tokenizer
        if example.task == "retrieve":
            return {"input_ids": torch.tensor(prompts.query_tokens(tokenizer, example.text))}
        if example.task == "describe":
            return {"input_ids": torch.tensor(prompts.describe.fill(tokenizer, self._index.token_ids(example.row)))}
        text = prompts.memorise
        if example.task == "answer":
            text = prompts.answer.before + example.text + prompts.answer.after
        image = self._image(self._index.records[example.row].path)
        inputs = self._mllm.processor(text=[text], images=[[image]], return_tensors="pt")
        of_tokens = inputs["input_ids"].shape
        return {k: v[0] if v.shape == of_tokens else v for k, v in inputs.items() if k != "attention_mask"}

    def _image(self, path: Path) -> Any:
        if path not in self._images:
            self._images[path] = load_image(path)
            if len(self._images) > CACHED_IMAGES:
                self._images.popitem(last=False)
        return self._images[path]


def collate(items: Sequence[dict[str, Any]], *, pad: int) -> dict[str, dict[str, torch.Tensor]]:
    """One batch for the examples with an image and one for those without: the latter are half as long."""
    parts = {
        "image": [item for item in items if len(item) > 2],
        "text": [item for item in items if len(item) == 2],
    }
    return {name: _padded(part, pad) for name, part in parts.items() if part}


def _padded(items: Sequence[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Left-padded tensors of tokens (rows, t), `attention_mask` among them, and the images of all items in order."""
    length = max(len(item["input_ids"]) for item in items)

    def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.cat([row.new_full((length - len(row),), value), row]) for row in rows])

    fill = {"input_ids": pad, "labels": IGNORED}
    of_tokens = _per_token(items[0])
    batch = {name: padded([item[name] for item in items], fill.get(name, 0)) for name in of_tokens}
    batch["attention_mask"] = padded([torch.ones_like(item["input_ids"]) for item in items], 0)
    return batch | {name: torch.cat([item[name] for item in items]) for name in items[0] if name not in of_tokens}


def _per_token(item: dict[str, torch.Tensor]) -> list[str]:
    """The names of an item's tensors that have one entry a token."""
    return [name for name, tensor in item.items() if tensor.shape == item["input_ids"].shape]
