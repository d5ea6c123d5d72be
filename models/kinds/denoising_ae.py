"""Denoising AE: the encoder sees damaged clips, the decoder must give the whole ones. Vincent et al., ICML 2008.

In:   a BackboneConfig; pixels.
Out:  a model without a bottleneck; the reconstruction's loss against pixels that the encoder did not see.
Cost: the backbone's.
Errors: ValueError for settings that damage nothing, or cannot be.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import NoBottleneck
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind, Objective


@dataclasses.dataclass(frozen=True)
class DenoisingAe(Kind):
    """Reconstruction from noisy, partly masked clips. A trained model encodes clips as they are.

    noise_std: of Gaussian noise, in units of pixels in [-1, 1].
    mask_share: of patches that are grey in all frames of a clip, as in VideoMAE (Tong et al., arXiv:2203.12602): a
        patch that is missing in one frame alone could be copied from its neighbours.
    mask_patch: height and width of a patch, in pixels.
    """

    name: ClassVar[str] = "denoising_ae"
    noise_std: float = 0.1
    mask_share: float = 0.1
    mask_patch: int = 8

    def __post_init__(self) -> None:
        if not self.noise_std >= 0 or not 0 <= self.mask_share < 1 or self.mask_patch < 1:
            raise ValueError(
                f"noise_std must not be negative, mask_share lie in [0, 1) and mask_patch be at least 1, got "
                f"{self.noise_std=} {self.mask_share=} {self.mask_patch=}"
            )
        if not self.noise_std and not self.mask_share:
            raise ValueError("a denoising autoencoder needs a noise_std or a mask_share above 0; else use the kind ae")

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, NoBottleneck(), self.name)

    def objective(self, model: CausalAutoencoder) -> Objective:
        return _DenoisingObjective(model, self)


class _DenoisingObjective(Objective):
    def __init__(self, model: CausalAutoencoder, kind: DenoisingAe) -> None:
        super().__init__(model, kind.weights)
        self.kind = kind

    def corrupt(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(pixels).normal_(generator=generator)
        return (pixels + self.kind.noise_std * noise) * self._kept(pixels, generator)

    def _kept(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """1 where a patch stays and 0 where it is masked, B 1 1 H W."""
        batch, _, _, height, width = pixels.shape
        side = self.kind.mask_patch
        grid = pixels.new_empty(batch, 1, 1, -(-height // side), -(-width // side)).uniform_(generator=generator)
        kept = (grid >= self.kind.mask_share).to(pixels.dtype)
        return kept.repeat_interleave(side, dim=3).repeat_interleave(side, dim=4)[..., :height, :width]
