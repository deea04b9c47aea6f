"""Ridge regression from features to rows of another space, such as embedding rows or vectors of an encoder.

Depends on numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PENALTY = 0.3
"""Of the ridge, in mean eigenvalues of the features' covariance: with 1, directions of that variance shrink by half."""

Float32 = NDArray[np.float32]


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
