"""AutoencoderKL (Stable Diffusion, FLUX) and AutoencoderDC (DC-AE, Chen et al., arXiv:2410.10733), frame by frame.

In:   a diffusers config, or a loaded module.
Out:  the classes' rules; StreamingBackends with a temporal stride of 1.
Cost: the activations of at most 8 frames, whatever the batch and the chunk.
Errors: KeyError when the config lacks a field.

Every frame is an image of its own, so a clip of T frames has T latent frames and nothing passes between them. Frames
are folded into the batch in slices. DC-AE has no posterior. No state, no lock: threads may share the encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.causal import State
from models.pretrained.rules import (
    SCALING_FACTOR,
    Config,
    EncoderRule,
    channel_normaliser,
    never,
    scalar_normaliser,
    scaling_factor_normaliser,
)
from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FRAMES_PER_SLICE = 8


def kl_geometry(config: Config) -> Geometry:
    """Every block but the last halves H and W."""
    return Geometry(1, 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"])


def kl_normaliser(config: Config, _weights: Path) -> Normaliser:
    """(z - shift_factor) * scaling_factor, or with latents_mean and latents_std where a model has them."""
    scale, mean, std = float(config["scaling_factor"]), config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        formula = "(latent - mean) / std, config latents_mean and latents_std / scaling_factor"
        return channel_normaliser(mean, std, scale, formula)
    return scalar_normaliser(config["latent_channels"], scale, float(config.get("shift_factor") or 0.0))


def dc_geometry(config: Config) -> Geometry:
    """Every block but the last halves H and W."""
    return Geometry(1, 2 ** (len(config["encoder_block_out_channels"]) - 1), config["latent_channels"])


def fold_frames(x: Tensor) -> Tensor:
    """B C T H W -> (B T) C H W."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """(B T) C H W -> B C T H W."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)


class KlImageBackend:
    """An AutoencoderKL."""

    one_at_a_time = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        slices = [self.encode_images(images) for images in torch.split(fold_frames(pixels), FRAMES_PER_SLICE)]
        batch = pixels.shape[0]
        mean = unfold_frames(torch.cat([piece.mean for piece in slices]), batch)
        logvars = [piece.logvar for piece in slices if piece.logvar is not None]
        return Posterior(mean, unfold_frames(torch.cat(logvars), batch) if logvars else None), state or {}

    def encode_images(self, images: Tensor) -> Posterior:
        """Encode N 3 H W."""
        distribution = self.vae.encode(images).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def decode_chunk(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        slices = torch.split(fold_frames(latents), FRAMES_PER_SLICE)
        images = torch.cat([self.vae.decode(piece, return_dict=False)[0] for piece in slices])
        return unfold_frames(images, latents.shape[0]), state or {}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, dtype)  # diffusers' own `to` logs a needless warning


class DcImageBackend(KlImageBackend):
    """An AutoencoderDC: a plain autoencoder."""

    def encode_images(self, images: Tensor) -> Posterior:
        return Posterior(self.vae.encode(images).latent, None)


def kl_latent(vae: Any, clip: Tensor) -> Tensor:
    """The untouched module's own latent of pixels B 3 T H W."""
    return unfold_frames(vae.encode(fold_frames(clip)).latent_dist.mode(), clip.shape[0])


def dc_latent(vae: Any, clip: Tensor) -> Tensor:
    """The untouched module's own latent of pixels B 3 T H W."""
    return unfold_frames(vae.encode(fold_frames(clip)).latent, clip.shape[0])


KL_IMAGE = EncoderRule(
    kl_geometry,
    kl_normaliser,
    streamed=KlImageBackend,
    reference=kl_latent,
    normaliser_fields=SCALING_FACTOR | {"shift_factor", "latents_mean", "latents_std"},
)
DC_IMAGE = EncoderRule(
    dc_geometry,
    scaling_factor_normaliser,
    streamed=DcImageBackend,
    reference=dc_latent,
    posterior=never,
    normaliser_fields=SCALING_FACTOR,
)
