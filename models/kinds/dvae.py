"""dVAE: a categorical latent, relaxed while it trains, and a likelihood of bounded pixels. arXiv:2102.12092.

In:   a BackboneConfig; pixels.
Out:  a model with the Gumbel-softmax bottleneck; logit-Laplace loss plus the divergence from uniform codes.
Cost: the backbone's, with one encoder feature per code.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Gumbel
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind
from models.losses import ReconstructionWeights


@dataclasses.dataclass(frozen=True)
class Dvae(Kind):
    """The first stage of DALL-E (Ramesh et al., arXiv:2102.12092), over time as well."""

    name: ClassVar[str] = "dvae"
    weights: ReconstructionWeights = ReconstructionWeights(l1=0.0, haar=0.0, logit_laplace=1.0)
    bottleneck: Gumbel = Gumbel()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, self.bottleneck, self.name)
