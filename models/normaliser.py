"""Per-channel mean and standard deviation of latents, in one exact streaming pass.

In:   latents B C t h w, batch by batch.
Out:  a Normaliser.
Cost: two float64 vectors of C, whatever the number of batches.
Errors: ValueError when no latent came, or values are not finite.

A channel that never varied (a collapsed code, a bit that never flips) has std 1, and the formula names it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.spec import Normaliser


class NormaliserMeter:
    """Welford's algorithm over batches, merged as in Chan, Golub and LeVeque (1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Take in one batch, B C t h w."""
        values = latents.detach().to("cpu", torch.float64).movedim(1, 0).flatten(1)
        count = values.shape[1]
        mean = values.mean(dim=1)
        shift = mean - self._mean
        total = self.count + count
        self._squares = (
            self._squares + (values - mean[:, None]).square().sum(dim=1) + shift.square() * self.count * count / total
        )
        self._mean = self._mean + shift * count / total
        self.count = total

    def result(self) -> Normaliser:
        """The normaliser of everything taken in so far."""
        if not self.count:
            raise ValueError("a normaliser needs at least one batch of latents, got none")
        std = (self._squares / self.count).sqrt()
        if not torch.isfinite(std).all():
            raise ValueError(f"a normaliser needs finite latents, got std {std.tolist()}")
        constant = (std == 0).nonzero().flatten().tolist()
        std[constant] = 1.0
        remark = f"; channels {constant} never varied: std 1" if constant else ""
        return Normaliser(
            mean=tuple(self._mean.tolist()),
            std=tuple(std.tolist()),
            formula=f"(latent - mean) / std, measured{remark}",
        )
