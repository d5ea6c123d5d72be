"""Per-channel mean and standard deviation of latents, in one exact streaming pass, over any number of processes.

In:   latents B C t h w, batch by batch; other meters, as one tensor each.
Out:  a Normaliser.
Cost: two float64 vectors of C, whatever the number of batches.
Errors: ValueError when no latent came, values are not finite, or channels do not match.

A channel that never varied (a collapsed code, a bit that never flips) has std 1, and the formula names it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.spec import Normaliser


class NormaliserMeter:
    """Welford's algorithm over batches, merged as in Chan, Golub and LeVeque (1979).

    Attributes:
        count: positions taken in, of every channel alike.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, state: Tensor) -> NormaliserMeter:
        """The meter that gave this tensor."""
        meter = cls()
        counts, meter._mean, meter._squares = state.to("cpu", torch.float64).unbind()
        meter.count = int(counts[0])
        return meter

    def as_tensor(self) -> Tensor:
        """All that there is to know, float64 3 x C, as ranks exchange it: counts, means, sums of squared deviations.

        Raises:
            ValueError: nothing came yet, so that C is unknown.
        """
        self._check_not_empty()
        return torch.stack([torch.full_like(self._mean, self.count), self._mean, self._squares])

    def update(self, latents: Tensor) -> None:
        """Take in one batch, B C t h w."""
        batch = NormaliserMeter()
        values = latents.detach().to("cpu", torch.float64).movedim(1, 0).flatten(1)
        batch.count = values.shape[1]
        batch._mean = values.mean(dim=1)
        batch._squares = (values - batch._mean[:, None]).square().sum(dim=1)
        self.merge(batch)

    def merge(self, other: NormaliserMeter) -> None:
        """Take in all that another meter has; it stays as it is."""
        if not other.count:
            return
        if not self.count:
            self.count, self._mean, self._squares = other.count, other._mean, other._squares
            return
        if len(self._mean) != len(other._mean):
            raise ValueError(f"a normaliser of {len(self._mean)} channels was given {len(other._mean)}")
        total = self.count + other.count
        shift = other._mean - self._mean
        self._squares = self._squares + other._squares + shift.square() * (self.count * other.count / total)
        self._mean = self._mean + shift * (other.count / total)
        self.count = total

    def result(self) -> Normaliser:
        """The normaliser of everything taken in so far."""
        self._check_not_empty()
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

    def _check_not_empty(self) -> None:
        if not self.count:
            raise ValueError("a normaliser needs at least one batch of latents, got none")
