"""AutoencoderKLWan (Wan 2.1 and 2.2) and AutoencoderKLQwenImage, streamed with the feature cache in the caller's hands.

In:   a diffusers config, or a loaded module.
Out:  the classes' rules; a StreamingBackend.
Cost: one chunk's activations; the cache holds two frames per causal convolution.
Errors: KeyError when the config lacks a field.

diffusers encodes 4 frames at a time; its encoder gives the same latents for any multiple of that (about 1e-6 of their
standard deviation in float32), so the chunk is ours to choose. The encoder is called directly with a cache that we own
instead of the module's, which makes a loaded model safe to share between threads. Qwen-Image's autoencoder is Wan 2.1's
network under other names, with other weights.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from models.pretrained.rules import LOGVAR_RANGE, EncoderRule, channel_normaliser
from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from models.pretrained.rules import Config


def wan_geometry(config: Config) -> Geometry:
    """Each step down but the last level's halves H and W; those marked in `temperal_downsample` halve T as well."""
    return Geometry(
        temporal_stride=2 ** sum(map(bool, config["temperal_downsample"])),
        spatial_stride=2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1),
        channels=config["z_dim"],
    )


def wan_normaliser(config: Config, _weights: Path) -> Normaliser:
    """(z - latents_mean) / latents_std, lists in the config."""
    formula = "(latent - mean) / std, config latents_mean and latents_std"
    return channel_normaliser(config["latents_mean"], config["latents_std"], 1.0, formula)


class WanBackend:
    """An AutoencoderKLWan; the cache of a stream is a list that comes in and goes out."""

    convolution = "WanCausalConv3d"
    one_at_a_time = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.code: Any = importlib.import_module(type(vae).__module__)
        self.patch_size = vae.config.get("patch_size")
        cached = getattr(self.code, self.convolution)
        self.cache_slots = {
            half: sum(isinstance(module, cached) for module in getattr(vae, half).modules())
            for half in ("encoder", "decoder")
        }

    def encode_chunk(self, pixels: Tensor, state: list[Any] | None) -> tuple[Posterior, list[Any]]:
        cache = list(state) if state is not None else [None] * self.cache_slots["encoder"]
        if self.patch_size is not None:
            pixels = self.code.patchify(pixels, patch_size=self.patch_size)
        features = self.vae.encoder(pixels, feat_cache=cache, feat_idx=[0])
        mean, logvar = self.vae.quant_conv(features).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), cache

    def decode_chunk(self, latents: Tensor, state: list[Any] | None) -> tuple[Tensor, list[Any]]:
        cache = list(state) if state is not None else [None] * self.cache_slots["decoder"]
        pixels = [
            self.decode_latent(latent, cache, first=state is None and index == 0)
            for index, latent in enumerate(self.vae.post_quant_conv(latents).split(1, dim=2))
        ]
        return torch.cat(pixels, dim=2), cache

    def decode_latent(self, latent: Tensor, cache: list[Any], *, first: bool) -> Tensor:
        """Decode one latent frame; the cache is updated in place."""
        pixels: Tensor = self.vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=first)
        if self.patch_size is not None:
            pixels = self.code.unpatchify(pixels, patch_size=self.patch_size)
        return pixels

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, dtype)  # the override in diffusers logs a needless warning
        if device.type == "cpu":  # a fifth to a quarter faster there
            for module in self.vae.modules():
                if isinstance(module, torch.nn.Conv3d):
                    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


class QwenImageBackend(WanBackend):
    """An AutoencoderKLQwenImage."""

    convolution = "QwenImageCausalConv3d"

    def decode_latent(self, latent: Tensor, cache: list[Any], *, first: bool) -> Tensor:
        pixels: Tensor = self.vae.decoder(latent, feat_cache=cache, feat_idx=[0])
        return pixels


NORMALISER_FIELDS = frozenset({"latents_mean", "latents_std"})
WAN = EncoderRule(wan_geometry, wan_normaliser, streamed=WanBackend, normaliser_fields=NORMALISER_FIELDS)
QWEN_IMAGE = EncoderRule(wan_geometry, wan_normaliser, streamed=QwenImageBackend, normaliser_fields=NORMALISER_FIELDS)
