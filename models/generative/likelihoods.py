"""What a decoder's pixels say of the true ones: a density per pixel value, with one scale.

In:   prediction and pixels, float, of one shape, in [-1, 1]; a scale, given or fitted.
Out:  log-densities in nats, one per element, with respect to the pixel values in [-1, 1].
Cost: elementwise; fitting is one pass over (prediction, pixels) pairs, two numbers of state.
Errors: ValueError for a scale that is not positive, and for nothing to fit it to.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor

from models.losses import LOGIT_EPSILON, map_pixels


@dataclasses.dataclass(frozen=True)
class Likelihood(abc.ABC):
    """A density around a decoder's prediction, of one scale for all elements."""

    scale: float
    power: ClassVar[int]

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"the scale of a likelihood must be positive and finite, got {self.scale}")

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """The most likely scale for (prediction, pixels) pairs, as in sigma-VAE: Rybkin et al., arXiv:2006.13202.

        Fit it on training data: a scale fitted to the very clips that are judged makes them look likelier.

        Raises:
            ValueError: there are no pairs, or every prediction is exact.
        """
        total, count = 0.0, 0
        for prediction, pixels in pairs:
            residual = cls.residual(prediction, pixels).double()
            total += residual.abs().pow(cls.power).sum().item()
            count += residual.numel()
        if not count:
            raise ValueError("a scale is fitted to (prediction, pixels) pairs, got none")
        return cls((total / count) ** (1 / cls.power))

    @staticmethod
    @abc.abstractmethod
    def residual(prediction: Tensor, pixels: Tensor) -> Tensor:
        """What is distributed around 0 with that scale, per element."""

    @abc.abstractmethod
    def log_density(self, prediction: Tensor, pixels: Tensor) -> Tensor:
        """Nats per element."""


@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """Normal with a standard deviation of `scale`: squared error."""

    power: ClassVar[int] = 2

    @staticmethod
    def residual(prediction: Tensor, pixels: Tensor) -> Tensor:
        return pixels - prediction

    def log_density(self, prediction: Tensor, pixels: Tensor) -> Tensor:
        standardised = self.residual(prediction, pixels) / self.scale
        return -0.5 * standardised.square() - math.log(self.scale * math.sqrt(2 * math.pi))


@dataclasses.dataclass(frozen=True)
class Laplace(Likelihood):
    """Laplace with a mean absolute deviation of `scale`: absolute error."""

    power: ClassVar[int] = 1

    @staticmethod
    def residual(prediction: Tensor, pixels: Tensor) -> Tensor:
        return pixels - prediction

    def log_density(self, prediction: Tensor, pixels: Tensor) -> Tensor:
        return -self.residual(prediction, pixels).abs() / self.scale - math.log(2 * self.scale)


@dataclasses.dataclass(frozen=True)
class LogitLaplace(Likelihood):
    """Laplace on the logit of mapped pixels (models.losses.map_pixels). Ramesh et al., arXiv:2102.12092.

    A prediction beyond [-1, 1] counts as its nearer end, which for true pixels never is less likely.
    """

    power: ClassVar[int] = 1

    @staticmethod
    def residual(prediction: Tensor, pixels: Tensor) -> Tensor:
        return torch.logit(map_pixels(pixels)) - torch.logit(map_pixels(prediction.clamp(-1, 1)))

    def log_density(self, prediction: Tensor, pixels: Tensor) -> Tensor:
        mapped = map_pixels(pixels)
        slope = (0.5 - LOGIT_EPSILON) / (mapped * (1 - mapped))  # of the logit, by the pixel's value
        distance = self.residual(prediction, pixels).abs()
        return -distance / self.scale - math.log(2 * self.scale) + torch.log(slope)
