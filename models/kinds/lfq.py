"""LFQ and BSQ: each latent channel is one bit. Yu et al., arXiv:2310.05737; Zhao et al., arXiv:2406.07548.

In:   a BackboneConfig; pixels.
Out:  a model with the LFQ bottleneck, and one latent channel per bit; reconstruction, commitment and entropy losses.
Cost: the backbone's; the entropy is taken bit by bit and so does not grow with the 2 ** bits codes.
Errors: those of models.kinds.kind, and of ModelConfig for more bits than an id holds.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Lfq
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class LfqVae(Kind):
    """Reconstruction from signs; `Lfq(spherical=True)` makes it BSQ.

    The backbone's latent_channels give way to `bits`.
    """

    name: ClassVar[str] = "lfq"
    bottleneck: Lfq = Lfq()
    bits: int = 18

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        backbone = dataclasses.replace(backbone, latent_channels=self.bits)
        return ModelConfig(backbone, self.bottleneck, self.name)
