"""VQ-VAE: each latent position is the nearest vector of a learned codebook. van den Oord et al., arXiv:1711.00937.

In:   a BackboneConfig; pixels.
Out:  a model with the VQ bottleneck; reconstruction loss plus the commitment of features to their codes.
Cost: the backbone's, and a distance from every position to every code.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Vq
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class VqVae(Kind):
    """Reconstruction from codes, which are vectors of the latent's channels."""

    name: ClassVar[str] = "vq_vae"
    bottleneck: Vq = Vq()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, self.bottleneck, self.name)
