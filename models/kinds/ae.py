"""AE: the plain autoencoder, features as latent. Hinton and Salakhutdinov, Science 313, 2006.

In:   a BackboneConfig; pixels.
Out:  a model without a bottleneck; the reconstruction's loss.
Cost: the backbone's.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import NoBottleneck
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class Ae(Kind):
    """Reconstruction alone."""

    name: ClassVar[str] = "ae"

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, NoBottleneck(), self.name)
