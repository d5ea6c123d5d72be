"""Sparse AE: most of the code is silent for any one clip. Ng, CS294A lecture notes, 2011; Olshausen and Field, 1996.

In:   a BackboneConfig; pixels.
Out:  a model without a bottleneck; the reconstruction's loss plus a penalty on the code's activity.
Cost: the backbone's.
Errors: ValueError for settings that cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder, Reconstruction
from models.bottlenecks.config import NoBottleneck
from models.config import BackboneConfig, ModelConfig
from models.kinds.kind import Kind, Objective


@dataclasses.dataclass(frozen=True)
class SparseAe(Kind):
    """Reconstruction, and a price on activity: on each value, or on each channel's average.

    penalty: "l1", the mean |code|; or "kl", the divergence of each channel's mean activity from `rho` as between two
        coins. Ng's units are sigmoids; ours are linear and silent at 0, so their activity is tanh |code|.
    sparsity: the penalty's weight.
    rho: the mean activity that "kl" wants.
    """

    name: ClassVar[str] = "sparse_ae"
    penalty: Literal["l1", "kl"] = "l1"
    sparsity: float = 0.05
    rho: float = 0.05

    def __post_init__(self) -> None:
        if self.penalty not in ("l1", "kl"):
            raise ValueError(f"penalty {self.penalty!r} is not one of l1, kl")
        if not self.sparsity > 0 or not 0 < self.rho < 1:
            raise ValueError(
                f"sparsity must be positive and rho between 0 and 1, got {self.sparsity=} {self.rho=}; "
                "without a price on activity use the kind ae"
            )

    def model_config(self, backbone: BackboneConfig) -> ModelConfig:
        return ModelConfig(backbone, NoBottleneck(), self.name)

    def objective(self, model: CausalAutoencoder) -> Objective:
        return _SparseObjective(model, self)


class _SparseObjective(Objective):
    def __init__(self, model: CausalAutoencoder, kind: SparseAe) -> None:
        super().__init__(model, kind.weights)
        self.kind = kind

    def penalty(
        self, pixels: Tensor, output: Reconstruction, generator: torch.Generator | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        code = output.bottlenecked.latent.float()
        value = code.abs().mean() if self.kind.penalty == "l1" else activity_divergence(code, self.kind.rho)
        return self.kind.sparsity * value, {f"code_{self.kind.penalty}": value.detach()}


def activity_divergence(code: Tensor, rho: float) -> Tensor:
    """KL(rho || mean tanh |code|) between two coins, in nats: per channel of B C t h w, averaged over channels."""
    active = code.abs().tanh().transpose(0, 1).flatten(1).mean(dim=1).clamp(1e-6, 1 - 1e-6)
    wanted = torch.full_like(active, rho)
    coins = wanted * (wanted / active).log() + (1 - wanted) * ((1 - wanted) / (1 - active)).log()
    return coins.mean()
