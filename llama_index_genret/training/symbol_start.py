"""The teachers of a run, and the rows of new symbols as they say.

Knows the index, the untrained model and the options; nothing of LoRA, optimisers or batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from llama_index_genret.errors import TrainingError
from llama_index_genret.modeling import Mllm, last_hidden_states, last_hidden_states_of_pictures, vision_features
from llama_index_genret.store import Index
from llama_index_genret.training.looks import Looks
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.redrawing import load_version
from llama_index_genret.training.symbol_rows import first_places, fitted_projection, start_rows
from llama_index_genret.training.teacher import Teacher, teach

Float32 = NDArray[np.float32]

FITTED_QUERIES = 8192
"""Of the text teacher's, at which the base model is read to start the symbols' rows, once for each of their places."""

FITTED_PICTURES = 2048
"""Redrawn ones, for the same."""

FEWEST_QUERIES = 0.1
"""Share of them that reach a place which is read by itself, not as the one before: few images need a last symbol."""

LOOKS_TEMPERATURE = 0.07
"""Of the distribution over images by their looks. Among 463 emoji .87 of it is on the one that is shown, as
integration.recall.looks prints."""


@dataclass(frozen=True)
class Teachers:
    """What is imitated: a text encoder of queries, the vision tower of redrawn pictures."""

    of_text: Teacher | None
    of_pictures: Looks | None


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
        of_pictures = Looks.learnt(
            features.reshape(len(index.records), 1 + options.redrawn, -1), temperature=LOOKS_TEMPERATURE
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
    """Give the rows of new symbols their start values, in place.

    Args:
        vocabularies: the modules with a row for each token.
        autocast: see `teachers`.
    Raises:
        TrainingError: they are to start at what a teacher says, and none was asked.
    """
    new_symbols = index.new_token_ids()
    if not new_symbols:
        return
    identifiers = [index.token_ids(row) for row in range(len(index.records))]
    start = partial(start_rows, rows=new_symbols, identifiers=identifiers, seed=options.seed)
    with _bfloat16(mllm, autocast):
        if options.symbol_start == "teacher":
            samples = _samples(index, mllm, asked, options, show_progress=show_progress)
            images = np.concatenate([sample.images for sample in samples], axis=1)
            projections: list[Float32] = []
            for place in range(1 + int(first_places(new_symbols, identifiers).max())):
                lengths = np.array([len(identifiers[row]) for sample in samples for row in sample.meant])
                if (lengths > place).mean() < FEWEST_QUERIES:
                    break
                projections.append(_fitted(samples, identifiers, place))
                for vocabulary in vocabularies:  # what follows them is read after they have their rows
                    start(vocabulary.weight, vectors=images, projections=projections)
            return
        vectors = None
        if options.symbol_start == "images":
            paths = [record.path for record in index.records]
            vectors = vision_features(mllm, paths, _bar("Looking", show=show_progress))
    for vocabulary in vocabularies:
        start(vocabulary.weight, vectors=vectors)


@dataclass(frozen=True)
class _Sample:
    """Of one teacher's queries, what it says of them and how the base model reads them.

    images: (n, v) where it sees the images; said: (q, v) where it sees the queries, over its temperature.
    meant: of each query, the row of the image that it means most.
    read: some queries, and tokens that follow the prompt of each -> (of them, d) the base model's hidden states there.
    """

    images: Float32
    said: Float32
    meant: Sequence[int]
    read: Callable[[Sequence[int], Sequence[Sequence[int]]], Float32]


def _samples(index: Index, mllm: Mllm, asked: Teachers, options: TrainOptions, *, show_progress: bool) -> list[_Sample]:
    draw, found = np.random.default_rng(options.seed), []
    bar = partial(_bar, show=show_progress)
    if text := asked.of_text:
        chosen = draw.choice(len(text.texts), min(FITTED_QUERIES, len(text.texts)), replace=False)
        prompts = [index.prompts.query_tokens(index.tokenizer, text.texts[place]) for place in chosen]

        def read(queries: Sequence[int], rests: Sequence[Sequence[int]]) -> Float32:
            followed = [[*prompts[query], *rest] for query, rest in zip(queries, rests, strict=True)]
            return last_hidden_states(mllm, followed, bar("Reading"))

        meant = text.meant()
        said = np.asarray(text.queries[chosen] / text.temperature, np.float32)
        found.append(_Sample(text.images, said, [meant[place] for place in chosen], read))
    if looks := asked.of_pictures:
        versions = _versions(index, options)
        pictures = [versions[place] for place in draw.permutation(len(versions))[:FITTED_PICTURES]]
        drawn = partial(_drawn, index, options.seed)

        def see(queries: Sequence[int], rests: Sequence[Sequence[int]]) -> Float32:
            asked_with = [pictures[query] for query in queries]
            return last_hidden_states_of_pictures(mllm, asked_with, bar("Seeing"), load=drawn, rests=rests)

        shown = np.stack([looks.versions[row, version] for row, version in pictures])
        said = np.asarray(shown / looks.temperature, np.float32)
        found.append(_Sample(looks.images, said, [row for row, _ in pictures], see))
    if not found:
        raise TrainingError(
            "symbol_start='teacher' starts at what a teacher says of the images: name one of captions (--teacher), or "
            "have pictures redrawn (--redrawn)."
        )
    return found


def _fitted(samples: Sequence[_Sample], identifiers: Sequence[Sequence[int]], place: int) -> Float32:
    """(v, d) what reads hidden states after `place` symbols as all teachers see them, side by side.

    See `fitted_projection`. Of the queries that mean an image with a longer name, each after the first symbols of that;
    to a query of one teacher the others say nothing.
    """
    hidden, targets, across = [], [], 0
    for sample in samples:
        queries = [query for query, row in enumerate(sample.meant) if len(identifiers[row]) > place]
        width, all_widths = sample.said.shape[1], sum(other.said.shape[1] for other in samples)
        if queries:
            hidden.append(sample.read(queries, [identifiers[sample.meant[query]][:place] for query in queries]))
            targets.append(np.pad(sample.said[queries], ((0, 0), (across, all_widths - across - width))))
        across += width
    scale = float(np.sqrt(len(samples)))  # the length of the images side by side, which `start_rows` makes 1
    return fitted_projection(np.concatenate(hidden), np.concatenate(targets), scale=scale)


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
