"""Initial embedding rows of new symbols, from the teachers of a run or from image features.

Depends on the index, the untrained model and the options; independent of LoRA, optimisers and batches.
Source: centroids as start values, after GRACE's atomic classes (arXiv:2402.10805), whose rows are image embeddings;
a linear probe before fine-tuning, so that random rows do not distort features (arXiv:2202.10054).
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from llama_index_genret.models.encoder import Encoder
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

FEWEST_FITTED, MOST_FITTED, FITTED_PER_IMAGE = 2048, 8192, 16
"""Number of the text teacher's queries to which the projection is fitted: by the number of images, within bounds."""

FITTED_IMAGES = 2048
"""Maximum number of image versions to which the projection is fitted."""

VISION_TEMPERATURE = 0.07
"""Temperature of the vision teacher's distribution over images.

Among 463 emoji the shown one has a probability of .87, as integration.recall.redrawn prints.
"""


@dataclass(frozen=True)
class Teachers:
    """The teachers of a run: a text encoder for queries, the vision tower for redrawn images."""

    text: TextTeacher | None
    vision: VisionTeacher | None


def prepare_teachers(
    index: Index,
    mllm: Mllm,
    options: TrainOptions,
    encoder: Encoder | None,
    *,
    vectors: Float32 | None = None,
    held_out: Collection[str] = (),
    autocast: bool,
    show_progress: bool,
) -> Teachers:
    """Compute the embeddings of all queries and image versions that the run imitates.

    Args:
        encoder: the index's encoder. None to imitate no encoder.
        vectors: (n, d) unit vectors of the images. Default: those of the index.
        held_out: `text_key` of texts that are not imitated.
        autocast: run the vision tower in bfloat16, as in training, so that its cache holds the features of training.
    Raises:
        TrainingError: see `teach`.
    """
    bar = partial(_bar, show=show_progress)
    text = vision = None
    if encoder is not None and index.vectors is not None:
        captions = "\n".join(caption for record in index.records for caption in record.captions)
        text = teach(
            encoder,
            np.asarray(index.vectors if vectors is None else vectors, np.float32),
            [record.captions for record in index.records],
            words=[*index.tokenizer.common_words, *re.findall(r"[^\W_]+", captions.lower())],
            queries=options.imitated,
            held_out=held_out,
            temperature=options.teacher_temperature,
            seed=options.seed,
            progress=bar("Embedding queries"),
        )
    if options.redrawn:
        versions = _versions(index, options)
        with _bfloat16(mllm, autocast):
            load = partial(_load_version, index, options.seed)
            features = vision_features(mllm, versions, bar("Encoding images"), load=load)
        vision = VisionTeacher.fit(
            features.reshape(len(index.records), 1 + options.redrawn, -1), temperature=VISION_TEMPERATURE
        )
    return Teachers(text, vision)


def start_symbols(
    index: Index,
    mllm: Mllm,
    vocabularies: Sequence[Any],
    teachers: Teachers,
    options: TrainOptions,
    *,
    autocast: bool,
    show_progress: bool,
) -> None:
    """Initialise the rows of new symbols in place, from the teachers, or from image features without a teacher.

    Args:
        vocabularies: the modules with a row for each token.
        autocast: see `prepare_teachers`.
    """
    new_symbols = new_token_ids(index)
    if not new_symbols:
        return
    projection = None
    with _bfloat16(mllm, autocast):
        if teachers.text or teachers.vision:
            vectors, projection = _fit_projection(index, mllm, teachers, options, show_progress=show_progress)
        else:
            paths = [record.path for record in index.records]
            vectors = vision_features(mllm, paths, _bar("Encoding images", show=show_progress))
    identifiers = [index.token_ids(row) for row in range(len(index.records))]
    for vocabulary in vocabularies:
        start_rows(vocabulary.weight, new_symbols, identifiers, vectors, projection, seed=options.seed)


def _fit_projection(
    index: Index, mllm: Mllm, teachers: Teachers, options: TrainOptions, *, show_progress: bool
) -> tuple[Float32, Float32]:
    """Return the images' vectors (n, v), concatenated over the teachers, and the projection (v, d), both float32.

    `fitted_projection` fits the projection to the base model's hidden states at a sample of the teachers' queries. The
    target of a query is 0 in the columns of the other teachers.
    """
    draw = np.random.default_rng(options.seed)
    samples: list[tuple[Float32, Float32, Float32, float]] = []
    bar = partial(_bar, show=show_progress)
    if text := teachers.text:
        wanted = min(max(FEWEST_FITTED, FITTED_PER_IMAGE * len(index.records)), MOST_FITTED, len(text.texts))
        chosen = draw.choice(len(text.texts), wanted, replace=False)
        prompts = [index.prompts.query_tokens(index.tokenizer, text.texts[place]) for place in chosen]
        hidden = last_hidden_states(mllm, prompts, bar("Reading queries"))
        samples.append((text.images, hidden, text.queries[chosen], text.temperature))
    if vision := teachers.vision:
        versions = _versions(index, options)
        order = draw.permutation(len(versions))[:FITTED_IMAGES]
        chosen_versions = [versions[place] for place in order]
        load = partial(_load_version, index, options.seed)
        hidden = last_hidden_states_of_images(mllm, chosen_versions, bar("Reading images"), load=load)
        embeddings = np.stack([vision.versions[row, version] for row, version in chosen_versions])
        samples.append((vision.images, hidden, embeddings, vision.temperature))
    images = np.concatenate([vectors for vectors, *_ in samples], axis=1)
    targets = np.zeros((sum(len(hidden) for _, hidden, *_ in samples), images.shape[1]), np.float32)
    down = across = 0
    for _, _, embeddings, temperature in samples:
        targets[down : down + len(embeddings), across : across + embeddings.shape[1]] = embeddings / temperature
        down, across = down + len(embeddings), across + embeddings.shape[1]
    scale = float(np.sqrt(len(samples)))  # the length of a row of `images`, which `start_rows` sets to 1
    return images, fitted_projection(np.concatenate([hidden for _, hidden, *_ in samples]), targets, scale=scale)


def _versions(index: Index, options: TrainOptions) -> list[tuple[int, int]]:
    """Return the row and version number of every image version that the run memorises."""
    return [(row, version) for row in range(len(index.records)) for version in range(1 + options.redrawn)]


def _load_version(index: Index, seed: int, image_version: tuple[int, int]) -> Any:
    row, version = image_version
    return load_version(index.records[row].path, row, version, seed=seed)


def _bfloat16(mllm: Mllm, enabled: bool) -> torch.autocast:
    return torch.autocast(mllm.model.device.type, torch.bfloat16, enabled=enabled)


def _bar(description: str, *, show: bool) -> Any:
    """Return a progress bar for a loop over batches."""
    return partial(tqdm, desc=description, unit="batch", disable=not show)


NOISE = 0.2
"""Weight of noise in a row's direction, from 0 to 1."""

RIDGE = 0.01
"""Ridge penalty of `fitted_projection`, as a fraction of the mean squared feature."""


def fitted_projection(hidden: Float32, targets: Float32, *, scale: float) -> Float32:
    """Return (v, d) float32, a projection from a teacher's embeddings to rows of the LM head, by ridge regression.

        min over A of |hidden A - targets|^2 + ridge |A|^2    and then    projection = scale * A transposed

    Args:
        hidden: (n, d) inputs of the LM head at the end of n queries' prompts.
        targets: (n, v) the teacher's embeddings of these queries.
        scale: factor of the logits, 1 / temperature.
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
    """Set the rows of new symbols in place, distributed like the trained rows. Equal rows would get equal gradients.

        offset = mean over the images with the symbol: unit vector - mean of all images
        row = mean of the trained rows + (unit(random projection of the offset) + a little noise) * their deviation

    A random projection keeps the angles between offsets. The noise separates equal offsets. With a fitted projection,

        offset = mean over the images with the symbol: unit vector - mean of the images with the same prefix
        row = mean of the trained rows + offset @ projection

    If only one symbol may follow a prefix, the mean of the last prefix with several continuations is subtracted. The
    rows of symbols that occur in no identifier are noise.

    Args:
        weight: (vocabulary, d) embeddings or LM head.
        rows: token ids of the new symbols, which follow all trained ones.
        identifiers: the identifier of every image, as token ids.
        vectors: (images, v) image vectors of any scale.
        projection: (v, d) the result of `fitted_projection`, None for a random projection.
        seed: seed of the noise and the random projection.
    """
    trained = weight[: min(rows)].float()
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn((len(rows), weight.shape[1]), generator=generator) * trained.std(0).cpu()
    means, is_known = _offsets(rows, identifiers, vectors, by_choice=projection is not None)
    if projection is not None:
        offsets[is_known] = torch.from_numpy(means @ projection)[is_known]
    else:
        random_projection = torch.randn((vectors.shape[1], weight.shape[1]), generator=generator)
        projected = torch.from_numpy(means) @ random_projection
        projected *= weight.shape[1] ** 0.5 / projected.norm(dim=-1, keepdim=True)
        mixed = (1 - NOISE**2) ** 0.5 * projected * trained.std(0).cpu() + NOISE * offsets
        offsets[is_known] = mixed[is_known]
    weight[rows] = (trained.mean(0) + offsets.to(weight.device)).to(weight.dtype)


def _offsets(
    rows: Sequence[int], identifiers: Sequence[Sequence[int]], vectors: NDArray[np.float32], *, by_choice: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (rows, v) the offset of each symbol, see `start_rows`, and (rows,) whether it differs from 0.

    Args:
        by_choice: subtract the mean of the images with the same prefix, not the mean of all images.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {token_id: number for number, token_id in enumerate(rows)}
    sums, counts = np.zeros((len(rows), vectors.shape[1]), np.float32), np.zeros(len(rows), np.float32)
    nodes = [(list(range(len(identifiers))), 0, unit.mean(0))]
    while nodes:
        images, depth, parent_mean = nodes.pop()
        children: dict[int, list[int]] = {}
        for row in images:
            if depth < len(identifiers[row]):
                children.setdefault(identifiers[row][depth], []).append(row)
        mean = unit[images].mean(0) if by_choice and len(children) > 1 else parent_mean
        for symbol, own in children.items():
            nodes.append((own, depth + 1, mean))
            if symbol in place:
                sums[place[symbol]] += (unit[own] - mean).sum(0)
                counts[place[symbol]] += len(own)
    means = np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32)
    return means, np.linalg.norm(sums, axis=1) > 1e-6
