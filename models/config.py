"""What our causal video autoencoders are built from, as frozen records, and the presets.

In:   a block list: patch size, (temporal, spatial) downs, channels per level, depth; a bottleneck; or both as JSON.
Out:  BackboneConfig, from which strides and geometry are derived; ModelConfig; PRESETS by name.
Cost: none; no torch.
Errors: ValueError names the field that cannot be, with its value.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from models.bottlenecks.config import BottleneckConfig, Kl, bottleneck_from_json
from models.spec import Geometry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TemporalMode = Literal["causal", "chunk_causal", "frame"]


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
class BackboneConfig:
    """Encoder and decoder without the bottleneck between them.

    patch_size: pixels per side that are folded into channels before the first convolution.
    downs: (temporal, spatial) stride of each step from one level to the next coarser one.
    encoder, decoder: one channel count per level, so one more than there are downs.
    temporal_mode: what a layer sees. "causal": its own frame and those before; "chunk_causal": also on to the end of
        its own latent frame's group; "frame": its own frame alone, so that every temporal stride must be 1.
    attention: self-attention within each frame of the coarsest level, in both halves.
    """

    patch_size: int
    downs: tuple[tuple[int, int], ...]
    encoder: Pyramid
    decoder: Pyramid
    latent_channels: int
    temporal_mode: TemporalMode = "causal"
    attention: bool = False

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.latent_channels < 1:
            raise ValueError(f"must be at least 1, got {self.patch_size=} {self.latent_channels=}")
        if any(len(down) != 2 or min(down) < 1 for down in self.downs):
            raise ValueError(f"downs are (temporal, spatial) strides of at least 1, got {self.downs}")
        if self.temporal_mode not in typing.get_args(TemporalMode):
            modes = ", ".join(typing.get_args(TemporalMode))
            raise ValueError(f"temporal_mode {self.temporal_mode!r} is not one of {modes}")
        if self.temporal_mode == "frame" and self.geometry.temporal_stride > 1:
            raise ValueError(f"temporal_mode 'frame' needs temporal strides of 1, got downs {self.downs}")
        for name, pyramid in (("encoder", self.encoder), ("decoder", self.decoder)):
            if len(pyramid.channels) != len(self.downs) + 1:
                raise ValueError(
                    f"{name}.channels needs {len(self.downs) + 1} levels for {len(self.downs)} downs, "
                    f"got {pyramid.channels}"
                )
            _check_shortcuts(name, self.downs, pyramid.channels, averaged=name == "encoder")

    @property
    def level_strides(self) -> tuple[tuple[int, int], ...]:
        """Of each level, finest first: frames of a latent frame's group, and pixels per side of a position."""
        frames, pixels = math.prod(temporal for temporal, _ in self.downs), self.patch_size
        strides = [(frames, pixels)]
        for temporal, spatial in self.downs:
            frames, pixels = frames // temporal, pixels * spatial
            strides.append((frames, pixels))
        return tuple(strides)

    @property
    def geometry(self) -> Geometry:
        """Strides, latent channels and causality that follow from the block list."""
        return Geometry(
            temporal_stride=math.prod(temporal for temporal, _ in self.downs),
            spatial_stride=self.patch_size * math.prod(spatial for _, spatial in self.downs),
            channels=self.latent_channels,
        )


@dataclasses.dataclass(frozen=True)
class TopLevel:
    """A second, coarser latent above the backbone's own, as in VQ-VAE-2. Razavi et al., arXiv:1906.00446.

    downs: (temporal, spatial) stride of each step up from the backbone's coarsest level.
    channels: one count per down. depth: residual blocks after each down, and before each up.
    latent_channels: of the top's latent; the backbone's latent_channels are the bottom's.
    """

    downs: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    depth: int
    latent_channels: int

    def __post_init__(self) -> None:
        if not self.downs or any(len(down) != 2 or min(down) < 1 for down in self.downs):
            raise ValueError(f"top.downs are one or more (temporal, spatial) strides of at least 1, got {self.downs}")
        if len(self.channels) != len(self.downs) or min(self.channels) < 1:
            raise ValueError(f"top.channels needs one count per down of {self.downs}, got {self.channels}")
        if self.depth < 1 or self.latent_channels < 1:
            raise ValueError(f"must be at least 1, got top.depth {self.depth}, {self.latent_channels=}")

    @property
    def strides(self) -> tuple[int, int]:
        """(temporal, spatial) stride from the bottom's latent to the top's."""
        return math.prod(temporal for temporal, _ in self.downs), math.prod(spatial for _, spatial in self.downs)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole autoencoder: what a checkpoint's weights fit.

    kind: which of models.kinds it is; a name for people, of no consequence to the arithmetic.
    top: a second level of latents, through a bottleneck of its own of the same settings; None for one level.
    """

    backbone: BackboneConfig
    bottleneck: BottleneckConfig = Kl()
    kind: str = "vae"
    top: TopLevel | None = None

    def __post_init__(self) -> None:
        self.bottleneck.check_latent_channels(self.backbone.latent_channels)
        if self.top is not None:
            self._check_top(self.top)

    def _check_top(self, top: TopLevel) -> None:
        self.bottleneck.check_latent_channels(top.latent_channels)
        if self.backbone.temporal_mode == "frame" and top.strides[0] > 1:
            raise ValueError(f"temporal_mode 'frame' needs temporal strides of 1, got top.downs {top.downs}")
        channels = (self.backbone.encoder.channels[-1], *top.channels)
        _check_shortcuts("top", top.downs, channels, averaged=True)

    @property
    def geometry(self) -> Geometry:
        """How pixels map to the latent that is stored: of two levels, at the top's strides, the bottom folded in."""
        bottom = self.backbone.geometry
        if self.top is None:
            return bottom
        temporal, spatial = self.top.strides
        return dataclasses.replace(
            bottom,
            temporal_stride=bottom.temporal_stride * temporal,
            spatial_stride=bottom.spatial_stride * spatial,
            channels=self.top.latent_channels + temporal * spatial**2 * bottom.channels,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` reads them back."""
        return {
            "kind": self.kind,
            "backbone": dataclasses.asdict(self.backbone),
            "bottleneck": {"name": self.bottleneck.name, **dataclasses.asdict(self.bottleneck)},
            **({"top": dataclasses.asdict(self.top)} if self.top is not None else {}),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Build from `as_json`, or from JSON that a person wrote.

        Raises:
            ValueError: a field is missing, unknown, or not what it should be.
        """
        try:
            return cls(
                **{
                    **fields,
                    "backbone": _backbone_from_json(fields["backbone"]),
                    "bottleneck": bottleneck_from_json(fields["bottleneck"]),
                    "top": _top_from_json(fields["top"]) if fields.get("top") is not None else None,
                }
            )
        except KeyError as error:
            raise ValueError(f"a model config lacks the field {error}") from error
        except TypeError as error:
            raise ValueError(f"not a model config: {error}") from error


def _check_shortcuts(
    name: str, downs: tuple[tuple[int, int], ...], channels: tuple[int, ...], *, averaged: bool
) -> None:
    """Refuse levels whose channels a shortcut cannot average (on the way down) or duplicate (on the way up)."""
    for (temporal, spatial), finer, coarser in zip(downs, channels, channels[1:], strict=False):
        volume = temporal * spatial**2
        if finer * volume % coarser or (averaged and coarser % volume):
            raise ValueError(
                f"{name}.channels {finer} -> {coarser} with stride {temporal}x{spatial}x{spatial}: {coarser} must "
                f"divide {finer * volume}" + (f" and be a multiple of {volume}" if averaged else "")
            )


def _backbone_from_json(fields: Mapping[str, Any]) -> BackboneConfig:
    pyramids = {
        name: Pyramid(channels=tuple(fields[name]["channels"]), depth=fields[name]["depth"])
        for name in ("encoder", "decoder")
    }
    return BackboneConfig(**{**fields, **pyramids, "downs": _downs_from_json(fields["downs"])})


def _top_from_json(fields: Mapping[str, Any]) -> TopLevel:
    downs, channels = _downs_from_json(fields["downs"]), tuple(fields["channels"])
    return TopLevel(**{**fields, "downs": downs, "channels": channels})


def _downs_from_json(downs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((temporal, spatial) for temporal, spatial in downs)


PRESETS: Mapping[str, BackboneConfig] = MappingProxyType(
    {
        "tiny-4x8x8x16": BackboneConfig(
            patch_size=2,
            downs=((2, 2), (2, 2)),
            encoder=Pyramid(channels=(16, 32, 64), depth=1),
            decoder=Pyramid(channels=(16, 32, 64), depth=1),
            latent_channels=16,
        ),
        "tiny-8x32x32x128": BackboneConfig(
            patch_size=4,
            downs=((2, 2), (2, 2), (2, 2)),
            encoder=Pyramid(channels=(32, 64, 128, 128), depth=1),
            decoder=Pyramid(channels=(32, 64, 128, 128), depth=1),
            latent_channels=128,
        ),
        "base-4x8x8x16": BackboneConfig(
            patch_size=2,
            downs=((2, 2), (2, 2)),
            encoder=Pyramid(channels=(96, 192, 384), depth=2),
            decoder=Pyramid(channels=(128, 256, 512), depth=2),
            latent_channels=16,
        ),
        "base-4x16x16x48": BackboneConfig(
            patch_size=4,
            downs=((2, 2), (2, 2)),
            encoder=Pyramid(channels=(128, 256, 512), depth=2),
            decoder=Pyramid(channels=(160, 320, 640), depth=2),
            latent_channels=48,
        ),
        "base-8x32x32x128": BackboneConfig(
            patch_size=4,
            downs=((2, 2), (2, 2), (2, 2)),
            encoder=Pyramid(channels=(128, 256, 512, 512), depth=2),
            decoder=Pyramid(channels=(128, 256, 512, 512), depth=3),
            latent_channels=128,
        ),
        "image-1x8x8x16": BackboneConfig(
            patch_size=2,
            downs=((1, 2), (1, 2)),
            encoder=Pyramid(channels=(96, 192, 384), depth=2),
            decoder=Pyramid(channels=(128, 256, 512), depth=3),
            latent_channels=16,
            temporal_mode="frame",
        ),
    }
)


def preset(name: str) -> BackboneConfig:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
