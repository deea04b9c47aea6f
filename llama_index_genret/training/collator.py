"""Examples as padded tensors, for any model's processor.

Image inputs are concatenated along their first dimension whatever their names; text is padded on the left, so that
all targets end at the right edge and the loss needs the last few positions only.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

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
from llama_index_genret.training.tasks import Example
from llama_index_genret.training.text_teacher import TextTeacher
from llama_index_genret.training.vision_teacher import VisionTeacher

IGNORED = -100
"""Label of a position without loss, as in transformers."""

ALIKE = 32
"""Text examples whose lengths share this multiple make one batch: about a block of a prompt."""

_SOFT = ("offsets", "soft")
_DRAWN = ("drawn_offsets", "drawn")

IMITATED_PART = 0.5
"""Of the logarithm by which images are drawn more often, how much is left out where a teacher is imitated.

A teacher says the same of a query however often it is asked: a model that tells all queries apart needs none of it. One
that does not learns how often they come, too, and needs all. Chosen on validation queries by integration.recall.grow:
with all of it an update hides the new images, with none it puts them before the old ones.
Source of such a part: the logit adjustment of Menon et al. (arXiv:2007.07314).
"""

CACHED_BYTES = 2**30
"""Pixels of images kept in memory. The oldest make room."""


class ExampleTensors(torch.utils.data.Dataset[dict[str, Any]]):
    """Item i: `input_ids` (t,), `labels` (t,) and, of an example with an image, what else the processor gives.

    A label is what stands after its token; the last token of an example is read nowhere.

    That is image tensors, and for some models a kind of each token (t,), by which they count positions. An example
    that imitates the teacher has no labels, but for each of its m last tokens that are to be predicted `offsets` (m,),
    how far from the end it stands, and `soft` (m, u), probabilities of the tokens of `paths`, -1 where one may not be.

    Args:
        looks: imitated where a picture is to be memorised.
        drawn: (n,) how often each image is what an example is about, of any sum. Then what is to answer with an
            identifier also has `drawn_offsets` (m,) and `drawn` (m, u), to be added to the logits: the logarithm of how
            much more often a token comes there than by the number of images below it, or IMITATED_PART of it.
    """

    def __init__(
        self,
        index: Index,
        mllm: Mllm,
        examples: Sequence[Example],
        teacher: TextTeacher | None = None,
        *,
        seed: int = 0,
        drawn: NDArray[np.float64] | None = None,
        looks: VisionTeacher | None = None,
    ) -> None:
        self._index = index
        self._mllm = mllm
        self._examples = examples
        self._teacher = teacher
        self._seed = seed
        self._end = index.tokenizer.encode_markup(index.prompts.end)
        self.paths = Paths([(*index.token_ids(row), index.end_token) for row in range(len(index.records))])
        self._looks = looks
        self._images: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._bytes = 0
        self._drawn = drawn

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._examples[i]
        if example.task == "imitate":
            if self._teacher is None:
                raise TrainingError("examples of the task 'imitate' need a teacher.")
            return self._imitating(example, self._teacher.probabilities(example.row), i)
        if example.task == "memorise" and self._looks is not None:
            return self._imitating(example, self._looks.probabilities(example.row, example.version), i)
        item, target = self._prompt(example), torch.tensor(self._target(example) + self._end)
        item["labels"] = torch.full_like(item["input_ids"], IGNORED)
        ends = {"input_ids": target, "labels": target}
        text = torch.zeros_like(target)  # the kind of a token that is text
        whole = {name: torch.cat([item[name], ends.get(name, text)]) for name in _per_token(item)}
        item |= {name: tokens[1:] if name == "labels" else tokens[:-1] for name, tokens in whole.items()}
        return item | (self._more_often(example.row, len(target)) if example.target is None else {})

    def _imitating(self, example: Example, probabilities: NDArray[np.float64], i: int) -> dict[str, Any]:
        """An image is drawn as the teacher would; at each of its symbols, all that may stand there are weighed."""
        row = int(np.random.default_rng((self._seed, i)).choice(len(probabilities), p=probabilities))
        targets = self.paths.targets(row, probabilities)
        n_symbols = targets[-1].depth + 1 if targets else 0
        soft = torch.full((len(targets), len(self.paths.token_ids)), -1.0)
        for place, target in enumerate(targets):
            soft[place, torch.from_numpy(target.columns)] = torch.from_numpy(target.probabilities)
        symbols = torch.tensor(self._index.token_ids(row)[: max(0, n_symbols - 1)], dtype=torch.long)
        item = self._prompt(example)
        text = torch.zeros_like(symbols)  # the kind of a token that is text
        item |= {n: torch.cat([item[n], symbols if n == "input_ids" else text]) for n in _per_token(item)}
        item["labels"] = torch.full_like(item["input_ids"], IGNORED)
        item["offsets"] = torch.tensor([n_symbols - target.depth for target in targets], dtype=torch.long)
        return item | {"soft": soft} | self._more_often(row, n_symbols, IMITATED_PART)

    def _more_often(self, row: int, n_targets: int, part: float = 1.0) -> dict[str, torch.Tensor]:
        """`drawn_offsets` and `drawn`, or a `part` of it, of an example that is to answer with image `row`."""
        if self._drawn is None:
            return {}
        drawn = self.paths.targets(row, self._drawn)
        evenly = self.paths.targets(row, np.ones_like(self._drawn))
        more = torch.zeros(len(drawn), len(self.paths.token_ids))
        for place, (ours, theirs) in enumerate(zip(drawn, evenly, strict=True)):
            times = np.log(ours.probabilities / theirs.probabilities)
            more[place, torch.from_numpy(ours.columns)] = torch.from_numpy(part * times)
        return {"drawn_offsets": torch.tensor([n_targets - target.depth for target in drawn]).long(), "drawn": more}

    def _target(self, example: Example) -> list[int]:
        if example.target is None:
            return list(self._index.token_ids(example.row))
        return self._index.tokenizer.encode_text(example.target)

    def _prompt(self, example: Example) -> dict[str, Any]:
        prompts, tokenizer = self._index.prompts, self._index.tokenizer
        if example.task in ("retrieve", "imitate"):
            return {"input_ids": torch.tensor(prompts.query_tokens(tokenizer, example.text))}
        if example.task == "describe":
            return {"input_ids": torch.tensor(prompts.describe.fill(tokenizer, self._index.token_ids(example.row)))}
        if example.task == "remember":
            asked = prompts.about_identifier(tokenizer, self._index.token_ids(example.row), example.text)
            return {"input_ids": torch.tensor(asked.token_ids)}
        text = prompts.memorise
        if example.task == "answer":
            text = prompts.answer.before + example.text + prompts.answer.after
        image = self._image(example.row, example.version)
        inputs = self._mllm.processor(text=[text], images=[[image]], return_tensors="pt")
        of_tokens = inputs["input_ids"].shape
        return {k: v[0] if v.shape == of_tokens else v for k, v in inputs.items() if k != "attention_mask"}

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
    """Batches of items of about the same length, those with an image apart: padding costs as much as text.

    Where some are to be imitated, a batch also has `soft` (m, u) of all its rows, `soft_rows` and `offsets` (m,); where
    some images are drawn more often, `drawn` (m, u), `drawn_rows` and `drawn_offsets` (m,).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        has_image = not item.keys() <= {"input_ids", "labels", *_SOFT, *_DRAWN}
        groups.setdefault("image" if has_image else f"text {len(item['input_ids']) // ALIKE}", []).append(item)
    return {
        name: _pad_batch(group, pad) | _of_rows(group, _SOFT, "soft_rows") | _of_rows(group, _DRAWN, "drawn_rows")
        for name, group in groups.items()
    }


def _of_rows(items: Sequence[dict[str, Any]], names: Sequence[str], rows_name: str) -> dict[str, torch.Tensor]:
    """What only some items have, end to end, and the rows (m,) in the batch that it is of."""
    rows = [(row, item) for row, item in enumerate(items) if names[0] in item]
    if not rows:
        return {}
    together = {name: torch.cat([item[name] for _, item in rows]) for name in names}
    return together | {rows_name: torch.cat([torch.full_like(item[names[0]], row) for row, item in rows])}


def _pad_batch(items: Sequence[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Left-padded tensors of tokens (rows, t), `attention_mask` among them, and the images of all items in order."""
    length = max(len(item["input_ids"]) for item in items)

    def pad_left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.cat([row.new_full((length - len(row),), value), row]) for row in rows])

    fill = {"input_ids": pad, "labels": IGNORED}
    of_tokens = [name for name in _per_token(items[0]) if name not in (*_SOFT, *_DRAWN)]
    batch = {name: pad_left([item[name] for item in items], fill.get(name, 0)) for name in of_tokens}
    batch["attention_mask"] = pad_left([torch.ones_like(item["input_ids"]) for item in items], 0)
    other = [name for name in items[0] if name not in (*of_tokens, *_SOFT, *_DRAWN)]
    return batch | {name: torch.cat([item[name] for item in items]) for name in other}


def _per_token(item: dict[str, torch.Tensor]) -> list[str]:
    """The names of an item's tensors that have one entry a token."""
    return [name for name, tensor in item.items() if tensor.shape == item["input_ids"].shape]
