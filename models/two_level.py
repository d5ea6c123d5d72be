"""An autoencoder with two levels of latents, causal in time. VQ-VAE-2: Razavi et al., arXiv:1906.00446.

In:   pixels, float B 3 T H W in [-1, 1], T = 1 + temporal_stride * k; or a latent B C t h w; strides are the top's.
Out:  as of CausalAutoencoder: a Posterior or pixels. One latent holds both levels: the top's channels, then the
      bottom's, folded by space-to-depth to the top's resolution; C = C_top + volume of the top's strides * C_bottom.
Cost: CausalAutoencoder's; the levels above the bottom are 1 / volume of its size. The top's decoder also encodes.
Errors: GeometryError for clips and chunks off the grid of the top.

    pixels -> encoder -> top encoder -> bottleneck -> top latent -> top decoder -> context
                 |                                                                   |
                 + --------------------------- joined with ------------------------- + -> bottleneck -> bottom latent
    context + bottom latent -> decoder -> pixels

The top sees what is large and slow; the bottom is chosen knowing it, and only has to add the rest. A bottom latent
frame knows the whole group of its top latent frame, which the stored latent keeps in one place: nothing later reaches
either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.autoencoder import CausalAutoencoder, Decoder, Encoder, Reconstruction, start_quiet
from models.blocks import BlockStack, Downsample, ResidualBlock, Upsample
from models.bottlenecks.interface import Bottlenecked
from models.bottlenecks.registry import build_bottleneck
from models.causal import (
    ConvFactory,
    State,
    convolution,
    depth_to_space,
    name_states,
    space_to_depth,
    starts_clip,
)
from models.config import ModelConfig, TemporalMode, TopLevel
from models.spec import Posterior


class TopEncoder(nn.Module):
    """The bottom's features, B width t h w, to those of the top's bottleneck, coarser level by level."""

    def __init__(self, config: TopLevel, width: int, channels_out: int, convs: Sequence[ConvFactory]) -> None:
        super().__init__()
        channels = (width, *config.channels)
        blocks: list[nn.Module] = []
        for level, down in enumerate(config.downs):
            blocks.append(Downsample(channels[level], channels[level + 1], *down, convs[level]))
            blocks += [ResidualBlock(channels[level + 1], convs[level + 1]) for _ in range(config.depth)]
        self.blocks = BlockStack(blocks)
        self.conv_out = convs[-1](channels[-1], channels_out)

    def forward(self, features: Tensor, state: State | None) -> Tensor:
        output: Tensor = self.conv_out(self.blocks(features, state), state)
        return output


class TopDecoder(nn.Module):
    """The top's latent to what the bottom knows of it: context, B width t h w at the bottom's resolution."""

    def __init__(self, config: TopLevel, width: int, convs: Sequence[ConvFactory]) -> None:
        super().__init__()
        channels = (width, *config.channels)
        self.conv_in = convs[-1](config.latent_channels, channels[-1])
        blocks: list[nn.Module] = []
        for level, down in reversed(list(enumerate(config.downs, start=1))):
            blocks += [ResidualBlock(channels[level], convs[level]) for _ in range(config.depth)]
            blocks.append(Upsample(channels[level], channels[level - 1], *down, convs[level]))
        self.blocks = BlockStack(blocks)

    def forward(self, latent: Tensor, state: State | None) -> Tensor:
        context: Tensor = self.blocks(self.conv_in(latent, state), state)
        return context


class TwoLevelAutoencoder(CausalAutoencoder):
    """The autoencoder that a ModelConfig with a `top` describes; streams and state are as of CausalAutoencoder.

    `bottleneck` is the bottom's. Both are built from one record, each with codes of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.top is None:
            raise ValueError("a two-level autoencoder needs a config with a top, got one without")
        super().__init__(config)
        self.top = config.top
        width = config.backbone.encoder.channels[-1]
        latent_channels = config.backbone.latent_channels
        self.encoder = Encoder(config.backbone, width)
        self.decoder = Decoder(dataclasses.replace(config.backbone, latent_channels=latent_channels + width))
        self.top_bottleneck = build_bottleneck(config.bottleneck, self.top.latent_channels)
        convs = _convolutions(config.backbone.temporal_mode, self.top)
        self.top_encoder = TopEncoder(self.top, width, self.top_bottleneck.channels_in, convs)
        self.top_decoder = TopDecoder(self.top, width, convs)
        self.to_bottom = convs[0](2 * width, self.bottleneck.channels_in)
        name_states(self)
        start_quiet(self.top_encoder.conv_out, self.top_bottleneck)
        start_quiet(self.to_bottom, self.bottleneck)
        self.lay_out()

    def forward(self, pixels: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Reconstruction:
        """One pass over whole clips, as training makes it; features, latent and ids hold both levels, joined."""
        self.config.geometry.latent_shape(*pixels.shape[2:])
        features = self.encoder(pixels, None)
        top_features = self.top_encoder(features, None)
        top = self.top_bottleneck(top_features, step=step, generator=generator)
        context = self.top_decoder(top.latent, None)
        bottom_features = self.to_bottom(torch.cat([features, context], dim=1), None)
        bottom = self.bottleneck(bottom_features, step=step, generator=generator)
        pixels = self.decoder(torch.cat([bottom.latent, context], dim=1), None)
        return Reconstruction(pixels, self.join(top_features, bottom_features), self._join_bottlenecked(top, bottom))

    def to_posterior(self, features: Tensor, state: State | None) -> Posterior:
        first = starts_clip(self.to_bottom, state)
        top = self.top_bottleneck.posterior(self.top_encoder(features, state))
        context = self.top_decoder(top.mean.to(features.dtype), state)
        bottom = self.bottleneck.posterior(self.to_bottom(torch.cat([features, context], dim=1), state))
        logvar = None
        if top.logvar is not None and bottom.logvar is not None:
            logvar = self.join(top.logvar, bottom.logvar, first=first)
        return Posterior(self.join(top.mean, bottom.mean, first=first), logvar)

    def to_pixels(self, latent: Tensor, state: State | None) -> Tensor:
        top, bottom = self.split(latent, first=starts_clip(self.top_decoder.conv_in, state))
        context = self.top_decoder(top, state)
        pixels: Tensor = self.decoder(torch.cat([bottom, context], dim=1), state)
        return pixels

    def join(self, top: Tensor, bottom: Tensor, *, first: bool = True) -> Tensor:
        """Both levels as one grid at the top's resolution, the top's channels first.

        With `first`, the grids are a clip's first: the bottom's first frame fills a whole group, repeated.
        """
        return torch.cat([top, space_to_depth(bottom, *self.top.strides, first=first)], dim=1)

    def split(self, joined: Tensor, *, first: bool = True) -> tuple[Tensor, Tensor]:
        """The top and the bottom of a stored latent, B C t h w: exactly what `join` took."""
        top, bottom = joined.tensor_split([self.top.latent_channels], dim=1)
        return top, depth_to_space(bottom, *self.top.strides, first=first)

    def latent_to_ids(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of both levels, top and bottom, int64 B L t h w each, of a whole stored latent of a clip."""
        top, bottom = self.split(latent)
        return self.top_bottleneck.latent_to_ids(top), self.bottleneck.latent_to_ids(bottom)

    def ids_to_latent(self, ids: tuple[Tensor, Tensor]) -> Tensor:
        """The stored latent, B C t h w, of the ids of a whole clip, top and bottom."""
        top, bottom = ids
        return self.join(self.top_bottleneck.ids_to_latent(top), self.bottleneck.ids_to_latent(bottom))

    def _join_bottlenecked(self, top: Bottlenecked, bottom: Bottlenecked) -> Bottlenecked:
        ids = None if top.ids is None or bottom.ids is None else self.join(top.ids, bottom.ids)
        statistics = {
            f"{level}_{name}": value
            for level, part in (("top", top), ("bottom", bottom))
            for name, value in part.statistics.items()
        }
        return Bottlenecked(self.join(top.latent, bottom.latent), top.loss + bottom.loss, ids, statistics)


def _convolutions(mode: TemporalMode, top: TopLevel) -> list[ConvFactory]:
    """What each level's convolutions see in time, the bottom's first; a group is that of a latent frame of the top."""
    temporal = [stride for stride, _ in top.downs]
    return [convolution(mode, math.prod(temporal[level:])) for level in range(len(temporal) + 1)]
