"""The shape of our causal video autoencoder, as one frozen record, and the presets.

In:   a block list: patch size, (temporal, spatial) downs, channels per level, depth; or that as JSON.
Out:  VaeConfig, from which strides and geometry are derived; PRESETS by name.
Cost: none; no torch.
Errors: ValueError names the field that cannot be, with its value.
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from models.spec import Geometry

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """One half of the autoencoder: channels of each level, finest level first, and residual blocks per level."""

    channels: tuple[int, ...]
    depth: int

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"a pyramid's channels must be at least 1 at every level, got {self.channels}")
        if self.depth < 1:
            raise ValueError(f"a pyramid's depth must be at least 1, got {self.depth}")


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Everything that the autoencoder is built from.

    patch_size: pixels per side that are folded into channels before the first convolution.
    downs: (temporal, spatial) stride of each step from one level to the next coarser one.
    encoder, decoder: one channel count per level, so one more than there are downs.
    """

    patch_size: int
    downs: tuple[tuple[int, int], ...]
    encoder: Pyramid
    decoder: Pyramid
    latent_channels: int
    bottleneck: str = "kl"

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.latent_channels < 1:
            raise ValueError(f"must be at least 1, got {self.patch_size=} {self.latent_channels=}")
        if any(len(down) != 2 or min(down) < 1 for down in self.downs):
            raise ValueError(f"downs are (temporal, spatial) strides of at least 1, got {self.downs}")
        for name, pyramid in (("encoder", self.encoder), ("decoder", self.decoder)):
            if len(pyramid.channels) != len(self.downs) + 1:
                raise ValueError(
                    f"{name}.channels needs {len(self.downs) + 1} levels for {len(self.downs)} downs, "
                    f"got {pyramid.channels}"
                )
            self._check_shortcuts(name, pyramid)

    def _check_shortcuts(self, name: str, pyramid: Pyramid) -> None:
        levels = zip(self.downs, pyramid.channels, pyramid.channels[1:], strict=False)
        for (temporal, spatial), finer, coarser in levels:
            volume = temporal * spatial**2
            if finer * volume % coarser or (name == "encoder" and coarser % volume):
                raise ValueError(
                    f"{name}.channels {finer} -> {coarser} with stride {temporal}x{spatial}x{spatial}: {coarser} must "
                    f"divide {finer * volume}" + (f" and be a multiple of {volume}" if name == "encoder" else "")
                )

    @property
    def geometry(self) -> Geometry:
        """Strides, latent channels and causality that follow from the block list."""
        return Geometry(
            temporal_stride=math.prod(temporal for temporal, _ in self.downs),
            spatial_stride=self.patch_size * math.prod(spatial for _, spatial in self.downs),
            channels=self.latent_channels,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> VaeConfig:
        """Build from `as_json`, or from JSON that a person wrote.

        Raises:
            ValueError: a field is missing, unknown, or not what it should be.
        """
        try:
            pyramids = {
                name: Pyramid(channels=tuple(fields[name]["channels"]), depth=fields[name]["depth"])
                for name in ("encoder", "decoder")
            }
            downs = tuple((temporal, spatial) for temporal, spatial in fields["downs"])
            return cls(**{**fields, **pyramids, "downs": downs})
        except KeyError as error:
            raise ValueError(f"a model config lacks the field {error}") from error
        except TypeError as error:
            raise ValueError(f"not a model config: {error}") from error


PRESETS: Mapping[str, VaeConfig] = MappingProxyType(
    {
        "tiny-4x8x8x16": VaeConfig(
            patch_size=2,
            downs=((2, 2), (2, 2)),
            encoder=Pyramid(channels=(16, 32, 64), depth=1),
            decoder=Pyramid(channels=(16, 32, 64), depth=1),
            latent_channels=16,
        ),
        "tiny-8x32x32x128": VaeConfig(
            patch_size=4,
            downs=((2, 2), (2, 2), (2, 2)),
            encoder=Pyramid(channels=(32, 64, 128, 128), depth=1),
            decoder=Pyramid(channels=(32, 64, 128, 128), depth=1),
            latent_channels=128,
        ),
    }
)


def preset(name: str) -> VaeConfig:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
