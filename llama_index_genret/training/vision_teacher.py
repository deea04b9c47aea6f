"""The frozen vision tower as teacher: image similarity that is robust to style. Used while training only.

    features -> subtract the mean -> whiten by the covariance within images -> cosine similarity with every image

Features that style augmentation changes get a small weight, the others a large one. Images of one object in different
styles become similar. The nearest neighbour in this space is right several times as often as with the raw features, as
integration.recall.redrawn measures.

Depends on features as arrays; independent of images, models and identifiers.
Source: the within-class covariance of linear discriminant analysis (Fisher 1936), where each image is a class and its
versions are the members. Whitening by it is known from speaker recognition (WCCN; Hatch, Kajarekar and Stolcke 2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.training.soft_targets import softmax_of_cosines

Float32 = NDArray[np.float32]

SHRINKAGE = 0.1
"""Diagonal shrinkage of the covariance, as a multiple of its mean eigenvalue.

The estimate is noisy if there are about as many images as features.
"""


@dataclass(frozen=True)
class VisionTeacher:
    """The whitened embeddings of all images and their versions.

    mean: (d,) the mean of the features.
    whitening: (d, d) the matrix that whitens centred features.
    versions: (n, v, d) unit vectors of each image's versions.
    images: (n, d) unit vectors of the images.
    temperature: temperature of the distribution over images. A low value puts all probability on the nearest image.
    """

    mean: Float32
    whitening: Float32
    versions: Float32
    images: Float32
    temperature: float

    @classmethod
    def fit(cls, features: Float32, *, temperature: float) -> VisionTeacher:
        """Fit the whitening to the tower's features.

        within = mean over images and versions of (x - mean of the image)(x - mean of the image)^T
        whitening = cholesky(inverse of (within + shrinkage))

        Args:
            features: (n, v, d) features of the versions of n images, at least 2 versions each.
            temperature: temperature of the distribution over images.
        """
        n_features = features.shape[-1]
        means, mean = features.mean(1), features.mean((0, 1))
        residuals = (features - means[:, None]).reshape(-1, n_features).astype(np.float64)
        within = residuals.T @ residuals / len(residuals)
        within[np.diag_indices_from(within)] += SHRINKAGE * within.trace() / n_features + 1e-12
        whitening = np.linalg.cholesky(np.linalg.inv(within)).astype(np.float32)
        versions, images = (_project(rows, mean, whitening) for rows in (features, means))
        return cls(mean, whitening, versions, images, temperature)

    def project(self, features: Float32) -> Float32:
        """Return (..., d) unit vectors of features (..., d), comparable with `images`."""
        return _project(features, self.mean, self.whitening)

    def probabilities(self, row: int, version: int) -> NDArray[np.float64]:
        """Return (n,) the probability of each image, given a version of image `row`."""
        return softmax_of_cosines(self.images, self.versions[row, version], self.temperature)


def _project(features: Float32, mean: Float32, whitening: Float32) -> Float32:
    rows = (features - mean) @ whitening
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12), np.float32)
