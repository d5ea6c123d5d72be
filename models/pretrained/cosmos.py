"""AutoencoderKLCosmos (Cosmos-1.0 tokenizer, NVIDIA, arXiv:2501.03575), whole clips.

In:   a diffusers config, or a loaded module.
Out:  the class's rule; a WholeBackend.
Cost: a whole clip's activations; attention over the past of every position. bfloat16 needs a GPU: torch's average
      pooling has no kernel for it on a CPU.
Errors: KeyError when the config lacks a field.

A plain autoencoder despite its name: no posterior. Its pipelines normalise with one mean and one standard deviation per
channel and latent frame, of the first 16 latent frames, times a number that belongs to the scheduler. A Normaliser has
one per channel, and a mean over frames would be one that nobody trained with: the card says identity, and whoever
trains for those pipelines applies the config's latents_mean and latents_std.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from models.pretrained.rules import Config, EncoderRule, never
from models.pretrained.whole_backend import GaussianBackend
from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def cosmos_geometry(config: Config) -> Geometry:
    """The patch, and then as many of the blocks but the last as the config's ratios leave to do."""
    patch = config["patch_size"]
    available = len(config["encoder_block_out_channels"]) - 2
    temporal, spatial = (
        patch * 2 ** min(available, int(math.log2(config[f"{axis}_compression_ratio"])) - int(math.log2(patch)))
        for axis in ("temporal", "spatial")
    )
    return Geometry(temporal, spatial, config["latent_channels"], causality="causal-attention")


def cosmos_normaliser(config: Config, _weights: Path) -> Normaliser:
    """Identity: the pipelines' own statistics are per channel and latent frame."""
    channels = config["latent_channels"]
    formula = "identity; the pipelines normalise per channel and latent frame, at most 16, by the config's statistics"
    return Normaliser((0.0,) * channels, (1.0,) * channels, formula=formula)


class CosmosBackend(GaussianBackend):
    """An AutoencoderKLCosmos."""

    def encode(self, pixels: Tensor) -> Posterior:
        return Posterior(self.vae.encode(pixels.to(self.dtype)).latent_dist.mode(), None)


COSMOS = EncoderRule(
    cosmos_geometry,
    cosmos_normaliser,
    whole=CosmosBackend,
    posterior=never,
    normaliser_fields=frozenset({"latents_mean", "latents_std", "scaling_factor"}),
)
