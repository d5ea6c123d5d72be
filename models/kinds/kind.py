"""What every kind of autoencoder says of itself: a record that builds the model and its objective.

In:   a BackboneConfig; then batches of pixels, float B 3 T H W in [-1, 1].
Out:  a ModelConfig; per batch Terms, whose loss a trainer minimises.
Cost: one forward pass of the model per batch, and what a kind adds.
Errors: ValueError for fields that cannot be.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.autoencoder import CausalAutoencoder, Reconstruction
from models.config import BackboneConfig, ModelConfig
from models.losses import ReconstructionWeights, reconstruction_loss
from models.lpips import load_lpips


@dataclasses.dataclass(frozen=True)
class Terms:
    """One training pass: the loss to minimise, its parts by name (detached, unweighted), what was reconstructed."""

    loss: Tensor
    values: Mapping[str, Tensor]
    reconstruction: Reconstruction


@dataclasses.dataclass(frozen=True)
class DiscriminatorTerms:
    """What a discriminator minimises, and its parts by name (detached, unweighted)."""

    loss: Tensor
    values: Mapping[str, Tensor]


class Adversary(nn.Module, abc.ABC):
    """A discriminator: it learns beside the autoencoder, by an optimiser of its own."""

    @abc.abstractmethod
    def discriminator_terms(self, pixels: Tensor, reconstruction: Tensor, step: int) -> DiscriminatorTerms | None:
        """Its loss on clips and their reconstructions (detached), B 3 T H W; None while it has not started yet."""


class Objective(nn.Module):
    """A model together with how it learns: reconstruction terms, the bottleneck's loss, and what a kind adds.

    It is one module so that data-parallel training can wrap the whole pass.

    Attributes:
        adversary: who learns against the model, or None. The trainer gives it an optimiser of its own.
    """

    adversary: Adversary | None

    def __init__(self, model: CausalAutoencoder, weights: ReconstructionWeights) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.adversary = None
        self.lpips = None if weights.lpips_weights is None else load_lpips(weights.lpips_weights)

    def forward(self, pixels: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Terms:
        """One pass over clips, B 3 T H W, at that optimiser step; `generator` makes all noise repeatable."""
        output: Reconstruction = self.model(self.corrupt(pixels, generator), step=step, generator=generator)
        loss, values = self.compare(output.pixels, pixels)
        added, more = self.penalty(pixels, output, generator)
        return Terms(
            loss + output.bottlenecked.loss + added,
            {**values, **output.bottlenecked.statistics, **more},
            output,
        )

    def corrupt(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the encoder is shown of the pixels that must be reconstructed."""
        return pixels

    def compare(self, reconstruction: Tensor, pixels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The reconstruction's loss and its parts."""
        return reconstruction_loss(reconstruction, pixels, self.weights, self.lpips)

    def penalty(
        self, pixels: Tensor, output: Reconstruction, generator: torch.Generator | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the kind adds to the loss, weighted; and its parts, unweighted."""
        return pixels.new_zeros(()), {}


@dataclasses.dataclass(frozen=True)
class Kind(abc.ABC):
    """One kind of autoencoder and its settings. A subclass is a record with a name, a ModelConfig and an Objective."""

    name: ClassVar[str]
    weights: ReconstructionWeights = ReconstructionWeights()

    @abc.abstractmethod
    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        """The model that this kind builds on a backbone."""

    def objective(self, model: CausalAutoencoder) -> Objective:
        """How that model learns."""
        return Objective(model, self.weights)
