"""What is written down of one diffusers class, and the normalisers that classes share.

In:   a diffusers config.
Out:  EncoderRule; Normaliser.
Cost: none.
Errors: KeyError, TypeError or ValueError for a config that is not of its class; models.pretrained.directory names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.spec import Geometry, Normaliser
from models.streamed import Backend, StreamingBackend
from models.whole import WholeBackend

Config = Mapping[str, Any]

LOGVAR_RANGE = (-30.0, 20.0)
"""What diffusers clamps a posterior's log-variance to."""


def gaussian_mean(vae: Any, clip: Tensor) -> Tensor:
    """The untouched module's own latent of pixels B 3 T H W."""
    mean: Tensor = vae.encode(clip).latent_dist.mode()
    return mean


def always(_: Config) -> bool:
    """Whatever the config says."""
    return True


def never(_: Config) -> bool:
    """Whatever the config says."""
    return False


@dataclasses.dataclass(frozen=True)
class EncoderRule:
    """What is known of one diffusers class. All of them take pixels in [-1, 1].

    A class has `streamed` when it can take a clip in chunks, else `whole`. `reference` is the untouched module's own
    latent, with which a streamed one is compared. `normaliser_fields` and `normaliser_tensors` stay out of the
    fingerprint: they do not change a latent. `posterior` says whether a config's encoder has a log-variance.
    """

    geometry: Callable[[Config], Geometry]
    normaliser: Callable[[Config, Path], Normaliser]
    streamed: Callable[[Any], Backend | StreamingBackend] | None = None
    whole: Callable[[Any], WholeBackend] | None = None
    reference: Callable[[Any, Tensor], Tensor] = gaussian_mean
    posterior: Callable[[Config], bool] = always
    normaliser_fields: frozenset[str] = frozenset()
    normaliser_tensors: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if (self.streamed is None) == (self.whole is None):
            raise ValueError("a class either streams or takes a clip whole: give one of streamed and whole")


def channel_normaliser(mean: Iterable[float], std: Iterable[float], scale: float, formula: str) -> Normaliser:
    """(z - mean) * scale / std, each a sequence of one number per channel."""
    return Normaliser(
        tuple(float(value) for value in mean), tuple(float(value) / scale for value in std), formula=formula
    )


def scalar_normaliser(channels: int, scale: float, shift: float = 0.0) -> Normaliser:
    """(z - shift) * scale, the same for all channels."""
    shifted = "latent" if shift == 0.0 else f"(latent - {shift})"
    formula = f"{shifted} * {scale}, of the config"
    return Normaliser((shift,) * channels, (1 / scale,) * channels, formula=formula)


def scaling_factor_normaliser(config: Config, _weights: Path) -> Normaliser:
    """Latent * scaling_factor, for configs with `latent_channels`."""
    return scalar_normaliser(config["latent_channels"], float(config["scaling_factor"]))


SCALING_FACTOR = frozenset({"scaling_factor"})
