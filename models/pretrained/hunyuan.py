"""AutoencoderKLHunyuanVideo (Kong et al., arXiv:2412.03603) and AutoencoderKLHunyuanVideo15, whole clips.

In:   a diffusers config, or a loaded module.
Out:  the classes' rules; WholeBackends.
Cost: a whole clip's activations; HunyuanVideo-1.5 attends over all of a clip's latent positions, (t h w) squared.
Errors: KeyError when the config lacks a field.

HunyuanVideo's GroupNorm takes statistics over all frames: latents see the future, and no division of the clip gives
the same ones. diffusers would divide clips of more than 16 frames into overlapping pieces and blend these, which are
other latents; that is switched off here, for the decoder too. HunyuanVideo-1.5 sees no future frame.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from models.pretrained.rules import SCALING_FACTOR, Config, EncoderRule, scaling_factor_normaliser
from models.pretrained.whole_backend import GaussianBackend
from models.spec import Geometry, Posterior

if TYPE_CHECKING:
    from torch import Tensor

LATE_RATIO = 4
"""With this temporal ratio HunyuanVideo halves T in its last blocks but one, else in its first."""


def hunyuan_geometry(config: Config) -> Geometry:
    """The config's ratios say which blocks go down; what they make is counted, for a ratio may exceed the blocks."""
    num_blocks = len(config["block_out_channels"])
    spatial_downs = min(num_blocks, int(math.log2(config["spatial_compression_ratio"])))
    temporal_downs = int(math.log2(config["temporal_compression_ratio"]))
    temporal_blocks = num_blocks - 1 if config["temporal_compression_ratio"] == LATE_RATIO else num_blocks
    return Geometry(
        temporal_stride=2 ** min(temporal_blocks, temporal_downs),
        spatial_stride=2**spatial_downs,
        channels=config["latent_channels"],
        causality="none",
    )


def hunyuan15_geometry(config: Config) -> Geometry:
    """The first blocks halve H and W; the last of these halve T as well."""
    blocks = range(len(config["block_out_channels"]))
    spatial, temporal = (config[f"{axis}_compression_ratio"] for axis in ("spatial", "temporal"))
    downs = [block for block in blocks if block < math.log2(spatial)]
    return Geometry(
        temporal_stride=2 ** sum(block >= math.log2(spatial // temporal) for block in downs),
        spatial_stride=2 ** len(downs),
        channels=config["latent_channels"],
        causality="causal-attention",
    )


class HunyuanBackend(GaussianBackend):
    """An AutoencoderKLHunyuanVideo, never divided over time."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        vae.use_framewise_encoding = False
        vae.use_framewise_decoding = False


class Hunyuan15Backend(GaussianBackend):
    """An AutoencoderKLHunyuanVideo15: clip by clip, for its attention mask fits a batch of one only."""

    def encode(self, pixels: Tensor) -> Posterior:
        posteriors = [super(Hunyuan15Backend, self).encode(clip) for clip in torch.split(pixels, 1)]
        means, logvars = zip(*((one.mean, one.logvar) for one in posteriors), strict=True)
        return Posterior(torch.cat(means), torch.cat(logvars))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([super(Hunyuan15Backend, self).decode(latent) for latent in torch.split(latents, 1)])


HUNYUAN = EncoderRule(
    hunyuan_geometry, scaling_factor_normaliser, whole=HunyuanBackend, normaliser_fields=SCALING_FACTOR
)
HUNYUAN_15 = EncoderRule(
    hunyuan15_geometry, scaling_factor_normaliser, whole=Hunyuan15Backend, normaliser_fields=SCALING_FACTOR
)
