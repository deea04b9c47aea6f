"""Predict rows for the symbols of images added to a trained index, from their vectors or from the images.

    direction = (features - mean of the features) @ weights
    row = mean of the trained rows + direction, rescaled to the mean length of such directions of trained rows

Ridge regression on trained images, whose rows are known, fits `weights`. A new image thus gets a row similar to those
of similar images. Queries for those images recall it until it is trained itself. Ridge regression predicts short rows,
and longer rows outrank them for every query. Without rescaling no added image is found; at full length many are
(integration.recall.grow measures this).

Features are the vectors of the index's encoder where an image has one. Queries are text, so the vectors of captions
find more of the new images, though fewer than training does. Otherwise features come from the vision tower.

IncDSI (arXiv:2307.10323) also adds one row to trained atomic identifiers and changes nothing else. It solves for that
row under constraints: the new document's own queries must find it, and old queries must not. This requires queries of
the new document and of all old ones. Here only the image is needed. The row's quality depends on the trained images,
and the row may outrank one of them for an old query.

Depends on images, captions, identifiers as token ids, and adapter files; independent of training.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import IdentifierError
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import Mllm, Progress
from llama_index_genret.models.ridge import RowRegression
from llama_index_genret.store import Index, NewRows
from llama_index_genret.store.model_state import adapter_folder, stored_new_rows

MAX_SAMPLE = 2048
"""Maximum number of trained images on which the regression is fitted."""

Float32 = NDArray[np.float32]
TrainedRows = dict[str, dict[int, Float32]]


def guess_rows(
    index: Index,
    records: Sequence[Record],
    identifiers: Sequence[Sequence[int]],
    token_ids: Sequence[int],
    mllm: Mllm,
    *,
    vectors: Float32 | None = None,
    seed: int = 0,
    progress: Progress = iter,
) -> NewRows:
    """Return rows for symbols that the trained weights of `index` lack, beside those predicted before.

    The features of a symbol are the mean features of the images whose identifiers contain it. A symbol of no image
    gets the mean row. Each regression is fitted once, on at most MAX_SAMPLE images drawn with `seed`, and stored. It
    predicts rows of the weights of `genret train`, independent of an update on top.

    Args:
        records, identifiers: new images, and their identifiers as token ids.
        token_ids: the new symbols.
        mllm: the base model, for images without a vector.
        vectors: (n, d) vectors of the images in the encoder's space, 0 for an image without; None without an encoder.
        seed: draws the images of the regression.
    Raises:
        IdentifierError: no trained image is left to fit the regression on.
    """
    before = stored_new_rows(index)
    known = before or NewRows(np.zeros(0, np.int64), {}, {})
    of_images, of_vectors = _regressions(known.regressions), _regressions(known.of_vectors)
    predicted: dict[str, dict[int, Float32]] = {}
    placed = [] if vectors is None else np.flatnonzero(vectors.any(axis=1)).tolist()
    if vectors is not None and placed:
        of_vectors = of_vectors or _fit_on_vectors(index, seed=seed)
        own = [identifiers[place] for place in placed]
        borne = sorted(set(itertools.chain(*own)) & set(token_ids))
        predicted = _guess(of_vectors, borne, own, vectors[placed])
    if not predicted or not next(iter(predicted.values())).keys() >= set(token_ids):
        of_images = of_images or _fit_on_images(index, mllm, seed=seed, progress=progress)
        features = vision_features(mllm, [record.path for record in records], progress)
        by_features = _guess(of_images, token_ids, identifiers, features)
        predicted = {name: rows | predicted.get(name, {}) for name, rows in by_features.items()}
    rows = {name: np.stack([own[token_id] for token_id in token_ids]) for name, own in predicted.items()}
    if before:
        token_ids = [*before.token_ids.tolist(), *token_ids]
        rows = {name: np.concatenate([before.rows[name], own]) for name, own in rows.items()}
    images_fit, vectors_fit = (
        {name: dict(vars(regression)) for name, regression in fitted.items()} for fitted in (of_images, of_vectors)
    )
    return NewRows(np.array(token_ids, np.int64), rows, images_fit, vectors_fit)


def _regressions(stored: Mapping[str, Mapping[str, Float32]]) -> dict[str, RowRegression]:
    return {name: RowRegression(**arrays) for name, arrays in stored.items()}


def _guess(
    regressions: Mapping[str, RowRegression],
    token_ids: Sequence[int],
    identifiers: Sequence[Sequence[int]],
    features: Float32,
) -> dict[str, dict[int, Float32]]:
    """Return the predicted rows of `token_ids`, keyed by module name."""
    symbol_features, in_use = _symbol_features(token_ids, identifiers, features)
    found = {}
    for name, regression in regressions.items():
        symbol_features[~in_use] = regression.mean_features
        found[name] = dict(zip(token_ids, regression.guess(symbol_features), strict=True))
    return found


def _trained_rows(index: Index) -> TrainedRows:
    """Return the trained rows of token ids as PEFT stores them, keyed by module name (embeddings or LM head)."""
    folder = adapter_folder(index)
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["trainable_token_indices"]
    found = {}
    for name, token_ids in (wanted or {}).items():
        end = f".{name}.token_adapter.trainable_tokens_delta"
        (rows,) = (tensor for key, tensor in tensors.items() if key.endswith(end))
        found[name] = dict(zip(token_ids, rows, strict=True))
    return found


def _sample(index: Index, trained: TrainedRows, *, seed: int) -> list[int]:
    """Return rows of images of the training."""
    known = set(next(iter(trained.values()), {}))
    rows = [row for row in range(len(index.records)) if known.issuperset(index.token_ids(row))]
    return [int(row) for row in np.random.default_rng(seed).permutation(rows)]


def _fit_on_vectors(index: Index, *, seed: int) -> dict[str, RowRegression]:
    """Return no regression if no image of the training is left that has a vector."""
    trained = _trained_rows(index)
    vectors = np.zeros((0, 0)) if index.vectors is None else index.vectors
    chosen = [row for row in _sample(index, trained, seed=seed) if vectors[row].any()][:MAX_SAMPLE]
    return _fit(index, trained, chosen, np.asarray(vectors[chosen], np.float32)) if chosen else {}


def _fit_on_images(index: Index, mllm: Mllm, *, seed: int, progress: Progress) -> dict[str, RowRegression]:
    trained = _trained_rows(index)
    chosen = _sample(index, trained, seed=seed)[:MAX_SAMPLE]
    if not chosen:
        raise IdentifierError(
            f"no image is left of those that {index.folder} was trained on, so that no row of a new symbol can be "
            "predicted. Create the index again with `genret index`."
        )
    features = vision_features(mllm, [index.records[row].path for row in chosen], progress)
    return _fit(index, trained, chosen, features)


def _fit(index: Index, trained: TrainedRows, chosen: Sequence[int], features: Float32) -> dict[str, RowRegression]:
    """Fit on the features of trained images, keyed by module name."""
    identifiers = [index.token_ids(row) for row in chosen]
    token_ids = sorted({token_id for identifier in identifiers for token_id in identifier})
    symbol_features, _ = _symbol_features(token_ids, identifiers, features)
    return {
        name: RowRegression.fit(symbol_features, np.stack([rows[token] for token in token_ids]).astype(np.float32))
        for name, rows in trained.items()
    }


def _symbol_features(
    token_ids: Sequence[int], identifiers: Sequence[Sequence[int]], features: Float32
) -> tuple[Float32, NDArray[np.bool_]]:
    """Return (symbols, v) mean features of the images with each symbol, and (symbols,) bool, True if there are any."""
    place = {token_id: number for number, token_id in enumerate(token_ids)}
    sums, counts = np.zeros((len(place), features.shape[1]), np.float32), np.zeros(len(place), np.int64)
    for identifier, row in zip(identifiers, features, strict=True):
        for token_id in set(identifier) & place.keys():
            sums[place[token_id]] += row
            counts[place[token_id]] += 1
    return np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32), counts > 0
