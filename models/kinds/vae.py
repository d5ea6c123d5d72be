"""VAE: a Gaussian posterior per position. Kingma and Welling, arXiv:1312.6114; beta as in Higgins et al., 2017.

In:   a BackboneConfig; pixels.
Out:  a model with the KL bottleneck; reconstruction loss plus beta times the divergence, but for the free bits.
Cost: the backbone's.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Kl
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class Vae(Kind):
    """Reconstruction from a sample of the posterior, and beta times its divergence from the prior."""

    name: ClassVar[str] = "vae"
    bottleneck: Kl = Kl()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, self.bottleneck, self.name)
