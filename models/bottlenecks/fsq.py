"""FSQ, finite scalar quantisation: each channel rounded to one of a few levels. Mentzer et al., arXiv:2309.15505.

In:   features B C t h w, one channel per entry of `levels`.
Out:  latent B C t h w, in each channel the values k / (levels // 2): -1, -0.75, ..., 0.75 of 8 levels; ids B 1 t h w.
Cost: elementwise, and the statistics of use (models.bottlenecks.digits); no parameters.
Errors: ValueError for ids that are no codes.

The levels of a channel are whole numbers around 0, as many below as above when there is an odd number of them, one more
below when it is even. A value is squashed by tanh so that 0 stays 0 and the outermost levels are reached, then rounded;
the gradient passes the rounding unchanged.

One loss is added to the paper's method: a pull on features beyond LINEAR_RANGE, where tanh is flat. Without it they run
away in the first steps of training, and with them the gradient: few codes but the outermost are then ever used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bottlenecks.config import Fsq
from models.bottlenecks.digits import CodeUsage, digits_to_ids, ids_to_digits
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.spec import Posterior

# How far tanh may reach beyond the outermost level, as a share, so that its asymptote is not needed to get there.
REACH = 1e-3
# Where tanh is nearly flat, and how hard features beyond are pulled back: squared excess, a mean over elements.
LINEAR_RANGE, EXCESS_WEIGHT = 2.0, 0.1


class FsqBottleneck(Bottleneck):
    """Rounding to levels. An id is the mixed-radix number of a position's levels, channel 0 the lowest digit."""

    levels: Tensor

    def __init__(self, config: Fsq, latent_channels: int) -> None:
        super().__init__()
        self.channels_in = latent_channels
        self.codebook_sizes = (config.codebook_size,)
        # On the CPU also where a model is built on the meta device: no file brings these values later.
        levels = torch.tensor(config.levels, device="cpu").view(1, -1, 1, 1, 1)
        self.register_buffer("levels", levels, persistent=False)
        self.usage = CodeUsage(config.codebook_size)

    def posterior(self, features: Tensor) -> Posterior:
        return Posterior(self._squash(features).round() / self._half_width, None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        squashed = self._squash(features)
        # added to the rounded value is exactly 0, which carries the gradient: the latent is bit for bit the stored one
        latent = (squashed.round().detach() + (squashed - squashed.detach())) / self._half_width
        ids = self.latent_to_ids(latent.detach())
        excess = torch.relu(features.float().abs() - LINEAR_RANGE).square().mean()
        statistics = {"excess": excess.detach(), **self.usage(ids)}
        return Bottlenecked(latent.to(features.dtype), EXCESS_WEIGHT * excess, ids, statistics)

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        return (ids_to_digits(ids, self.levels) - self._half_width) / self._half_width

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        digits = (latent.float() * self._half_width).round() + self._half_width
        return digits_to_ids(digits.long().clamp(min=0).minimum(self.levels - 1), self.levels)

    @property
    def _half_width(self) -> Tensor:
        return self.levels // 2

    def _squash(self, features: Tensor) -> Tensor:
        half_range = (self.levels - 1) * (1 + REACH) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(features.float() + torch.atanh(offset / half_range)) * half_range - offset
