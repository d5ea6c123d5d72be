"""The Fréchet distance between two sets of feature vectors, as of FID and FVD: over the whole sets, never per batch.

In:   features, N x D, batch by batch, into one FeatureStatistics per set.
Out:  mean and covariance; the distance of two Gaussians that have them.
Cost: D x D float64 numbers a set, whatever its size; two eigendecompositions per distance.
Errors: ValueError for fewer than two vectors, and for features of another width.
"""

from __future__ import annotations

import numpy as np


class FeatureStatistics:
    """Mean and covariance of vectors that come in batches; any batching gives the same up to rounding.

    Chan, Golub, LeVeque: "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def update(self, features: np.ndarray) -> None:
        """Take in vectors N x D, N at least 1."""
        if features.ndim != 2 or not features.size or (self.count and features.shape[1] != len(self.mean)):
            raise ValueError(f"features are N x D of one width D, got {features.shape} after {self.mean.shape}")
        features = features.astype(np.float64)
        if not self.count:
            width = features.shape[1]
            self.mean, self._scatter = np.zeros(width), np.zeros((width, width))
        mean = features.mean(axis=0)
        centred, step, total = features - mean, mean - self.mean, self.count + len(features)
        between = np.outer(step, step) * (self.count * len(features) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self.mean = self.mean + step * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """D x D, over N - 1.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors, got {self.count}")
        return np.asarray(self._scatter / (self.count - 1))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Dowson and Landau, 1982; of videos: Unterthiner, arXiv:1812.01717.

    The root's trace is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), which stays real when covariances lack rank,
    as those of fewer vectors than features do.

    Raises:
        ValueError: a set has fewer than two vectors, or the sets' widths differ.
    """
    covariances = first.covariance, second.covariance
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"the sets' features differ in width: {len(first.mean)} and {len(second.mean)}")
    root = _square_root(covariances[0])
    overlap = np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)
    spread = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(overlap).sum()
    return float(np.square(first.mean - second.mean).sum() + max(spread, 0.0))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
