"""Contractive AE: a code that small changes of the pixels leave in place. Rifai et al., ICML 2011.

In:   a BackboneConfig; pixels.
Out:  a model without a bottleneck; the reconstruction's loss plus the code's squared sensitivity.
Cost: a second pass back through the encoder, which is itself differentiated: about two encoder passes more.
Errors: ValueError for settings that cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder, Reconstruction
from models.bottlenecks.config import NoBottleneck
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind, Objective, Terms


@dataclasses.dataclass(frozen=True)
class ContractiveAe(Kind):
    """Reconstruction, and a price on the Jacobian d code / d pixels.

    contraction: weight of the mean over code elements of |d element / d pixels| squared. A decoder could undo a code
        that only shrinks (the paper ties both halves' weights against that; ours has two different halves), so a
        large weight buys a small code before a robust one.
    """

    name: ClassVar[str] = "contractive_ae"
    contraction: float = 0.01

    def __post_init__(self) -> None:
        if not self.contraction > 0:
            raise ValueError(f"contraction must be positive, got {self.contraction}; without it use the kind ae")

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, NoBottleneck(), self.name)

    def objective(self, model: CausalAutoencoder) -> Objective:
        return _ContractiveObjective(model, self)


class _ContractiveObjective(Objective):
    def __init__(self, model: CausalAutoencoder, kind: ContractiveAe) -> None:
        super().__init__(model, kind.weights)
        self.kind = kind

    def forward(self, pixels: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Terms:
        return super().forward(pixels.detach().requires_grad_(), step=step, generator=generator)

    def penalty(
        self, pixels: Tensor, output: Reconstruction, generator: torch.Generator | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        value = squared_sensitivity(pixels, output.bottlenecked.latent, generator)
        return self.kind.contraction * value, {"sensitivity": value.detach()}


def squared_sensitivity(pixels: Tensor, code: Tensor, generator: torch.Generator | None) -> Tensor:
    """An unbiased estimate of ||d code / d pixels||^2 (Frobenius) per code element, itself differentiable.

    Hutchinson's (1990): for v of mean 0 and covariance 1, the mean of |v J|^2 is the norm. One v per clip, of normal
    numbers; `code` must have been computed from `pixels`, clip by clip.
    """
    direction = torch.empty_like(code).normal_(generator=generator)
    (product,) = torch.autograd.grad(code, pixels, direction, create_graph=True)
    return product.square().sum() / code.numel()
