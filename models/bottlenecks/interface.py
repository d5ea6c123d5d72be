"""What stands between encoder and decoder: one interface for continuous and discrete latents.

In:   encoder features B F t h w, F = `channels_in`.
Out:  forward: Bottlenecked, what training decodes; posterior: what a store keeps, deterministic; ids, both ways.
Cost: all work per position, so streaming needs no state for them; arithmetic is float32 under any autocast.
Errors: TypeError when ids are asked of a continuous latent.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.spec import Posterior


@dataclasses.dataclass(frozen=True)
class Bottlenecked:
    """What a training pass needs of a bottleneck.

    latent: to decode, B C t h w, through which the gradient reaches the encoder.
    loss: the bottleneck's own, weighted; a scalar, made of means over elements.
    ids: of discrete latents, int64 B L t h w with one grid per codebook; None for continuous ones.
    statistics: detached scalars by name, unweighted ("kl", "commitment", "entropy", "excess", "usage",
        "perplexity", "window_usage", "window_perplexity").
    """

    latent: Tensor
    loss: Tensor
    ids: Tensor | None = None
    statistics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


class Bottleneck(nn.Module, abc.ABC):
    """Encoder features to latent.

    Attributes:
        channels_in: the features that the encoder gives.
        has_logvar: whether `posterior` knows a log-variance.
        codebook_sizes: codes of each codebook; empty for continuous latents.
    """

    channels_in: int
    has_logvar: bool = False
    codebook_sizes: tuple[int, ...] = ()

    @abc.abstractmethod
    def posterior(self, features: Tensor) -> Posterior:
        """The latent without noise, and its log-variance where there is one. Changes no state of the module."""

    @abc.abstractmethod
    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        """The latent that training decodes at that optimiser step; `generator` makes its noise repeatable.

        In training mode codebooks that are averages are updated here; in eval mode nothing is.
        """

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        """The latent B C t h w of int64 ids B L t h w."""
        raise TypeError(f"{type(self).__name__} has a continuous latent: there are no ids")

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        """The ids B L t h w of a stored latent B C t h w (float16 is close enough)."""
        raise TypeError(f"{type(self).__name__} has a continuous latent: there are no ids")

    def initial_features(self) -> Tensor | None:
        """Where the encoder's last convolution should start, as a bias per feature; None leaves it at zero."""
        return None
