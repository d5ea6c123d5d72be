"""The blocks that the autoencoder is stacked from: norm, residual block, attention, down and up.

In:   features B C T H W, and the State of a stream or None (models.causal).
Out:  features.
Cost: two convolutions per residual block, one per down or up; attention goes with the square of H * W.
Errors: none; shapes follow from BackboneConfig, which checks itself.

No statistic crosses time, and none but attention's crosses space: the only norm is over channels, so nothing leaks
from the future, and a chunk's result does not depend on what it is computed together with. What a convolution sees in
time is the caller's choice, given as `conv`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.causal import CausalConv3d, ConvFactory, State, depth_to_space, space_to_depth, starts_clip

MAX_HEAD_CHANNELS = 64


class ChannelRMSNorm(nn.RMSNorm):
    """Root mean square norm over the channels of each position, B C T H W. Zhang and Sennrich, arXiv:1910.07467."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); with its second convolution at zero, it starts as identity."""

    def __init__(self, channels: int, conv: ConvFactory = CausalConv3d) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(channels)
        self.conv1 = conv(channels, channels)
        self.norm2 = ChannelRMSNorm(channels)
        self.conv2 = conv(channels, channels)
        nn.init.zeros_(self.conv2.conv.weight)
        assert self.conv2.conv.bias is not None
        nn.init.zeros_(self.conv2.conv.bias)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), state)
        output: Tensor = x + self.conv2(F.silu(self.norm2(hidden)), state)
        return output


class FrameAttention(nn.Module):
    """x + project(attention(norm(x))) among the positions of each frame; starts as identity.

    Scaled dot-product attention with heads of at most 64 channels. Vaswani et al., arXiv:1706.03762.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_channels = math.gcd(channels, MAX_HEAD_CHANNELS)
        self.norm = ChannelRMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        b, _, t, h, w = x.shape
        positions = self.norm(x).movedim(1, -1).flatten(0, 1).flatten(1, 2)
        query, key, value = (
            part.unflatten(2, (-1, self.head_channels)).transpose(1, 2) for part in self.qkv(positions).chunk(3, dim=2)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: Tensor = x + self.project(seen).view(b, t, h, w, -1).movedim(-1, 1)
        return output


class Downsample(nn.Module):
    """A convolution and space-to-depth, plus a shortcut that averages groups of channels.

    The residual down of DC-AE (Chen et al., arXiv:2410.10733), with time added and the first frame kept apart.
    """

    def __init__(
        self, channels_in: int, channels_out: int, temporal: int, spatial: int, conv: ConvFactory = CausalConv3d
    ) -> None:
        super().__init__()
        self.strides = (temporal, spatial)
        self.channels_out = channels_out
        self.norm = ChannelRMSNorm(channels_in)
        self.conv = conv(channels_in, channels_out // (temporal * spatial**2))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = starts_clip(self.conv, state)
        groups = torch.unflatten(space_to_depth(x, *self.strides, first=first), 1, (self.channels_out, -1))
        return space_to_depth(self.conv(self.norm(x), state), *self.strides, first=first) + groups.mean(dim=2)


class Upsample(nn.Module):
    """A convolution and depth-to-space, plus a shortcut that duplicates channels: the mirror of Downsample."""

    def __init__(
        self, channels_in: int, channels_out: int, temporal: int, spatial: int, conv: ConvFactory = CausalConv3d
    ) -> None:
        super().__init__()
        self.strides = (temporal, spatial)
        expanded = channels_out * temporal * spatial**2
        self.copies = expanded // channels_in
        self.norm = ChannelRMSNorm(channels_in)
        self.conv = conv(channels_in, expanded)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = starts_clip(self.conv, state)
        hidden = self.conv(self.norm(x), state) + x.repeat_interleave(self.copies, dim=1)
        return depth_to_space(hidden, *self.strides, first=first)


class BlockStack(nn.ModuleList):
    """Blocks one after the other.

    Attributes:
        gradient_checkpointing: keep each block's input alone for the backward pass, and compute what is inside a block
            a second time there (Chen et al., arXiv:1604.06174). Of training mode only, and of whole clips: a stream's
            state, which a pass changes, would be another in the second pass.
    """

    gradient_checkpointing = False

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        again = self.gradient_checkpointing and self.training and state is None
        for block in self:
            x = checkpoint(block, x, state, use_reentrant=False) if again else block(x, state)
        return x
