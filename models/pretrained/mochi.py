"""AutoencoderKLMochi of diffusers (Mochi 1, Genmo), whole clips.

In:   a diffusers config, or a loaded module.
Out:  the class's rule; a WholeBackend.
Cost: a whole clip's activations; attention over the past of every position.
Errors: KeyError when the config lacks a field.

The encoder's first step is sines and cosines of the pixels at 64 and 128 turns per unit. These are taken of float32
pixels, whatever the compute dtype: a pixel rounded to bfloat16 would be off by up to a quarter of a turn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from models.pretrained.rules import Config, EncoderRule, channel_normaliser
from models.pretrained.whole_backend import GaussianBackend
from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def mochi_geometry(config: Config) -> Geometry:
    """The product of the expansions, which encoder and decoder share."""
    return Geometry(
        temporal_stride=math.prod(config["temporal_expansions"]),
        spatial_stride=math.prod(config["spatial_expansions"]),
        channels=config["latent_channels"],
        causality="causal-attention",
    )


def mochi_normaliser(config: Config, _weights: Path) -> Normaliser:
    """(z - latents_mean) * scaling_factor / latents_std, all in the config."""
    formula = "(latent - mean) / std, config latents_mean and latents_std / scaling_factor"
    return channel_normaliser(config["latents_mean"], config["latents_std"], float(config["scaling_factor"]), formula)


class MochiBackend(GaussianBackend):
    """An AutoencoderKLMochi that gets its Fourier features from outside."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.fourier_features = vae.encoder.fourier_features
        vae.encoder.fourier_features = torch.nn.Identity()

    def encode(self, pixels: Tensor) -> Posterior:
        return super().encode(self.fourier_features(pixels))


MOCHI = EncoderRule(
    mochi_geometry,
    mochi_normaliser,
    whole=MochiBackend,
    normaliser_fields=frozenset({"latents_mean", "latents_std", "scaling_factor"}),
)
