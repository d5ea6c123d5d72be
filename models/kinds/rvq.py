"""RVQ: codebooks in a row, each for what the ones before left over. Zeghidour et al., arXiv:2107.03312.

In:   a BackboneConfig; pixels.
Out:  a model with the residual VQ bottleneck; reconstruction loss plus the commitments.
Cost: the backbone's, and a distance from every position to every code.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import ResidualVq
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class RvqVae(Kind):
    """Reconstruction from sums of codes, one of each codebook."""

    name: ClassVar[str] = "rvq"
    bottleneck: ResidualVq = ResidualVq()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, self.bottleneck, self.name)
