"""The bottlenecks by name, as frozen records: what stands between encoder and decoder, and how it is trained.

In:   fields, or JSON with a "name".
Out:  one record per bottleneck; `bottleneck_from_json`.
Cost: none; no torch.
Errors: ValueError names the field that cannot be, with its value.

Schedules count optimiser steps. Weights multiply losses that are means over elements.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


# The log-variances that a posterior may have; beyond them exp leaves float32's useful range.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """What all bottlenecks share: a name, and a say in how many channels the latent has."""

    name: ClassVar[str]

    def check_latent_channels(self, latent_channels: int) -> None:
        """Refuse a latent that this bottleneck cannot make."""


@dataclasses.dataclass(frozen=True)
class NoBottleneck(BottleneckConfig):
    """The features are the latent: a plain autoencoder."""

    name: ClassVar[str] = "none"


@dataclasses.dataclass(frozen=True)
class Kl(BottleneckConfig):
    """A diagonal Gaussian posterior, pulled towards a unit Gaussian prior.

    logvar: one log-variance "per_channel" (and position), one "shared" by all channels of a position, or "fixed".
    fixed_logvar: the value of "fixed".
    beta: weight of the divergence, a mean over latent elements. Higgins et al., 2017.
    free_bits: nats per latent element that cost nothing: each channel's divergence, averaged over the batch and its
        positions, is lowered no further. Kingma et al., arXiv:1606.04934.
    """

    name: ClassVar[str] = "kl"
    logvar: Literal["per_channel", "shared", "fixed"] = "per_channel"
    fixed_logvar: float = -6.0
    beta: float = 1e-6
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        if self.logvar not in ("per_channel", "shared", "fixed"):
            raise ValueError(f"logvar {self.logvar!r} is not one of per_channel, shared, fixed")
        if not LOGVAR_RANGE[0] <= self.fixed_logvar <= LOGVAR_RANGE[1]:
            raise ValueError(
                f"fixed_logvar must be from {LOGVAR_RANGE[0]:g} to {LOGVAR_RANGE[1]:g}, got {self.fixed_logvar}"
            )
        _require_not_negative(self, "beta", "free_bits")


@dataclasses.dataclass(frozen=True)
class Vq(BottleneckConfig):
    """A learned codebook: each position becomes its nearest code. van den Oord et al., arXiv:1711.00937.

    codebook_size: codes, each a vector of the latent's channels.
    update: "ema" averages the features that chose a code; "gradient" learns codes by their own loss.
    ema_decay: of the averages.
    commitment: weight of the pull of features towards their codes.
    revive_below: a code that is chosen less often than this share of the average code is moved to a random feature;
        0 for never. A share, so that it means the same for any batch and number of ranks.
    cosine: compare directions only, codes and features on the unit sphere. Yu et al., arXiv:2110.04627.
    gradient: how the gradient passes the choice: "straight_through", or "rotation" (Fifty et al., arXiv:2410.06424).
    """

    name: ClassVar[str] = "vq"
    codebook_size: int = 1024
    update: Literal["ema", "gradient"] = "ema"
    ema_decay: float = 0.99
    commitment: float = 0.25
    revive_below: float = 0.1
    cosine: bool = False
    gradient: Literal["straight_through", "rotation"] = "straight_through"

    def __post_init__(self) -> None:
        _check_vq(self)


@dataclasses.dataclass(frozen=True)
class ResidualVq(BottleneckConfig):
    """Codebooks in a row, each for what the ones before left over. Zeghidour et al., arXiv:2107.03312.

    num_quantisers: codebooks.
    quantiser_dropout: chance that training decodes a clip from only a random number of the first ones.
    The rest as in Vq, for each codebook. A stored latent is the sum of the codes; from it, ids are searched for.
    """

    name: ClassVar[str] = "residual_vq"
    num_quantisers: int = 4
    quantiser_dropout: float = 0.0
    codebook_size: int = 1024
    update: Literal["ema", "gradient"] = "ema"
    ema_decay: float = 0.99
    commitment: float = 0.25
    revive_below: float = 0.1
    gradient: Literal["straight_through", "rotation"] = "straight_through"

    def __post_init__(self) -> None:
        if self.num_quantisers < 1:
            raise ValueError(f"num_quantisers must be at least 1, got {self.num_quantisers}")
        _require_share(self, "quantiser_dropout")
        _check_vq(self)


@dataclasses.dataclass(frozen=True)
class Fsq(BottleneckConfig):
    """Each channel rounded to a few levels; nothing to learn, nothing to collapse. Mentzer et al., arXiv:2309.15505.

    levels: one count per latent channel, at least 3; the codes are their combinations, at most 2 ** 62.
    """

    name: ClassVar[str] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels must be at least 3 per channel, got {self.levels}: for bits, use lfq")
        if self.codebook_size > 2**62:
            raise ValueError(f"levels {self.levels} make more codes than an int64 id can tell apart: use fewer")

    def check_latent_channels(self, latent_channels: int) -> None:
        if latent_channels != len(self.levels):
            raise ValueError(f"latent_channels must be {len(self.levels)}, one per level of {self.levels}")

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return math.prod(self.levels)


@dataclasses.dataclass(frozen=True)
class Lfq(BottleneckConfig):
    """The sign of each channel: 2 ** channels codes. Yu et al., arXiv:2310.05737.

    spherical: project onto the unit sphere first, so that codes have unit length (BSQ: Zhao et al., arXiv:2406.07548).
    entropy: weight of (entropy per sample - diversity * entropy of the batch's average), in nats per bit, each bit on
        its own, so that memory does not grow with the codes.
    commitment: weight of the pull of features towards their codes.
    temperature: of the soft choice whose entropy it is: a bit is 1 with probability sigmoid(4 * value / temperature),
        the value being 1 on a code.
    """

    name: ClassVar[str] = "lfq"
    spherical: bool = False
    entropy: float = 0.1
    diversity: float = 1.0
    commitment: float = 0.25
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require_not_negative(self, "entropy", "diversity", "commitment")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def check_latent_channels(self, latent_channels: int) -> None:
        if latent_channels > 32:
            raise ValueError(f"lfq needs at most 32 latent channels, one bit each, got {latent_channels}")


@dataclasses.dataclass(frozen=True)
class Gumbel(BottleneckConfig):
    """A categorical latent, relaxed while training. Jang et al., arXiv:1611.01144; Ramesh et al., arXiv:2102.12092.

    temperature -> final_temperature, exponentially, over temperature_steps; kl_weight ramps up from 0 over kl_steps.
    """

    name: ClassVar[str] = "gumbel"
    codebook_size: int = 1024
    temperature: float = 1.0
    final_temperature: float = 0.0625
    temperature_steps: int = 10_000
    kl_weight: float = 1e-4
    kl_steps: int = 5_000

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        for field in ("temperature", "final_temperature", "temperature_steps", "kl_steps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        _require_not_negative(self, "kl_weight")


BOTTLENECK_CONFIGS: dict[str, type[BottleneckConfig]] = {
    kind.name: kind for kind in (NoBottleneck, Kl, Vq, ResidualVq, Fsq, Lfq, Gumbel)
}


def bottleneck_from_json(fields: Mapping[str, Any]) -> BottleneckConfig:
    """Build from {"name": ..., field: value}.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, unknown, or not what it should be.
    """
    name = fields["name"]
    if name not in BOTTLENECK_CONFIGS:
        raise ValueError(f"no bottleneck {name!r}: use one of {', '.join(BOTTLENECK_CONFIGS)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items() if key != "name"}
    return BOTTLENECK_CONFIGS[name](**values)


def _check_vq(config: Vq | ResidualVq) -> None:
    if config.codebook_size < 2:
        raise ValueError(f"codebook_size must be at least 2, got {config.codebook_size}")
    if config.update not in ("ema", "gradient"):
        raise ValueError(f"update {config.update!r} is not one of ema, gradient")
    if config.gradient not in ("straight_through", "rotation"):
        raise ValueError(f"gradient {config.gradient!r} is not one of straight_through, rotation")
    _require_share(config, "ema_decay")
    _require_share(config, "revive_below")
    _require_not_negative(config, "commitment")


def _require_not_negative(config: BottleneckConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def _require_share(config: BottleneckConfig, name: str) -> None:
    if not 0 <= getattr(config, name) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {getattr(config, name)}")
