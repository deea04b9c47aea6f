"""Rows for the symbols of images that join a trained index: guessed from their captions, or from how they look.

    direction = (features - mean of the features) @ weights
    row = mean of the trained rows + direction, made as long as those of trained rows are in the mean

`weights` are fitted by ridge regression on images of the training, whose rows are known. So a new image has a row like
those of images like it, and is recalled by what is asked of them, until it is trained itself. A ridge gives short rows,
which longer ones outdo whatever is asked: as predicted, no added image is found; at full length, many are
(integration.recall.grow measures it).

Features are the vectors of the captions by a text encoder, where there is one and an image has captions: what is asked
is text, and finds more new images so, if fewer than trained ones. Else those of the vision tower.

IncDSI (arXiv:2307.10323) also adds one row to trained atomic identifiers, and leaves all else as it is. It solves for
that row under constraints: the new document's own queries must find it, and old queries must not. That takes queries
of the new document, and those of all old ones at hand. Here only the image is needed; what the row is worth comes
from the images that were trained, and nothing keeps it from outranking one of them for an old query.

Knows pictures, captions, identifiers as token ids, and the files of adapters; nothing of training.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import IdentifierError
from llama_index_genret.models.encoder import TextEncoder, embed_by_captions
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, Progress
from llama_index_genret.store import Index, NewRows
from llama_index_genret.store.model_state import adapter_folder, stored_new_rows

MAX_SAMPLE = 2048
"""Images of the training, at most, on which the regression is fitted."""

PENALTY = 0.3
"""Of the ridge, in mean eigenvalues of the features' covariance: with 1, directions of that variance shrink by half."""

Float32 = NDArray[np.float32]
TrainedRows = dict[str, dict[int, Float32]]


@dataclass(frozen=True)
class RowRegression:
    """From features to rows. All float32.

    mean_features: (v,); mean_rows: (d,); weights: (v, d). length: (1,) mean distance of the rows from their mean.
    """

    mean_features: Float32
    mean_rows: Float32
    weights: Float32
    length: Float32

    @classmethod
    def fit(cls, features: Float32, rows: Float32, *, penalty: float = PENALTY) -> RowRegression:
        """Ridge regression of `rows` (n, d) on `features` (n, v), both centred; n is at least 1.

        weights = argmin |x @ weights - y|^2 + penalty * mean eigenvalue of x.T @ x * |weights|^2
        """
        mean_features, mean_rows = features.mean(0), rows.mean(0)
        x, y = (features - mean_features).astype(np.float64), (rows - mean_rows).astype(np.float64)
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] += penalty * gram.trace() / len(gram) + 1e-12
        weights = np.linalg.solve(gram, x.T @ y)
        length = np.linalg.norm(y, axis=1).mean(keepdims=True)
        return cls(mean_features, mean_rows, weights.astype(np.float32), length.astype(np.float32))

    def predict(self, features: Float32) -> Float32:
        """(n, d) the rows of least error for features (n, v)."""
        return np.asarray(self.mean_rows + (features - self.mean_features) @ self.weights, np.float32)

    def guess(self, features: Float32) -> Float32:
        """(n, d) rows in the direction of `predict`, as long as trained ones; the mean row where there is none."""
        directions = self.predict(features) - self.mean_rows
        norms = np.linalg.norm(directions, axis=1, keepdims=True)
        return np.asarray(self.mean_rows + directions * (self.length / np.maximum(norms, 1e-12)), np.float32)


def guess_rows(
    index: Index,
    records: Sequence[Record],
    identifiers: Sequence[Sequence[int]],
    token_ids: Sequence[int],
    mllm: Mllm,
    *,
    teacher: TextEncoder | None = None,
    seed: int = 0,
    progress: Progress = iter,
) -> NewRows:
    """Rows for symbols that the trained weights of `index` lack, beside those that it has guessed before.

    A symbol's features are the mean of those of the images that bear it; one that none bears gets the mean row. The
    regression is fitted once, on at most MAX_SAMPLE images drawn by `seed`, and stored: it is that of `genret train`'s
    weights, whatever update is on top.

    Args:
        records, identifiers: images that join, and their names as token ids. token_ids: the symbols that join.
        mllm: the base model. teacher: for the symbols of images with captions.
    Raises:
        IdentifierError: no image of the training is left to learn from.
    """
    before = stored_new_rows(index)
    known = before or NewRows(np.zeros(0, np.int64), {}, {})
    of_pictures, of_captions = _regressions(known.regressions), _regressions(known.of_captions)
    guessed: dict[str, dict[int, Float32]] = {}
    told = [place for place, record in enumerate(records) if teacher and record.captions]
    if teacher and told:
        if not of_captions or known.teacher != teacher.name:
            of_captions = _fit_on_captions(index, teacher, seed=seed)
        named = [identifiers[place] for place in told]
        borne = sorted(set(itertools.chain(*named)) & set(token_ids))
        placed, _ = embed_by_captions(teacher, [records[place].captions for place in told])
        guessed = _guess(of_captions, borne, named, placed)
    if not guessed or not next(iter(guessed.values())).keys() >= set(token_ids):
        of_pictures = of_pictures or _fit_on_images(index, mllm, seed=seed, progress=progress)
        features = vision_features(mllm, [record.path for record in records], progress)
        by_looks = _guess(of_pictures, token_ids, identifiers, features)
        guessed = {name: rows | guessed.get(name, {}) for name, rows in by_looks.items()}
    rows = {name: np.stack([own[token_id] for token_id in token_ids]) for name, own in guessed.items()}
    if before:
        token_ids = [*before.token_ids.tolist(), *token_ids]
        rows = {name: np.concatenate([before.rows[name], own]) for name, own in rows.items()}
    pictures, captions = (
        {name: dict(vars(regression)) for name, regression in fitted.items()} for fitted in (of_pictures, of_captions)
    )
    name = teacher.name if teacher and told else known.teacher
    return NewRows(np.array(token_ids, np.int64), rows, pictures, captions, name)


def _regressions(stored: Mapping[str, Mapping[str, Float32]]) -> dict[str, RowRegression]:
    return {name: RowRegression(**arrays) for name, arrays in stored.items()}


def _guess(
    regressions: Mapping[str, RowRegression],
    token_ids: Sequence[int],
    identifiers: Sequence[Sequence[int]],
    features: Float32,
) -> dict[str, dict[int, Float32]]:
    """By the name of a module, the rows of `token_ids`."""
    of_symbols, borne = _of_symbols(token_ids, identifiers, features)
    found = {}
    for name, regression in regressions.items():
        of_symbols[~borne] = regression.mean_features
        found[name] = dict(zip(token_ids, regression.guess(of_symbols), strict=True))
    return found


def _trained_rows(index: Index) -> TrainedRows:
    """By the name of a module, embeddings or LM head: the trained rows of token ids, as PEFT stores them."""
    folder = adapter_folder(index)
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["trainable_token_indices"]
    found = {}
    for name, token_ids in (wanted or {}).items():
        end = f".{name}.token_adapter.trainable_tokens_delta"
        (rows,) = (tensor for key, tensor in tensors.items() if key.endswith(end))
        found[name] = dict(zip(token_ids, rows, strict=True))
    return found


def _sample(index: Index, trained: TrainedRows, *, seed: int, captioned: bool) -> list[int]:
    """Rows of images of the training."""
    known = set(next(iter(trained.values()), {}))
    named = [
        row
        for row, record in enumerate(index.records)
        if (record.captions or not captioned) and known.issuperset(index.token_ids(row))
    ]
    return [int(row) for row in np.random.default_rng(seed).permutation(named)[:MAX_SAMPLE]]


def _fit_on_captions(index: Index, teacher: TextEncoder, *, seed: int) -> dict[str, RowRegression]:
    """Empty where no image is left of the training that has a caption."""
    trained = _trained_rows(index)
    chosen = _sample(index, trained, seed=seed, captioned=True)
    if not chosen:
        return {}
    vectors, _ = embed_by_captions(teacher, [index.records[row].captions for row in chosen])
    return _fit(index, trained, chosen, vectors)


def _fit_on_images(index: Index, mllm: Mllm, *, seed: int, progress: Progress) -> dict[str, RowRegression]:
    trained = _trained_rows(index)
    chosen = _sample(index, trained, seed=seed, captioned=False)
    if not chosen:
        raise IdentifierError(
            f"no image is left of those that {index.folder} was trained on, so that nothing tells which row belongs to "
            "a picture. Make the index anew, with `genret index`."
        )
    features = vision_features(mllm, [index.records[row].path for row in chosen], progress)
    return _fit(index, trained, chosen, features)


def _fit(index: Index, trained: TrainedRows, chosen: Sequence[int], features: Float32) -> dict[str, RowRegression]:
    """On the features of images of the training, by the name of a module."""
    identifiers = [index.token_ids(row) for row in chosen]
    token_ids = sorted({token_id for identifier in identifiers for token_id in identifier})
    of_symbols, _ = _of_symbols(token_ids, identifiers, features)
    return {
        name: RowRegression.fit(of_symbols, np.stack([rows[token_id] for token_id in token_ids]).astype(np.float32))
        for name, rows in trained.items()
    }


def _of_symbols(
    token_ids: Sequence[int], identifiers: Sequence[Sequence[int]], features: Float32
) -> tuple[Float32, NDArray[np.bool_]]:
    """(symbols, v) mean features of the images that bear each symbol, and (symbols,) whether any does."""
    place = {token_id: number for number, token_id in enumerate(token_ids)}
    sums, counts = np.zeros((len(place), features.shape[1]), np.float32), np.zeros(len(place), np.int64)
    for identifier, row in zip(identifiers, features, strict=True):
        for token_id in set(identifier) & place.keys():
            sums[place[token_id]] += row
            counts[place[token_id]] += 1
    return np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32), counts > 0
