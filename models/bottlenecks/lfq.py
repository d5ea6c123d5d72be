"""LFQ and BSQ, lookup-free quantisation: each channel becomes one bit, so that d channels are 2 ** d codes.

In:   features B d t h w.
Out:  latent B d t h w of -1 and 1 (LFQ: Yu et al., arXiv:2310.05737), or of unit vectors, -1 / sqrt(d) and 1 / sqrt(d)
      (BSQ: Zhao et al., arXiv:2406.07548); ids B 1 t h w; the commitment and entropy losses.
Cost: elementwise, whatever the number of codes: entropies are sums over bits, never over codes. Statistics of use as
      in models.bottlenecks.digits.
Errors: ValueError for ids that are no codes.

The soft choice of a code, softmax(-distance ** 2 / temperature), is a product over bits, each with probability
sigmoid(4 * value / temperature) of 1. Its entropy is therefore exactly the sum of the bits' entropies. The entropy of
the average choice is bounded from above by such a sum, and is equal to it when the bits vary independently of each
other; that bound is what is maximised, as in BSQ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bottlenecks.config import Lfq
from models.bottlenecks.digits import CodeUsage, digits_to_ids, ids_to_digits
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.spec import Posterior


class LfqBottleneck(Bottleneck):
    """Signs. Bit i of a code is 1 where channel i is positive.

    Losses and the soft choice see values in units of a code's own components, so that weights and temperature mean the
    same for LFQ and BSQ. Entropies are in nats per bit: 0 for a sure choice, 0.69 for none. The entropy of the average
    choice is that of this process's batch.
    """

    levels: Tensor

    def __init__(self, config: Lfq, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels_in = latent_channels
        self.codebook_sizes = (2**latent_channels,)
        self.code_component = 1 / math.sqrt(latent_channels) if config.spherical else 1.0
        # On the CPU also where a model is built on the meta device: no file brings these values later.
        levels = torch.full((1, latent_channels, 1, 1, 1), 2, device="cpu")
        self.register_buffer("levels", levels, persistent=False)
        self.usage = CodeUsage(2**latent_channels)

    def posterior(self, features: Tensor) -> Posterior:
        return Posterior(_signs(features.float()) * self.code_component, None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        values = self._values(features)
        signs = _signs(values).detach()
        # added to the signs is exactly 0, which carries the gradient: the latent is bit for bit the stored one
        latent = (signs + (values - values.detach())) * self.code_component
        commitment = F.mse_loss(values, signs)
        entropy, batch_entropy = _entropies(values, self.config.temperature)
        config = self.config
        loss = config.commitment * commitment + config.entropy * (entropy - config.diversity * batch_entropy)
        statistics = {"commitment": commitment, "entropy": entropy, "batch_entropy": batch_entropy}
        statistics = {name: value.detach() for name, value in statistics.items()}
        ids = self.latent_to_ids(signs)
        return Bottlenecked(latent.to(features.dtype), loss, ids, {**statistics, **self.usage(ids)})

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        return (2 * ids_to_digits(ids, self.levels) - 1) * self.code_component

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        return digits_to_ids((latent > 0).long(), self.levels)

    def _values(self, features: Tensor) -> Tensor:
        """The features in units of a code's components; on the sphere through all codes when spherical."""
        features = features.float()
        return F.normalize(features, dim=1) / self.code_component if self.config.spherical else features


def _signs(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1.0, -1.0)


def _entropies(values: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Nats per bit: the mean entropy of the soft choices, and the entropy of their average over all positions."""
    logits = 4 / temperature * values
    one, zero = torch.sigmoid(logits), torch.sigmoid(-logits)
    entropy = -(one * F.logsigmoid(logits) + zero * F.logsigmoid(-logits)).mean()
    over = (0, 2, 3, 4)
    batch_entropy = (torch.special.entr(one.mean(over)) + torch.special.entr(zero.mean(over))).mean()
    return entropy, batch_entropy
