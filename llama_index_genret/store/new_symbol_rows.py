"""Predict rows for the symbols of images added to a trained index, from their captions or from the images.

    direction = (features - mean of the features) @ weights
    row = mean of the trained rows + direction, rescaled to the mean length of such directions of trained rows

Ridge regression on trained images, whose rows are known, fits `weights`. A new image thus gets a row similar to those
of similar images. Queries for those images recall it until it is trained itself. Ridge regression predicts short rows,
and longer rows outrank them for every query. Without rescaling no added image is found; at full length many are
(integration.recall.grow measures this).

Features are text embeddings of the captions if a text encoder is given and an image has captions. Queries are text,
so caption features find more of the new images, though fewer than training does. Otherwise features come from the
vision tower.

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
"""Maximum number of trained images on which the regression is fitted."""

PENALTY = 0.3
"""Ridge penalty in mean eigenvalues of the features' covariance. 1 halves directions of that variance."""

Float32 = NDArray[np.float32]
TrainedRows = dict[str, dict[int, Float32]]


@dataclass(frozen=True)
class RowRegression:
    """A ridge regression that maps features to rows. All arrays are float32.

    mean_features: (v,), mean of the features.
    mean_rows: (d,), mean of the rows.
    weights: (v, d), fitted on centred features and rows.
    length: (1,), mean distance of the rows from their mean.
    """

    mean_features: Float32
    mean_rows: Float32
    weights: Float32
    length: Float32

    @classmethod
    def fit(cls, features: Float32, rows: Float32, *, penalty: float = PENALTY) -> RowRegression:
        """Fit a ridge regression of `rows` (n, d) on `features` (n, v), both centred; n is at least 1.

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
        """Return the least-squares prediction, (n, d), for features (n, v)."""
        return np.asarray(self.mean_rows + (features - self.mean_features) @ self.weights, np.float32)

    def guess(self, features: Float32) -> Float32:
        """Return rows, (n, d), in the direction of `predict` and at the mean length of trained rows.

        Features without a direction get the mean row.
        """
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
    """Return rows for symbols that the trained weights of `index` lack, beside those predicted before.

    The features of a symbol are the mean features of the images whose identifiers contain it. A symbol of no image
    gets the mean row. Each regression is fitted once, on at most MAX_SAMPLE images drawn with `seed`, and stored. It
    predicts rows of the weights of `genret train`, independent of an update on top.

    Args:
        records, identifiers: new images, and their identifiers as token ids.
        token_ids: the new symbols.
        mllm: the base model.
        teacher: text encoder for the symbols of images with captions.
        seed: draws the images of the regression.
    Raises:
        IdentifierError: no trained image is left to fit the regression on.
    """
    before = stored_new_rows(index)
    known = before or NewRows(np.zeros(0, np.int64), {}, {})
    of_images, of_captions = _regressions(known.regressions), _regressions(known.of_captions)
    predicted: dict[str, dict[int, Float32]] = {}
    captioned = [place for place, record in enumerate(records) if teacher and record.captions]
    if teacher and captioned:
        if not of_captions or known.teacher != teacher.name:
            of_captions = _fit_on_captions(index, teacher, seed=seed)
        own = [identifiers[place] for place in captioned]
        in_use = sorted(set(itertools.chain(*own)) & set(token_ids))
        embeddings, _ = embed_by_captions(teacher, [records[place].captions for place in captioned])
        predicted = _guess(of_captions, in_use, own, embeddings)
    if not predicted or not next(iter(predicted.values())).keys() >= set(token_ids):
        of_images = of_images or _fit_on_images(index, mllm, seed=seed, progress=progress)
        features = vision_features(mllm, [record.path for record in records], progress)
        by_features = _guess(of_images, token_ids, identifiers, features)
        predicted = {name: rows | predicted.get(name, {}) for name, rows in by_features.items()}
    rows = {name: np.stack([own[token_id] for token_id in token_ids]) for name, own in predicted.items()}
    if before:
        token_ids = [*before.token_ids.tolist(), *token_ids]
        rows = {name: np.concatenate([before.rows[name], own]) for name, own in rows.items()}
    images_fit, captions_fit = (
        {name: dict(vars(regression)) for name, regression in fitted.items()} for fitted in (of_images, of_captions)
    )
    name = teacher.name if teacher and captioned else known.teacher
    return NewRows(np.array(token_ids, np.int64), rows, images_fit, captions_fit, name)


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


def _sample(index: Index, trained: TrainedRows, *, seed: int, captioned: bool) -> list[int]:
    """Return the rows of a random sample of trained images."""
    known = set(next(iter(trained.values()), {}))
    rows = [
        row
        for row, record in enumerate(index.records)
        if (record.captions or not captioned) and known.issuperset(index.token_ids(row))
    ]
    return [int(row) for row in np.random.default_rng(seed).permutation(rows)[:MAX_SAMPLE]]


def _fit_on_captions(index: Index, teacher: TextEncoder, *, seed: int) -> dict[str, RowRegression]:
    """Fit on captions of trained images, keyed by module name. Return {} if no trained image with captions is left."""
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
