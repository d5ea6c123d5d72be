"""What a backbone costs, worked out from its config alone: parameters, and multiply-accumulates of a clip.

In:   a BackboneConfig, and the features that its bottleneck takes of the encoder.
Out:  the layers of each half; parameter counts; multiply-accumulates, exact for whole clips, and per pixel.
Cost: arithmetic over some dozens of layers; no torch.
Errors: GeometryError for a clip off the grid.

Norms, activations and shortcuts make no multiply-accumulates here. A streamed clip costs the same as a whole one, but
for the filling of its last chunk.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.config import BackboneConfig

Half = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, or the attention within frames, and the norm before it.

    taps: input positions that one output position of a convolution is computed from; 0 marks attention.
    group_frames, position_pixels: frames of a latent frame's group, and pixels per side of a position, at its level.
    """

    channels_in: int
    channels_out: int
    taps: int
    group_frames: int
    position_pixels: int
    has_norm: bool

    @property
    def parameters(self) -> int:
        """Weights, biases and the norm's scales."""
        norm = self.channels_in if self.has_norm else 0
        if self.taps:
            return norm + (self.channels_in * self.taps + 1) * self.channels_out
        return norm + 4 * (self.channels_in + 1) * self.channels_in  # query, key, value and projection

    def macs(self, latent_frames: int, height: int, width: int) -> int:
        """Multiply-accumulates for a clip of that many latent frames, the leading one among them."""
        frames = 1 + self.group_frames * (latent_frames - 1)
        positions = (height // self.position_pixels) * (width // self.position_pixels)
        if self.taps:
            return frames * positions * self.channels_in * self.channels_out * self.taps
        return frames * positions * self.channels_in * (4 * self.channels_in + 2 * positions)


def layers(config: BackboneConfig, half: Half, features: int | None = None) -> tuple[Layer, ...]:
    """The layers of the encoder or the decoder, in no particular order.

    features: what the encoder gives its bottleneck; None for a Gaussian's mean and log-variance.
    """
    pyramid = config.encoder if half == "encoder" else config.decoder
    taps, coarsest = 9 if config.temporal_mode == "frame" else 27, len(config.downs)
    found = [
        Layer(channels_in, channels_out, taps, *config.level_strides[level], has_norm=False)
        for channels_in, channels_out, level in _ends(config, half, features or 2 * config.latent_channels)
    ]
    for level, width in enumerate(pyramid.channels):
        found += [Layer(width, width, taps, *config.level_strides[level], has_norm=True)] * (2 * pyramid.depth)
    for channels_in, channels_out, level in _steps(config, half):
        found.append(Layer(channels_in, channels_out, taps, *config.level_strides[level], has_norm=True))
    if config.attention:
        width = pyramid.channels[-1]
        found.append(Layer(width, width, 0, *config.level_strides[coarsest], has_norm=True))
    return tuple(found)


def _ends(config: BackboneConfig, half: Half, features: int) -> Iterator[tuple[int, int, int]]:
    """(channels in, channels out, level) of the first and the last convolution."""
    patch_channels, coarsest = 3 * config.patch_size**2, len(config.downs)
    if half == "encoder":
        yield patch_channels, config.encoder.channels[0], 0
        yield config.encoder.channels[-1], features, coarsest
    else:
        yield config.latent_channels, config.decoder.channels[-1], coarsest
        yield config.decoder.channels[0], patch_channels, 0


def _steps(config: BackboneConfig, half: Half) -> Iterator[tuple[int, int, int]]:
    """(channels in, channels out, level) between levels: a down's on the finer one, an up's on the coarser."""
    channels = config.encoder.channels if half == "encoder" else config.decoder.channels
    for level, (temporal, spatial) in enumerate(config.downs):
        volume, finer, coarser = temporal * spatial**2, channels[level], channels[level + 1]
        if half == "encoder":
            yield finer, coarser // volume, level
        else:
            yield coarser, finer * volume, level + 1


def parameters(config: BackboneConfig, half: Half, features: int | None = None) -> int:
    """Parameters of the encoder or the decoder; the bottleneck's own are not among them."""
    return sum(layer.parameters for layer in layers(config, half, features))


def macs(config: BackboneConfig, half: Half, shape: tuple[int, int, int], features: int | None = None) -> int:
    """Multiply-accumulates of encoding or decoding one whole clip of T x H x W pixels."""
    _, latent_frames, _, _ = config.geometry.latent_shape(*shape)
    return sum(layer.macs(latent_frames, *shape[1:]) for layer in layers(config, half, features))


def kmacs_per_pixel(
    config: BackboneConfig, half: Half, height: int = 512, width: int = 512, features: int | None = None
) -> float:
    """Thousands of multiply-accumulates per pixel of a long clip. Without attention, H and W make no difference."""
    stride = config.geometry.temporal_stride
    image, clip = (macs(config, half, (frames, height, width), features) for frames in (1, 1 + stride))
    return (clip - image) / (stride * height * width) / 1000
