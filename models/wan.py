"""AutoencoderKLWan of diffusers (Wan 2.1 and 2.2), streamed with its feature cache in the caller's hands.

In:   a diffusers directory and its config.
Out:  geometry and normaliser from the config alone; or a Backend.
Cost: one chunk's activations; the cache holds two frames per causal convolution.
Errors: CheckpointError when the config lacks a field.

diffusers encodes 4 frames at a time; its encoder gives the same latents for any multiple of that (about 1e-6 of their
standard deviation in float32), so the chunk is ours to choose. The encoder is called directly with a cache that we own
instead of the module's, which makes a loaded model safe to share between threads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)
NORMALISER_FIELDS = frozenset({"latents_mean", "latents_std"})


def wan_geometry(config: Mapping[str, Any]) -> Geometry:
    """Each step down but the last level's halves H and W; those marked in `temperal_downsample` halve T as well."""
    return Geometry(
        temporal_stride=2 ** sum(map(bool, config["temperal_downsample"])),
        spatial_stride=2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1),
        channels=config["z_dim"],
    )


def wan_normaliser(config: Mapping[str, Any], _weights: Path) -> Normaliser:
    """(z - latents_mean) / latents_std, lists in the config."""
    mean, std = (tuple(float(value) for value in config[name]) for name in ("latents_mean", "latents_std"))
    return Normaliser(mean, std, formula="(latent - mean) / std, config latents_mean and latents_std")


class WanBackend:
    """An AutoencoderKLWan; the cache of a stream is a list that comes in and goes out."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.code: Any = importlib.import_module("diffusers.models.autoencoders.autoencoder_kl_wan")
        self.patch_size = vae.config.patch_size
        self.cache_slots = {
            half: sum(isinstance(module, self.code.WanCausalConv3d) for module in getattr(vae, half).modules())
            for half in ("encoder", "decoder")
        }

    def encode_chunk(self, pixels: Tensor, state: list[Any] | None) -> tuple[Posterior, list[Any]]:
        cache = list(state) if state is not None else [None] * self.cache_slots["encoder"]
        if self.patch_size is not None:
            pixels = self.code.patchify(pixels, patch_size=self.patch_size)
        features = self.vae.encoder(pixels, feat_cache=cache, feat_idx=[0])
        mean, logvar = self.vae.quant_conv(features).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), cache

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        cache: list[Any] = [None] * self.cache_slots["decoder"]
        for index, latent in enumerate(self.vae.post_quant_conv(latents).split(1, dim=2)):
            pixels = self.vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
            if self.patch_size is not None:
                pixels = self.code.unpatchify(pixels, patch_size=self.patch_size)
            yield pixels

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, dtype)  # the override in diffusers logs a needless warning
