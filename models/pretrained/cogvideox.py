"""AutoencoderKLCogVideoX (CogVideoX, Yang et al., arXiv:2408.06072), whole clips.

In:   a diffusers config, or a loaded module.
Out:  the class's rule; a WholeBackend.
Cost: a whole clip's pixels and latents; activations of at most 15 frames, for the model divides a clip itself.
Errors: KeyError when the config lacks a field.

The model divides a clip of T frames into a first piece of 8 + T % 8 frames and further pieces of 8, and its GroupNorm
takes statistics over each piece. Latents then see the future within a piece, and a clip's first latents are others in
a longer clip with another T % 8. That division is kept, for it is what the released pipelines encode with; larger
pieces would give other latents. Clips have 1 + 4k frames; those that CogVideoX was made for have 1 + 8k (49, 81).

The decoder takes latent frames in pairs, the odd one first, and reads an even number as 8 pixel frames to each pair.
For the 1 + 8k + 4 frames of such a latent, its last frame is repeated once and the copy's pixels are cut off.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from models.pretrained.rules import SCALING_FACTOR, Config, EncoderRule, scaling_factor_normaliser
from models.pretrained.whole_backend import GaussianBackend
from models.spec import Geometry

if TYPE_CHECKING:
    from torch import Tensor


def cogvideox_geometry(config: Config) -> Geometry:
    """Every block but the last halves H and W; the first ones halve T as well."""
    downs = len(config["block_out_channels"]) - 1
    return Geometry(
        temporal_stride=2 ** min(downs, int(math.log2(config["temporal_compression_ratio"]))),
        spatial_stride=2**downs,
        channels=config["latent_channels"],
        causality="none",
    )


class CogVideoXBackend(GaussianBackend):
    """An AutoencoderKLCogVideoX."""

    def decode(self, latents: Tensor) -> Tensor:
        latent_frames = latents.shape[2]
        if latent_frames % 2:
            return super().decode(latents)
        pixels = super().decode(torch.cat([latents, latents[:, :, -1:]], dim=2))
        stride = cogvideox_geometry(self.vae.config).temporal_stride
        return pixels[:, :, : 1 + (latent_frames - 1) * stride]


COGVIDEOX = EncoderRule(
    cogvideox_geometry, scaling_factor_normaliser, whole=CogVideoXBackend, normaliser_fields=SCALING_FACTOR
)
