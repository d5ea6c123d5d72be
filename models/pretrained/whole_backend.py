"""The WholeBackend of a diffusers autoencoder that answers with a Gaussian.

In:   a loaded module.
Out:  its posterior of whole clips, and its decoding of whole latents.
Cost: a whole batch of clips' activations.
Errors: none of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.spec import Posterior

if TYPE_CHECKING:
    from torch import Tensor


class GaussianBackend:
    """A module with `encode(pixels).latent_dist` and `decode(latents)`; it keeps nothing between calls."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.dtype = torch.float32

    def encode(self, pixels: Tensor) -> Posterior:
        distribution = self.vae.encode(pixels.to(self.dtype)).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        torch.nn.Module.to(self.vae, device, dtype)  # diffusers' own `to` logs a needless warning
