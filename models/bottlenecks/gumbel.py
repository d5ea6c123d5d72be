"""The Gumbel-softmax: a categorical latent that is a mixture of codes while training, and one code afterwards.

In:   features B K t h w: logits, one per code.
Out:  Bottlenecked with ids B 1 t h w; the latent that is stored is the likeliest code of each position.
Cost: K C multiply-adds per position; the logits' memory a few times over while training.
Errors: ValueError when ids have another number of codebooks than one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.bottlenecks.codebook import match_float16
from models.bottlenecks.config import Gumbel
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.bottlenecks.ranks import sum_over_ranks
from models.bottlenecks.usage import UsageWindow, count_codes
from models.bottlenecks.vq import check_codebooks, to_grid, to_rows
from models.spec import Posterior


class GumbelBottleneck(Bottleneck):
    """Jang et al., arXiv:1611.01144, as in the dVAE of Ramesh et al., arXiv:2102.12092.

    In training mode the codes are mixed by a softmax of logits plus Gumbel noise, the sharper the lower the
    temperature; ids are those of the largest share. In eval mode there is no noise, and the largest logit's code alone.
    """

    def __init__(self, config: Gumbel, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels_in = config.codebook_size
        self.codebook_sizes = (config.codebook_size,)
        self.codes = nn.Parameter(torch.randn(config.codebook_size, latent_channels))
        self.usage = UsageWindow(config.codebook_size)

    def posterior(self, features: Tensor) -> Posterior:
        return Posterior(self.ids_to_latent(features.argmax(1, keepdim=True)).detach(), None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        with torch.autocast(features.device.type, enabled=False):
            logits = to_rows(features)
            kl = kl_to_uniform(logits)
            if self.training:
                noisy = logits + gumbel_noise(logits, generator)
                ids = noisy.argmax(1)
                latent = (noisy / temperature(self.config, step)).softmax(1) @ self.codes
            else:
                ids = logits.argmax(1)
                latent = self.codes[ids]
            counts = count_codes(ids, self.config.codebook_size)
            usage = self.usage(sum_over_ranks(counts) if self.training else counts)
        return Bottlenecked(
            to_grid(latent, features).to(features.dtype),
            kl_weight(self.config, step) * kl,
            to_grid(ids, features),
            {"kl": kl.detach(), **usage},
        )

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        check_codebooks(ids, len(self.codebook_sizes))
        return self.codes[ids[:, 0]].movedim(-1, 1)

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        return to_grid(match_float16(to_rows(latent), self.codes.detach()), latent)


def temperature(config: Gumbel, step: int) -> float:
    """Of the softmax at an optimiser step: falls by one factor per step until `temperature_steps`, then stays."""
    done = min(1.0, step / config.temperature_steps)
    ratio: float = (config.final_temperature / config.temperature) ** done
    return config.temperature * ratio


def kl_weight(config: Gumbel, step: int) -> float:
    """Of the divergence at an optimiser step: rises in a straight line until `kl_steps`, then stays."""
    return config.kl_weight * min(1.0, step / config.kl_steps)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) of rows N x K, in nats, averaged over the rows."""
    log_shares = logits.log_softmax(1)
    return (log_shares.exp() * log_shares).sum(1).mean() + math.log(logits.shape[1])


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws from the standard Gumbel distribution."""
    return -torch.empty_like(like).exponential_(generator=generator).log()
