"""PatchGAN: one logit per patch, of single frames or of pieces of video. Isola et al., arXiv:1611.07004.

In:   pixels, float B 3 T H W in [-1, 1].
Out:  logits B 1 t h w, high where a patch looks real; each sees a patch of about 2 ** (depth + 2) pixels a side.
Cost: one strided convolution per level; most of it in the first two.
Errors: ValueError for frames smaller than 2 ** depth pixels.

Its norm is over the channels of each position, so a logit depends on its patch alone: neither on what else is in the
batch, nor on whether real and reconstructed clips come together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks import ChannelRMSNorm

Dimensions = Literal["2d", "3d"]


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, then one to logits.

    "2d" judges every frame by itself; "3d" also judges motion: its convolutions span and halve time as well, so that a
    logit sees about 2 ** (depth + 1) frames, past and future. Both take clips of any length, T = 1 included.
    """

    def __init__(self, dimensions: Dimensions, channels: int, depth: int) -> None:
        super().__init__()
        self.smallest_side = 2**depth
        across_time = dimensions == "3d"
        layers: list[nn.Module] = []
        width_in, width = 3, channels
        for level in range(depth):
            layers.append(_strided(width_in, width, across_time=across_time))
            if level:
                layers.append(ChannelRMSNorm(width))
            layers.append(nn.LeakyReLU(0.2))
            width_in, width = width, min(2 * width, 8 * channels)
        span = int(across_time)
        layers.append(nn.Conv3d(width_in, 1, (1 + 2 * span, 3, 3), padding=(span, 1, 1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits B 1 t h w of pixels B 3 T H W."""
        height, width = pixels.shape[3:]
        if min(height, width) < self.smallest_side:
            raise ValueError(
                f"frames of {height}x{width} are too small for this discriminator, which halves them to "
                f"{self.smallest_side}ths: lower its depth or train on larger frames"
            )
        logits: Tensor = self.layers(pixels.contiguous(memory_format=torch.channels_last_3d))
        return logits


def _strided(channels_in: int, channels_out: int, *, across_time: bool) -> nn.Conv3d:
    if across_time:
        return nn.Conv3d(channels_in, channels_out, (3, 4, 4), stride=2, padding=1)
    return nn.Conv3d(channels_in, channels_out, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
