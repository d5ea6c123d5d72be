"""Continuous latents: the plain one, and the Gaussian posterior of a variational autoencoder.

In:   features B F t h w; F = C, and the log-variance's channels where it is predicted: C, or 1 when it is shared.
Out:  Bottlenecked, Posterior (models.bottlenecks.interface).
Cost: elementwise.
Errors: none; records check themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bottlenecks.config import LOGVAR_RANGE, Kl, NoBottleneck
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.losses import kl_divergence
from models.spec import Posterior

# Standard deviations of exp(-3): a posterior that starts at unit noise hides the clip from the decoder.
INITIAL_LOGVAR = -6.0


class PlainBottleneck(Bottleneck):
    """The features as they are."""

    def __init__(self, config: NoBottleneck, latent_channels: int) -> None:
        super().__init__()
        self.channels_in = latent_channels

    def posterior(self, features: Tensor) -> Posterior:
        return Posterior(features.float(), None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        return Bottlenecked(features, features.new_zeros(()))


class KlBottleneck(Bottleneck):
    """A diagonal Gaussian posterior against a unit Gaussian prior. Kingma and Welling, arXiv:1312.6114.

    The loss is beta * the mean over channels of max(free_bits, divergence of the channel), a channel's divergence
    being the mean over the batch and its positions, in nats per latent element. A channel below its free bits gets no
    gradient from the loss. The statistic "kl" is the divergence as it is, free bits included.
    """

    has_logvar = True

    def __init__(self, config: Kl, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = latent_channels
        self.channels_in = latent_channels + {"per_channel": latent_channels, "shared": 1, "fixed": 0}[config.logvar]

    def posterior(self, features: Tensor) -> Posterior:
        mean, logvar = self._moments(features)
        return Posterior(mean, logvar)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        mean, logvar = self._moments(features)
        # randn of the shape, not like the mean: the same noise whatever the memory layout
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        latent = mean + torch.exp(0.5 * logvar) * noise
        kl = torch.vmap(kl_divergence, in_dims=1)(mean, logvar)  # one number per channel
        loss = self.config.beta * kl.clamp(min=self.config.free_bits).mean()
        return Bottlenecked(latent.to(features.dtype), loss, statistics={"kl": kl.detach().mean()})

    def initial_features(self) -> Tensor | None:
        if self.config.logvar == "fixed":
            return None
        bias = torch.zeros(self.channels_in)
        bias[self.latent_channels :] = INITIAL_LOGVAR
        return bias

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = features.float().tensor_split([self.latent_channels], dim=1)
        if self.config.logvar == "fixed":
            return mean, torch.full_like(mean, self.config.fixed_logvar)
        return mean, logvar.clamp(*LOGVAR_RANGE).expand_as(mean)
