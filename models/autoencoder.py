"""Our causal video autoencoder: one backbone, whole clips or chunks, the state always in the caller's hands.

In:   pixels, float B 3 T H W in [-1, 1], T = 1 + temporal_stride * k; or a latent B C t h w.
Out:  a Posterior, or pixels of the same size as went in.
Cost: encode_chunk and decode_chunk hold one chunk's activations and a state that does not grow with T.
Errors: GeometryError when a clip or a chunk is not on the grid, with the nearest sizes.

The module keeps nothing between calls, so one module serves any number of streams (models.streamed) and threads.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from models.blocks import BlockStack, Downsample, FrameAttention, ResidualBlock, Upsample
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.bottlenecks.registry import build_bottleneck
from models.causal import (
    ConvFactory,
    State,
    TemporalConv3d,
    convolution,
    depth_to_space,
    name_states,
    space_to_depth,
)
from models.config import BackboneConfig, ModelConfig
from models.spec import GeometryError, Posterior


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A training pass: pixels B 3 T H W, the features B F t h w, and what the bottleneck made of them."""

    pixels: Tensor
    features: Tensor
    bottlenecked: Bottlenecked


class Encoder(nn.Module):
    """Pixels to bottleneck features, coarser level by level."""

    def __init__(self, config: BackboneConfig, channels_out: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.encoder.channels
        convs = _convolutions(config)
        self.conv_in = convs[0](3 * config.patch_size**2, channels[0])
        blocks: list[nn.Module] = []
        for level, width in enumerate(channels):
            if level:
                blocks.append(Downsample(channels[level - 1], width, *config.downs[level - 1], convs[level - 1]))
            blocks += [ResidualBlock(width, convs[level]) for _ in range(config.encoder.depth)]
        if config.attention:
            blocks.append(FrameAttention(channels[-1]))
        self.blocks = BlockStack(blocks)
        self.conv_out = convs[-1](channels[-1], channels_out)

    def forward(self, pixels: Tensor, state: State | None) -> Tensor:
        patches = space_to_depth(pixels, 1, self.patch_size)
        x = self.conv_in(patches.contiguous(memory_format=torch.channels_last_3d), state)
        output: Tensor = self.conv_out(self.blocks(x, state), state)
        return output


class Decoder(nn.Module):
    """A latent to pixels, finer level by level."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.decoder.channels
        convs = _convolutions(config)
        self.conv_in = convs[-1](config.latent_channels, channels[-1])
        blocks: list[nn.Module] = [FrameAttention(channels[-1])] if config.attention else []
        for level in reversed(range(len(channels))):
            blocks += [ResidualBlock(channels[level], convs[level]) for _ in range(config.decoder.depth)]
            if level:
                blocks.append(Upsample(channels[level], channels[level - 1], *config.downs[level - 1], convs[level]))
        self.blocks = BlockStack(blocks)
        self.conv_out = convs[0](channels[0], 3 * config.patch_size**2)

    def forward(self, latent: Tensor, state: State | None) -> Tensor:
        x = self.conv_in(latent.contiguous(memory_format=torch.channels_last_3d), state)
        return depth_to_space(self.conv_out(self.blocks(x, state), state), 1, self.patch_size)


def _convolutions(config: BackboneConfig) -> list[ConvFactory]:
    """What each level's convolutions see in time, finest level first."""
    return [convolution(config.temporal_mode, group_frames) for group_frames, _ in config.level_strides]


def start_quiet(conv: TemporalConv3d, bottleneck: Bottleneck) -> None:
    """Start an encoder's last convolution where its bottleneck wants the features to be."""
    bias = bottleneck.initial_features()
    if bias is None:
        return
    assert conv.conv.bias is not None
    with torch.no_grad():
        conv.conv.weight[bias != 0] = 0.0
        conv.conv.bias.copy_(bias)


class CausalAutoencoder(nn.Module):
    """The autoencoder that a ModelConfig describes. Build it under `torch.manual_seed` for repeatable weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.bottleneck = build_bottleneck(config.bottleneck, config.backbone.latent_channels)
        self.encoder = Encoder(config.backbone, self.bottleneck.channels_in)
        self.decoder = Decoder(config.backbone)
        name_states(self)
        start_quiet(self.encoder.conv_out, self.bottleneck)
        self.lay_out()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps little between its two passes and computes it again: less memory, a third more work.

        A switch of the process that trains, no part of the model: results, weights and fingerprint are the same.
        """
        return any(stack.gradient_checkpointing for stack in self._block_stacks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        for stack in self._block_stacks():
            stack.gradient_checkpointing = enabled

    def _block_stacks(self) -> list[BlockStack]:
        return [module for module in self.modules() if isinstance(module, BlockStack)]

    def lay_out(self) -> None:
        """Put the channels of convolution weights innermost: 1.2 to 4 times faster on a CPU."""
        for weight in self.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute there, in that dtype. Bottlenecks stay in float32: a stored latent is made of their very codes."""
        self.to(device)
        for part in self.children():
            if not isinstance(part, Bottleneck):
                part.to(dtype)

    def forward(self, pixels: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Reconstruction:
        """Encode, pass the bottleneck as training does at that step, decode: one pass over whole clips."""
        self.config.geometry.latent_shape(*pixels.shape[2:])
        features = self.encoder(pixels, None)
        bottlenecked = self.bottleneck(features, step=step, generator=generator)
        return Reconstruction(self.to_pixels(bottlenecked.latent, None), features, bottlenecked)

    def to_posterior(self, features: Tensor, state: State | None) -> Posterior:
        """What the encoder's features B F t h w say of the latent; the step between encoder and store."""
        return self.bottleneck.posterior(features)

    def to_pixels(self, latent: Tensor, state: State | None) -> Tensor:
        """The pixels B 3 T H W of a stored latent B C t h w, not clamped."""
        pixels: Tensor = self.decoder(latent, state)
        return pixels

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode whole clips at once."""
        self.config.geometry.latent_shape(*pixels.shape[2:])
        return self.to_posterior(self.encoder(pixels, None), None)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode whole latents at once; pixels are not clamped."""
        return self.to_pixels(latent, None)

    def encode_chunk(self, pixels: Tensor, state: State) -> tuple[Posterior, State]:
        """Encode the next frames of a clip: 1 + stride * k of them when `state` is empty, then stride * k.

        The state that is passed in is left as it was, so a stream can be resumed from it again.
        """
        geometry = self.config.geometry
        lead = 0 if state else int(geometry.leading_frame)
        num_frames = pixels.shape[2]
        if num_frames < 1 or (num_frames - lead) % geometry.temporal_stride:
            rule = geometry.frame_rule if lead else f"{geometry.temporal_stride}k"
            place = "the first chunk" if lead else "a later chunk"
            raise GeometryError(f"{place} of a stream has {rule} frames, got {num_frames}")
        geometry.latent_shape(1, *pixels.shape[3:])
        state = dict(state)
        return self.to_posterior(self.encoder(pixels, state), state), state

    def decode_chunk(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latent frames: the first gives one frame of pixels, every other `temporal_stride`."""
        state = dict(state)
        return self.to_pixels(latent, state), state
