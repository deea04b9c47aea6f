"""What a frozen vision tower says of pictures, once it knows what redrawing changes. Used while training only.

    features -> less their mean, whitened by how versions of one picture differ -> cosine with every image

Features that redrawing changes count little, those that it leaves count much; so another artist's picture of a thing
comes near the thing. In this space a tower's nearest neighbour is right several times as often as by its features as
they are (integration.recall.looks measures it).

Knows features as arrays; nothing of pictures, models or identifiers.
Source: the within-class covariance of linear discriminant analysis (Fisher 1936), each image a class, its versions the
members; whitening by it as in speaker recognition (WCCN, Hatch, Kajarekar and Stolcke 2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.training.soft_targets import softmax_of_cosines

Float32 = NDArray[np.float32]

SHRINKAGE = 0.1
"""Added to the covariance, in its mean eigenvalues: with as many images as features it is not known well."""


@dataclass(frozen=True)
class VisionTeacher:
    """versions (n, v, d) unit vectors of each image's versions; images: (n, d) unit vectors of the images.

    mean (d,), whitening (d, d): what makes such vectors of features.
    temperature: of the distribution over images: low means only the nearest.
    """

    mean: Float32
    whitening: Float32
    versions: Float32
    images: Float32
    temperature: float

    @classmethod
    def fit(cls, features: Float32, *, temperature: float) -> VisionTeacher:
        """From the tower's features (n, v, d) of the versions of n images, two at least of each.

        within = mean over images and versions of (x - mean of the image)(x - mean of the image)^T
        whitening = cholesky(inverse of (within + shrinkage))
        """
        n_features = features.shape[-1]
        means, mean = features.mean(1), features.mean((0, 1))
        apart = (features - means[:, None]).reshape(-1, n_features).astype(np.float64)
        within = apart.T @ apart / len(apart)
        within[np.diag_indices_from(within)] += SHRINKAGE * within.trace() / n_features + 1e-12
        whitening = np.linalg.cholesky(np.linalg.inv(within)).astype(np.float32)
        versions, images = (_project(rows, mean, whitening) for rows in (features, means))
        return cls(mean, whitening, versions, images, temperature)

    def project(self, features: Float32) -> Float32:
        """(..., d) unit vectors: where pictures of these features lie among the images."""
        return _project(features, self.mean, self.whitening)

    def probabilities(self, row: int, version: int) -> NDArray[np.float64]:
        """(n,) how likely each image is meant by a version of one."""
        return softmax_of_cosines(self.images, self.versions[row, version], self.temperature)


def _project(features: Float32, mean: Float32, whitening: Float32) -> Float32:
    rows = (features - mean) @ whitening
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12), np.float32)
