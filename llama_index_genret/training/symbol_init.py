"""Initial embedding rows of new symbols, from the teachers of a run or from image features.

Depends on the index, the untrained model and the options; independent of LoRA, optimisers and batches.
Source: centroids as start values, after GRACE's atomic classes (arXiv:2402.10805), whose rows are image embeddings;
a linear probe before fine-tuning, so that random rows do not distort features (arXiv:2202.10054).
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from llama_index_genret.models.features import (
    last_hidden_states,
    last_hidden_states_of_images,
    vision_features,
)
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.training.augmentation import load_version
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.text_teacher import TextTeacher, teach
from llama_index_genret.training.vision_teacher import VisionTeacher

Float32 = NDArray[np.float32]

FITTED_QUERIES = 8192
"""Of the text teacher's, at which the base model is read to start the symbols' rows."""

FITTED_PICTURES = 2048
"""Redrawn ones, for the same."""

VISION_TEMPERATURE = 0.07
"""Of the distribution over images by their looks. Among 463 emoji .87 of it is on the one that is shown, as
integration.recall.looks prints."""


@dataclass(frozen=True)
class Teachers:
    """What is imitated: a text encoder of queries, the vision tower of redrawn pictures."""

    of_text: TextTeacher | None
    of_pictures: VisionTeacher | None


def teachers(index: Index, mllm: Mllm, options: TrainOptions, *, autocast: bool, show_progress: bool) -> Teachers:
    """Ask them all that they will be asked.

    Args:
        autocast: the tower computes in bfloat16, as it will while training, so that a cached one sees a picture once.
    Raises:
        TrainingError: see `teach`. MissingExtra: sentence-transformers is missing.
    """
    bar = partial(_bar, show=show_progress)
    of_text = of_pictures = None
    if options.teacher is not None:
        told = "\n".join(caption for record in index.records for caption in record.captions)
        of_text = teach(
            options.teacher,
            [record.captions for record in index.records],
            words=[*index.tokenizer.common_words, *re.findall(r"[^\W_]+", told.lower())],
            queries=options.imitated,
            temperature=options.teacher_temperature,
            seed=options.seed,
            device=str(mllm.model.device),
            progress=bar("Asking the teacher"),
        )
    if options.redrawn:
        versions = _versions(index, options)
        with _bfloat16(mllm, autocast):
            features = vision_features(mllm, versions, bar("Looking"), load=partial(_drawn, index, options.seed))
        of_pictures = VisionTeacher.fit(
            features.reshape(len(index.records), 1 + options.redrawn, -1), temperature=VISION_TEMPERATURE
        )
    return Teachers(of_text, of_pictures)


def start_symbols(
    index: Index,
    mllm: Mllm,
    vocabularies: Sequence[Any],
    asked: Teachers,
    options: TrainOptions,
    *,
    autocast: bool,
    show_progress: bool,
) -> None:
    """Give the rows of new symbols their start values, in place: by the teachers, or without any by image features.

    Args:
        vocabularies: the modules with a row for each token.
        autocast: see `teachers`.
    """
    new_symbols = new_token_ids(index)
    if not new_symbols:
        return
    projection = None
    with _bfloat16(mllm, autocast):
        if asked.of_text or asked.of_pictures:
            vectors, projection = _fitted(index, mllm, asked, options, show_progress=show_progress)
        else:
            paths = [record.path for record in index.records]
            vectors = vision_features(mllm, paths, _bar("Looking", show=show_progress))
    identifiers = [index.token_ids(row) for row in range(len(index.records))]
    for vocabulary in vocabularies:
        start_rows(vocabulary.weight, new_symbols, identifiers, vectors, projection, seed=options.seed)


def _fitted(
    index: Index, mllm: Mllm, asked: Teachers, options: TrainOptions, *, show_progress: bool
) -> tuple[Float32, Float32]:
    """Vectors (n, v) of the images by all teachers side by side, and what reads hidden states as such (v, d).

    From the base model's hidden states at a sample of the teachers' queries: see `fitted_projection`. To a query of one
    teacher the others say nothing.
    """
    draw = np.random.default_rng(options.seed)
    read: list[tuple[Float32, Float32, Float32, float]] = []
    bar = partial(_bar, show=show_progress)
    if text := asked.of_text:
        chosen = draw.choice(len(text.texts), min(FITTED_QUERIES, len(text.texts)), replace=False)
        prompts = [index.prompts.query_tokens(index.tokenizer, text.texts[place]) for place in chosen]
        hidden = last_hidden_states(mllm, prompts, bar("Reading"))
        read.append((text.images, hidden, text.queries[chosen], text.temperature))
    if looks := asked.of_pictures:
        versions = _versions(index, options)
        order = draw.permutation(len(versions))[:FITTED_PICTURES]
        chosen_versions = [versions[place] for place in order]
        drawn = partial(_drawn, index, options.seed)
        hidden = last_hidden_states_of_images(mllm, chosen_versions, bar("Seeing"), load=drawn)
        shown = np.stack([looks.versions[row, version] for row, version in chosen_versions])
        read.append((looks.images, hidden, shown, looks.temperature))
    images = np.concatenate([vectors for vectors, *_ in read], axis=1)
    targets = np.zeros((sum(len(hidden) for _, hidden, *_ in read), images.shape[1]), np.float32)
    down = across = 0
    for _, _, said, temperature in read:
        targets[down : down + len(said), across : across + said.shape[1]] = said / temperature
        down, across = down + len(said), across + said.shape[1]
    scale = float(np.sqrt(len(read)))  # as long as the parts of `images` are, before `start_rows` makes it of length 1
    return images, fitted_projection(np.concatenate([hidden for _, hidden, *_ in read]), targets, scale=scale)


def _versions(index: Index, options: TrainOptions) -> list[tuple[int, int]]:
    """All pictures that are memorised: the image's row, and which version."""
    return [(row, version) for row in range(len(index.records)) for version in range(1 + options.redrawn)]


def _drawn(index: Index, seed: int, picture: tuple[int, int]) -> Any:
    row, version = picture
    return load_version(index.records[row].path, row, version, seed=seed)


def _bfloat16(mllm: Mllm, enabled: bool) -> torch.autocast:
    return torch.autocast(mllm.model.device.type, torch.bfloat16, enabled=enabled)


def _bar(what: str, *, show: bool) -> Any:
    """Of a loop over batches."""
    return partial(tqdm, desc=what, unit="batch", disable=not show)


NOISE = 0.2
"""Share of noise in a row's direction."""

RIDGE = 0.01
"""Of `fitted_projection`, as a share of the mean squared feature."""


def fitted_projection(hidden: Float32, targets: Float32, *, scale: float) -> Float32:
    """(v, d): reads hidden states as a teacher's embeddings, so that a row may start at what its images' vectors say.

        min over A of |hidden A - targets|^2 + ridge |A|^2    and then    projection = scale * A transposed

    Args:
        hidden: (n, d) what the LM head reads at the end of n queries' prompts; targets: (n, v) the queries by the
            teacher; scale: of the logits, 1 / temperature.
    """
    spread = np.maximum(hidden.std(0), 1e-6)
    features = (hidden / spread).astype(np.float64)
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += RIDGE * len(features)
    solution = np.linalg.solve(gram, features.T @ (targets - targets.mean(0)))
    return np.asarray(scale * (solution / spread[:, None]).T, np.float32)


@torch.no_grad()
def start_rows(
    weight: torch.Tensor,
    rows: Sequence[int],
    identifiers: Sequence[Sequence[int]],
    vectors: Float32,
    projection: Float32 | None = None,
    *,
    seed: int,
) -> None:
    """Give new symbols rows that are spread like the trained ones, in place: equal rows learn nothing apart.

        offset = mean over the images that bear the symbol: unit vector - mean of all images
        row = mean of the trained rows + (unit(random projection of the offset) + a little noise) * their deviation

    A random projection keeps the angles between offsets; the noise parts those of equal images. With a fitted one,

        offset = mean over the images that bear the symbol: unit vector - mean of those that it is chosen among
        row = mean of the trained rows + offset @ projection

    where the images that a symbol is chosen among share those before it, or if it is the only one that may follow, are
    those of the last choice. Symbols that no image bears start as noise.

    Args:
        weight: (vocabulary, d) embeddings or LM head; rows: token ids of the new symbols, after all trained ones.
        identifiers: of every image, token ids. vectors: (images, v) of any scale. projection: (v, d), see
            `fitted_projection`.
    """
    trained = weight[: min(rows)].float()
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn((len(rows), weight.shape[1]), generator=generator) * trained.std(0).cpu()
    said, borne = _offsets(rows, identifiers, vectors, by_choice=projection is not None)
    if projection is not None:
        offsets[borne] = torch.from_numpy(said @ projection)[borne]
    else:
        chance = torch.randn((vectors.shape[1], weight.shape[1]), generator=generator)
        projected = torch.from_numpy(said) @ chance
        projected *= weight.shape[1] ** 0.5 / projected.norm(dim=-1, keepdim=True)
        offsets[borne] = ((1 - NOISE**2) ** 0.5 * projected * trained.std(0).cpu() + NOISE * offsets)[borne]
    weight[rows] = (trained.mean(0) + offsets.to(weight.device)).to(weight.dtype)


def _offsets(
    rows: Sequence[int], identifiers: Sequence[Sequence[int]], vectors: NDArray[np.float32], *, by_choice: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(rows, v) what each symbol says of its images, see `start_rows`, and (rows,) whether it is more than nothing.

    Args:
        by_choice: less the mean of those that it is chosen among, not of all images.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {token_id: number for number, token_id in enumerate(rows)}
    sums, bearers = np.zeros((len(rows), vectors.shape[1]), np.float32), np.zeros(len(rows), np.float32)
    nodes = [(list(range(len(identifiers))), 0, unit.mean(0))]
    while nodes:
        images, depth, last = nodes.pop()
        children: dict[int, list[int]] = {}
        for row in images:
            if depth < len(identifiers[row]):
                children.setdefault(identifiers[row][depth], []).append(row)
        among = unit[images].mean(0) if by_choice and len(children) > 1 else last
        for symbol, own in children.items():
            nodes.append((own, depth + 1, among))
            if symbol in place:
                sums[place[symbol]] += (unit[own] - among).sum(0)
                bearers[place[symbol]] += len(own)
    means = np.asarray(sums / np.maximum(bearers, 1)[:, None], np.float32)
    return means, np.linalg.norm(sums, axis=1) > 1e-6
