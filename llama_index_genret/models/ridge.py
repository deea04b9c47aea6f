"""Ridge regression from features to rows of another space, such as embedding rows or vectors of an encoder.

Depends on numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PENALTY = 0.3
"""Ridge penalty in mean eigenvalues of the features' covariance. 1 halves directions of that variance."""

Float32 = NDArray[np.float32]


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
