"""FSQ: each latent channel rounded to a few levels, no codebook to learn. Mentzer et al., arXiv:2309.15505.

In:   a BackboneConfig; pixels.
Out:  a model with the FSQ bottleneck, and as many latent channels as it has levels; the reconstruction's loss.
Cost: the backbone's.
Errors: those of models.kinds.kind.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Fsq
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class FsqVae(Kind):
    """Reconstruction from rounded channels.

    The backbone's latent_channels give way to one channel per entry of `bottleneck.levels`.
    """

    name: ClassVar[str] = "fsq"
    bottleneck: Fsq = Fsq()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        backbone = dataclasses.replace(backbone, latent_channels=len(self.bottleneck.levels))
        return ModelConfig(backbone, self.bottleneck, self.name)
