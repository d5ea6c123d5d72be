"""Our causal video autoencoder: one backbone, whole clips or streams, the state always in the caller's hands.

In:   pixels, float B 3 T H W in [-1, 1], T = 1 + temporal_stride * k; or a latent B C t h w.
Out:  a Posterior, or pixels of the same size as went in.
Cost: encode and decode of a stream hold one chunk's activations and a state that does not grow with T.
Errors: GeometryError when a clip or a chunk is not on the grid, with the nearest sizes.

The module keeps nothing between calls, so one module serves any number of streams and threads.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from models.blocks import Downsample, ResidualBlock, Upsample
from models.bottleneck import build_bottleneck
from models.causal import CausalConv3d, State, depth_to_space, name_states, space_to_depth
from models.config import VaeConfig
from models.spec import GeometryError, Posterior

# Standard deviations of exp(-3): a posterior that starts at unit noise hides the clip from the decoder.
INITIAL_LOGVAR = -6.0


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A training pass: pixels B 3 T H W, the latent they were decoded from, the bottleneck's penalty (scalar)."""

    pixels: Tensor
    latent: Tensor
    penalty: Tensor


class Encoder(nn.Module):
    """Pixels to bottleneck features, coarser level by level."""

    def __init__(self, config: VaeConfig, channels_out: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.encoder.channels
        self.conv_in = CausalConv3d(3 * config.patch_size**2, channels[0])
        blocks: list[nn.Module] = []
        for level, width in enumerate(channels):
            if level:
                blocks.append(Downsample(channels[level - 1], width, *config.downs[level - 1]))
            blocks += [ResidualBlock(width) for _ in range(config.encoder.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = CausalConv3d(channels[-1], channels_out)

    def forward(self, pixels: Tensor, state: State | None) -> Tensor:
        patches = space_to_depth(pixels, 1, self.patch_size)
        x = self.conv_in(patches.contiguous(memory_format=torch.channels_last_3d), state)
        for block in self.blocks:
            x = block(x, state)
        output: Tensor = self.conv_out(x, state)
        return output


class Decoder(nn.Module):
    """A latent to pixels, finer level by level."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.decoder.channels
        self.conv_in = CausalConv3d(config.latent_channels, channels[-1])
        blocks: list[nn.Module] = []
        for level in reversed(range(len(channels))):
            blocks += [ResidualBlock(channels[level]) for _ in range(config.decoder.depth)]
            if level:
                blocks.append(Upsample(channels[level], channels[level - 1], *config.downs[level - 1]))
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = CausalConv3d(channels[0], 3 * config.patch_size**2)

    def forward(self, latent: Tensor, state: State | None) -> Tensor:
        x = self.conv_in(latent.contiguous(memory_format=torch.channels_last_3d), state)
        for block in self.blocks:
            x = block(x, state)
        return depth_to_space(self.conv_out(x, state), 1, self.patch_size)


class CausalVae(nn.Module):
    """The autoencoder that a VaeConfig describes. Build it under `torch.manual_seed` for repeatable weights."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.bottleneck = build_bottleneck(config.bottleneck, config.latent_channels)
        self.encoder = Encoder(config, self.bottleneck.channels_in)
        self.decoder = Decoder(config)
        name_states(self)
        self._start_quiet()
        self.lay_out()

    def _start_quiet(self) -> None:
        conv = self.encoder.conv_out.conv
        assert conv.bias is not None
        with torch.no_grad():
            conv.weight[self.config.latent_channels :] = 0.0
            conv.bias[self.config.latent_channels :] = INITIAL_LOGVAR

    def lay_out(self) -> None:
        """Put the channels of convolution weights innermost: 1.2 to 4 times faster on a CPU."""
        for weight in self.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Encode, pass the bottleneck with its noise, decode: one training pass over whole clips."""
        self.config.geometry.latent_shape(*pixels.shape[2:])
        bottlenecked = self.bottleneck(self.encoder(pixels, None), generator)
        return Reconstruction(self.decoder(bottlenecked.latent, None), bottlenecked.latent, bottlenecked.penalty)

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode whole clips at once."""
        self.config.geometry.latent_shape(*pixels.shape[2:])
        return self.bottleneck.posterior(self.encoder(pixels, None))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode whole latents at once; pixels are not clamped."""
        pixels: Tensor = self.decoder(latent, None)
        return pixels

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
        return self.bottleneck.posterior(self.encoder(pixels, state)), state

    def decode_chunk(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latent frames: the first gives one frame of pixels, every other `temporal_stride`."""
        state = dict(state)
        return self.decoder(latent, state), state

    def encode_stream(self) -> EncodeStream:
        """A stream for one batch of clips, at its first frame."""
        return EncodeStream(self)

    def decode_stream(self) -> DecodeStream:
        """A stream for one batch of latents, at its first latent frame."""
        return DecodeStream(self)


class EncodeStream:
    """Encodes one batch of clips chunk by chunk; `state` is all it remembers."""

    def __init__(self, model: CausalVae) -> None:
        self._model = model
        self.state: State = {}

    def push(self, pixels: Tensor) -> Posterior:
        """Encode the next frames, B 3 T H W; frame counts as in `CausalVae.encode_chunk`."""
        posterior, self.state = self._model.encode_chunk(pixels, self.state)
        return posterior


class DecodeStream:
    """Decodes one batch of latents chunk by chunk; `state` is all it remembers."""

    def __init__(self, model: CausalVae) -> None:
        self._model = model
        self.state: State = {}

    def push(self, latent: Tensor) -> Tensor:
        """Decode the next latent frames, B C t h w, to pixels B 3 T H W."""
        pixels, self.state = self._model.decode_chunk(latent, self.state)
        return pixels
