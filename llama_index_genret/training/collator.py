"""Examples as padded tensors, for any model's processor.

Image inputs are concatenated along their first dimension, whatever their names. Text is padded on the left. All targets
then end at the right edge, and the loss needs only the last few positions.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm, answer_prompt  # isort: skip  # first: it names the extra that brings torch

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llama_index_genret.errors import TrainingError
from llama_index_genret.store import Index
from llama_index_genret.training.augmentation import load_version
from llama_index_genret.training.soft_targets import Paths
from llama_index_genret.training.tasks import MOST_IMAGES, Example, show_question
from llama_index_genret.training.text_teacher import TextTeacher
from llama_index_genret.training.vision_teacher import VisionTeacher

IGNORED = -100
"""Label of a position without loss, as in transformers."""

LENGTH_STEP = 32
"""Text examples are batched by length, in steps of this many tokens."""

_SOFT = ("offsets", "soft")
_ADJUSTMENT = ("adjustment_offsets", "adjustment")

IMITATION_ADJUSTMENT = 0.5
"""Strength of the logit adjustment for soft targets, from 0 (none) to 1 (full, as for labels).

Soft targets do not depend on how often a query occurs, so that a model that distinguishes all queries needs no
adjustment. A model that does not also learns the query frequencies, and needs the full one. The value was chosen on
validation queries by integration.recall.grow: with 1 an update ranks new images too low, with 0 above the old ones.
Source: the scaled logit adjustment of Menon et al. (arXiv:2007.07314).
"""

CACHED_BYTES = 2**30
"""Maximum bytes of decoded images in memory. The images loaded first are evicted first."""


class ExampleTensors(torch.utils.data.Dataset[dict[str, Any]]):
    """The examples of a run as tensors.

    Item i has `input_ids` (t,) and `labels` (t,). A label is the token after its position, so that the last token of an
    example is no input. An example with an image also has the other outputs of the processor: image tensors, and for
    some models a type of each token (t,), from which they compute positions.

    An example with soft targets has no labels. For each of its m targets it has `offsets` (m,), the distance from the
    end, and `soft` (m, u), the probabilities of the tokens of `paths`, -1 for a token that may not follow.

    Args:
        seed: seed of the sampled images, the image versions and the images of answer examples.
        image_shares: (n,) how often each image is sampled, with any sum. An example whose target is an identifier then
            also has `adjustment_offsets` (m,) and `adjustment` (m, u), which is added to the logits. It is the log
            ratio between the frequency of a token and the fraction of images below it, times IMITATION_ADJUSTMENT for
            soft targets.
        vision_teacher: the source of soft targets for the task memorise, None to use labels.
    """

    def __init__(
        self,
        index: Index,
        mllm: Mllm,
        examples: Sequence[Example],
        teacher: TextTeacher | None = None,
        *,
        seed: int = 0,
        image_shares: NDArray[np.float64] | None = None,
        vision_teacher: VisionTeacher | None = None,
    ) -> None:
        self._index = index
        self._mllm = mllm
        self._examples = examples
        self._teacher = teacher
        self._seed = seed
        self._answers = [answer_prompt(mllm, n_images) for n_images in range(1, MOST_IMAGES + 1)]
        self._end = index.tokenizer.encode_markup(index.prompts.end)
        self.paths = Paths([(*index.token_ids(row), index.end_token) for row in range(len(index.records))])
        self._vision_teacher = vision_teacher
        self._images: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._bytes = 0
        self._image_shares = image_shares

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._examples[i]
        if example.task == "imitate":
            if self._teacher is None:
                raise TrainingError(
                    "the task 'imitate' needs a text teacher, and the run has none: give one, or drop it from the mix."
                )
            return self._soft_item(example, self._teacher.probabilities(example.row), i)
        if example.task == "memorise" and self._vision_teacher is not None:
            return self._soft_item(example, self._vision_teacher.probabilities(example.row, example.version), i)
        item, target = self._prompt(example, i), torch.tensor(self._target(example) + self._end)
        item["labels"] = torch.full_like(item["input_ids"], IGNORED)
        ends = {"input_ids": target, "labels": target}
        text = torch.zeros_like(target)  # the type of a text token
        whole = {name: torch.cat([item[name], ends.get(name, text)]) for name in _per_token(item)}
        item |= {name: tokens[1:] if name == "labels" else tokens[:-1] for name, tokens in whole.items()}
        return item | (self._logit_adjustment(example.row, len(target)) if example.target is None else {})

    def _soft_item(self, example: Example, probabilities: NDArray[np.float64], i: int) -> dict[str, Any]:
        """Sample an image from the teacher's distribution, and return the soft targets along its identifier."""
        row = int(np.random.default_rng((self._seed, i)).choice(len(probabilities), p=probabilities))
        targets = self.paths.targets(row, probabilities)
        n_symbols = targets[-1].depth + 1 if targets else 0
        soft = torch.full((len(targets), len(self.paths.token_ids)), -1.0)
        for place, target in enumerate(targets):
            soft[place, torch.from_numpy(target.columns)] = torch.from_numpy(target.probabilities)
        symbols = torch.tensor(self._index.token_ids(row)[: max(0, n_symbols - 1)], dtype=torch.long)
        item = self._prompt(example, i)
        text = torch.zeros_like(symbols)  # the type of a text token
        item |= {n: torch.cat([item[n], symbols if n == "input_ids" else text]) for n in _per_token(item)}
        item["labels"] = torch.full_like(item["input_ids"], IGNORED)
        item["offsets"] = torch.tensor([n_symbols - target.depth for target in targets], dtype=torch.long)
        return item | {"soft": soft} | self._logit_adjustment(row, n_symbols, IMITATION_ADJUSTMENT)

    def _logit_adjustment(self, row: int, n_targets: int, strength: float = 1.0) -> dict[str, torch.Tensor]:
        """Return `adjustment_offsets` and `adjustment` of an example whose target is the identifier of image `row`."""
        if self._image_shares is None:
            return {}
        weighted = self.paths.targets(row, self._image_shares)
        uniform = self.paths.targets(row, np.ones_like(self._image_shares))
        adjustment = torch.zeros(len(weighted), len(self.paths.token_ids))
        for place, (ours, theirs) in enumerate(zip(weighted, uniform, strict=True)):
            log_ratio = np.log(ours.probabilities / theirs.probabilities)
            adjustment[place, torch.from_numpy(ours.columns)] = torch.from_numpy(strength * log_ratio)
        offsets = torch.tensor([n_targets - target.depth for target in weighted]).long()
        return {"adjustment_offsets": offsets, "adjustment": adjustment}

    def _target(self, example: Example) -> list[int]:
        if example.target is None:
            return list(self._index.token_ids(example.row))
        return self._index.tokenizer.encode_text(example.target)

    def _prompt(self, example: Example, i: int) -> dict[str, Any]:
        prompts, tokenizer = self._index.prompts, self._index.tokenizer
        if example.task in ("retrieve", "imitate"):
            return {"input_ids": torch.tensor(prompts.query_tokens(tokenizer, example.text))}
        if example.task == "describe":
            return {"input_ids": torch.tensor(prompts.describe.fill(tokenizer, self._index.token_ids(example.row)))}
        if example.task == "answer":
            shown = show_question(example, self._index.records, self._seed, i)
            blank = self._answers[len(shown.rows) - 1]
            text, images = blank.before + shown.text + blank.after, [self._image(row, 0) for row in shown.rows]
        else:
            text, images = prompts.memorise, [self._image(example.row, example.version)]
        inputs = self._mllm.processor(text=[text], images=[images], return_tensors="pt")
        token_shape = inputs["input_ids"].shape
        return {k: v[0] if v.shape == token_shape else v for k, v in inputs.items() if k != "attention_mask"}

    def _image(self, row: int, version: int) -> Any:
        key = (row, version)
        if key not in self._images:
            self._images[key] = load_version(self._index.records[row].path, row, version, seed=self._seed)
            self._bytes += _bytes(self._images[key])
            while self._bytes > CACHED_BYTES and len(self._images) > 1:
                self._bytes -= _bytes(self._images.popitem(last=False)[1])
        return self._images[key]


def _bytes(image: Any) -> int:
    return int(image.width * image.height * len(image.getbands()))


def collate(items: Sequence[dict[str, Any]], *, pad: int) -> dict[str, dict[str, torch.Tensor]]:
    """Group items by length into padded batches, because padding costs as much as text.

    Images are batched separately, by the shapes of their tensors: some models have an axis for the images of a text.

    A batch with soft targets also has `soft` (m, u), `soft_rows` (m,) and `offsets` (m,) of all its rows. A batch with
    logit adjustment has `adjustment` (m, u), `adjustment_rows` (m,) and `adjustment_offsets` (m,).

    Args:
        pad: token id of the padding.
    Returns:
        The batches by group.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        shapes = [tuple(item[name].shape[1:]) for name in _image_tensors(item)]
        name = f"image {shapes}" if shapes else f"text {len(item['input_ids']) // LENGTH_STEP}"
        groups.setdefault(name, []).append(item)
    return {
        name: _pad_batch(group, pad)
        | _concatenate_optional(group, _SOFT, "soft_rows")
        | _concatenate_optional(group, _ADJUSTMENT, "adjustment_rows")
        for name, group in groups.items()
    }


def _concatenate_optional(
    items: Sequence[dict[str, Any]], names: Sequence[str], rows_name: str
) -> dict[str, torch.Tensor]:
    """Concatenate tensors that only some items have, and add their rows (m,) in the batch."""
    rows = [(row, item) for row, item in enumerate(items) if names[0] in item]
    if not rows:
        return {}
    tensors = {name: torch.cat([item[name] for _, item in rows]) for name in names}
    return tensors | {rows_name: torch.cat([torch.full_like(item[names[0]], row) for row, item in rows])}


def _pad_batch(items: Sequence[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Return left-padded token tensors (rows, t) with an `attention_mask`, and the images of all items in order."""
    length = max(len(item["input_ids"]) for item in items)

    def pad_left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.cat([row.new_full((length - len(row),), value), row]) for row in rows])

    fill = {"input_ids": pad, "labels": IGNORED}
    token_names = [name for name in _per_token(items[0]) if name not in (*_SOFT, *_ADJUSTMENT)]
    batch = {name: pad_left([item[name] for item in items], fill.get(name, 0)) for name in token_names}
    batch["attention_mask"] = pad_left([torch.ones_like(item["input_ids"]) for item in items], 0)
    return batch | {name: torch.cat([item[name] for item in items]) for name in _image_tensors(items[0])}


def _image_tensors(item: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors of an item's images."""
    return [name for name in item if name not in (*_per_token(item), *_SOFT, *_ADJUSTMENT)]


def _per_token(item: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of an item's tensors that have one entry per token."""
    return [name for name, tensor in item.items() if tensor.shape == item["input_ids"].shape]
