"""VQ-VAE-2: codes of two levels, the top's for what is large and slow. Razavi et al., arXiv:1906.00446.

In:   a BackboneConfig, which is the bottom level's; pixels.
Out:  a model with a top level and two codebooks; reconstruction loss plus both commitments.
Cost: the backbone's, and about 1 / volume of the top's strides more.
Errors: those of models.kinds.kind; ValueError for a top that does not fit the backbone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from models.bottlenecks.config import Vq
from models.config import BackboneConfig, ModelConfig, TopLevel
from models.kinds.kind import Kind


@dataclasses.dataclass(frozen=True)
class VqVae2(Kind):
    """Reconstruction from two grids of codes, both of which are stored.

    downs: (temporal, spatial) stride of each step from the bottom's latent to the top's.
    top_latent_channels: of the top's codes; None for those of the backbone, which are the bottom's.
    top_depth: residual blocks after each down and before each up.

    The levels of the top are as wide as the backbone's coarsest.
    """

    name: ClassVar[str] = "vq_vae_2"
    bottleneck: Vq = Vq()
    downs: tuple[tuple[int, int], ...] = ((2, 2),)
    top_latent_channels: int | None = None
    top_depth: int = 1

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        top = TopLevel(
            downs=self.downs,
            channels=(backbone.encoder.channels[-1],) * len(self.downs),
            depth=self.top_depth,
            latent_channels=self.top_latent_channels or backbone.latent_channels,
        )
        return ModelConfig(backbone, self.bottleneck, self.name, top)
