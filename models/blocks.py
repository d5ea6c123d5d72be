"""The blocks that the autoencoder is stacked from: norm, residual block, down and up.

In:   features B C T H W, and the State of a stream or None (models.causal).
Out:  features.
Cost: two causal convolutions per residual block, one per down or up.
Errors: none; shapes follow from VaeConfig, which checks itself.

No statistic crosses time or space: the only norm is over channels, so nothing leaks from the future, and a chunk's
result does not depend on what it is computed together with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.causal import CausalConv3d, State, depth_to_space, space_to_depth, starts_clip


class ChannelRMSNorm(nn.RMSNorm):
    """Root mean square norm over the channels of each position, B C T H W. Zhang and Sennrich, arXiv:1910.07467."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); with its second convolution at zero, it starts as identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(channels)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = ChannelRMSNorm(channels)
        self.conv2 = CausalConv3d(channels, channels)
        nn.init.zeros_(self.conv2.conv.weight)
        assert self.conv2.conv.bias is not None
        nn.init.zeros_(self.conv2.conv.bias)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), state)
        output: Tensor = x + self.conv2(F.silu(self.norm2(hidden)), state)
        return output


class Downsample(nn.Module):
    """A causal convolution and space-to-depth, plus a shortcut that averages groups of channels.

    The residual down of DC-AE (Chen et al., arXiv:2410.10733), with time added and the first frame kept apart.
    """

    def __init__(self, channels_in: int, channels_out: int, temporal: int, spatial: int) -> None:
        super().__init__()
        self.strides = (temporal, spatial)
        self.channels_out = channels_out
        self.norm = ChannelRMSNorm(channels_in)
        self.conv = CausalConv3d(channels_in, channels_out // (temporal * spatial**2))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = starts_clip(self.conv, state)
        groups = torch.unflatten(space_to_depth(x, *self.strides, first=first), 1, (self.channels_out, -1))
        return space_to_depth(self.conv(self.norm(x), state), *self.strides, first=first) + groups.mean(dim=2)


class Upsample(nn.Module):
    """A causal convolution and depth-to-space, plus a shortcut that duplicates channels: the mirror of Downsample."""

    def __init__(self, channels_in: int, channels_out: int, temporal: int, spatial: int) -> None:
        super().__init__()
        self.strides = (temporal, spatial)
        expanded = channels_out * temporal * spatial**2
        self.copies = expanded // channels_in
        self.norm = ChannelRMSNorm(channels_in)
        self.conv = CausalConv3d(channels_in, expanded)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        first = starts_clip(self.conv, state)
        hidden = self.conv(self.norm(x), state) + x.repeat_interleave(self.copies, dim=1)
        return depth_to_space(hidden, *self.strides, first=first)
