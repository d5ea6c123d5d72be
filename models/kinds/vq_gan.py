"""VQ-GAN: a VQ-VAE whose decoder also has to convince a discriminator. Esser et al., arXiv:2012.09841.

In:   a BackboneConfig; pixels.
Out:  a model with the VQ bottleneck (or any other); its losses plus the adversary's, from a late step on.
Cost: the backbone's, and the adversary's.
Errors: those of models.kinds.kind and models.adversary.

To improve the decoder of a trained model while the latents that were stored stay valid, train with the encoder frozen
(models.train_settings.TrainSettings.freeze_encoder): the adversary only needs the decoder.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from models.adversary import AdversarySettings, PatchAdversary
from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import BottleneckConfig, Vq
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind, Objective, Terms


@dataclasses.dataclass(frozen=True)
class VqGan(Kind):
    """Reconstruction from codes, against a discriminator. With another bottleneck, such as Kl, it is LDM's first stage.

    Rombach et al., arXiv:2112.10752, for the latter.
    """

    name: ClassVar[str] = "vq_gan"
    bottleneck: BottleneckConfig = Vq()
    adversary: AdversarySettings = AdversarySettings()

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, self.bottleneck, self.name)

    def objective(self, model: CausalAutoencoder) -> Objective:
        return _AdversarialObjective(model, self)


class _AdversarialObjective(Objective):
    adversary: PatchAdversary

    def __init__(self, model: CausalAutoencoder, kind: VqGan) -> None:
        super().__init__(model, kind.weights)
        self.adversary = PatchAdversary(kind.adversary)

    def forward(self, pixels: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Terms:
        terms = super().forward(pixels, step=step, generator=generator)
        last_layer = self.model.decoder.conv_out.conv.weight
        # All of the loss so far may stand for the reconstruction's: nothing else reaches the last layer.
        added, values = self.adversary.generator_terms(
            pixels, terms.reconstruction.pixels, last_layer, terms.loss, step
        )
        return Terms(terms.loss + added, {**terms.values, **values}, terms.reconstruction)
