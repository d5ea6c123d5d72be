"""What stands between encoder and decoder: one interface, and the KL bottleneck of a variational autoencoder.

In:   encoder features B F t h w, F = `channels_in`.
Out:  forward: Bottlenecked(latent, penalty) for training; posterior: what a store keeps, deterministic.
Cost: elementwise; bottlenecks work per position, so streaming needs no state for them.
Errors: ValueError for a name that is not in BOTTLENECKS.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor, nn

from models.losses import kl_divergence
from models.spec import Posterior

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Bottlenecked:
    """A latent to decode, B C t h w, and the bottleneck's own loss: a scalar, averaged over all elements."""

    latent: Tensor
    penalty: Tensor


class Bottleneck(nn.Module, abc.ABC):
    """Encoder features to latent. A subclass says how many features it wants for a latent's channels.

    Attributes:
        channels_in: the features that the encoder gives.
        has_logvar: whether `posterior` knows a log-variance.
    """

    channels_in: int
    has_logvar: bool

    @abc.abstractmethod
    def posterior(self, features: Tensor) -> Posterior:
        """The latent without noise, and its log-variance where there is one."""

    @abc.abstractmethod
    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Bottlenecked:
        """The latent that training decodes; `generator` makes its noise repeatable."""


class KlBottleneck(Bottleneck):
    """A diagonal Gaussian posterior against a unit Gaussian prior. Kingma and Welling, arXiv:1312.6114."""

    has_logvar = True

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.channels_in = 2 * latent_channels

    def posterior(self, features: Tensor) -> Posterior:
        mean, logvar = features.float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Bottlenecked:
        posterior = self.posterior(features)
        assert posterior.logvar is not None
        noise = torch.empty_like(posterior.mean).normal_(generator=generator)
        latent = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        return Bottlenecked(latent.to(features.dtype), kl_divergence(posterior.mean, posterior.logvar))


BOTTLENECKS: dict[str, type[KlBottleneck]] = {"kl": KlBottleneck}


def build_bottleneck(name: str, latent_channels: int) -> Bottleneck:
    """The bottleneck that a config names."""
    if name not in BOTTLENECKS:
        raise ValueError(f"no bottleneck {name!r}: use one of {', '.join(BOTTLENECKS)}")
    return BOTTLENECKS[name](latent_channels)
