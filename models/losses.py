"""Reconstruction and bottleneck losses, each a mean over all elements.

In:   pixels B C T H W in [-1, 1]; means and log-variances of one shape.
Out:  a scalar tensor each. Means, not sums: a loss's weight keeps its meaning at any clip size.
Cost: elementwise, but for LPIPS, which runs an image classifier on every frame (models.lpips).
Errors: ValueError when two shapes differ, where broadcasting would hide it, or a weight cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
LOGIT_EPSILON = 0.1
MIN_LOGIT_SCALE = 1e-3


@dataclasses.dataclass(frozen=True)
class ReconstructionWeights:
    """The weight of each term of a reconstruction's loss; a term of weight 0 is not computed.

    l1, l2: of the pixels. haar: of their detail (`haar_pyramid_loss`). temporal: of the change from frame to frame.
    logit_laplace: a likelihood of bounded pixels. lpips: perceptual; needs `lpips_weights`, the file that holds its
    networks (models.lpips says which).
    """

    l1: float = 1.0
    l2: float = 0.0
    haar: float = 0.5
    temporal: float = 0.0
    logit_laplace: float = 0.0
    lpips: float = 0.0
    lpips_weights: Path | None = None

    def __post_init__(self) -> None:
        for name, weight in self.terms.items():
            if not weight >= 0:
                raise ValueError(f"the weight of {name} must not be negative, got {weight}")
        if not any(self.terms.values()):
            raise ValueError("a reconstruction needs at least one term of positive weight")
        if bool(self.lpips) != (self.lpips_weights is not None):
            raise ValueError(
                f"lpips and lpips_weights go together: name the weights' file and a positive weight, "
                f"or neither; got {self.lpips=} {self.lpips_weights=}"
            )

    @property
    def terms(self) -> dict[str, float]:
        """The weights by the name of their term."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "lpips_weights"
        }


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, weights: ReconstructionWeights, lpips: PerceptualLoss | None = None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The weighted sum of the terms, and each term by itself, detached.

    Raises:
        ValueError: lpips has a weight, and was not given.
    """
    terms: dict[str, PerceptualLoss | None] = {
        "l1": l1_loss,
        "l2": l2_loss,
        "haar": haar_pyramid_loss,
        "temporal": temporal_difference_loss,
        "logit_laplace": logit_laplace_loss,
        "lpips": lpips,
    }
    loss, values = torch.zeros((), device=target.device), {}
    for name, weight in weights.terms.items():
        if weight:
            term = terms[name]
            if term is None:
                raise ValueError("lpips has a weight: load models.lpips.Lpips and pass it")
            value = term(reconstruction, target)
            loss = loss + weight * value
            values[name] = value.detach()
    return loss, values


def l1_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    _check_shapes(reconstruction, target)
    return (reconstruction - target).abs().mean()


def l2_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    _check_shapes(reconstruction, target)
    return (reconstruction - target).square().mean()


def temporal_difference_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the changes from each frame to the next; 0 for images.

    Flicker that each frame alone forgives counts here.
    """
    _check_shapes(reconstruction, target)
    error = reconstruction - target
    return (error[:, :, 1:] - error[:, :, :-1]).abs().mean() if error.shape[2] > 1 else error.new_zeros(())


def haar_pyramid_loss(reconstruction: Tensor, target: Tensor, levels: int = 3) -> Tensor:
    """L1 between the detail bands of a spatial Haar pyramid (Haar, 1910), averaged over bands and levels.

    Each level halves H and W and compares the three bands of horizontal, vertical and diagonal detail, which is where
    a plain L1 is content with blur. Stops early where a side is no longer even.
    """
    _check_shapes(reconstruction, target)
    low = (reconstruction - target).flatten(0, 1)  # the transform is linear: transform the difference once
    losses = []
    for _ in range(levels):
        if low.shape[-1] % 2 or low.shape[-2] % 2:
            break
        top, bottom = low[..., 0::2, :], low[..., 1::2, :]
        rows_sum, rows_difference = top + bottom, top - bottom
        horizontal = rows_sum[..., 0::2] - rows_sum[..., 1::2]
        vertical = rows_difference[..., 0::2] + rows_difference[..., 1::2]
        diagonal = rows_difference[..., 0::2] - rows_difference[..., 1::2]
        losses.append((horizontal.abs().mean() + vertical.abs().mean() + diagonal.abs().mean()) / 3)
        low = F.avg_pool2d(low, 2)
    return torch.stack(losses).mean() if losses else low.new_zeros(())


def logit_laplace_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of pixels under a logit-Laplace distribution, in nats. Ramesh et al., arXiv:2102.12092.

    Its support is the open interval that pixels really fill, unlike a Laplace's (L1) or a Gaussian's (L2). The scale
    is the most likely one for the batch, which has a closed form, as in sigma-VAE (Rybkin et al., arXiv:2006.13202):
    the decoder then gives pixels, and no second set of channels.
    """
    _check_shapes(reconstruction, target)
    mapped = map_pixels(target.float())
    distance = (torch.logit(mapped) - _logit_location(reconstruction.float())).abs()
    scale = distance.mean().clamp_min(MIN_LOGIT_SCALE)
    return ((distance / scale) + torch.log(2 * scale) + torch.log(mapped * (1 - mapped))).mean()


def map_pixels(pixels: Tensor, epsilon: float = LOGIT_EPSILON) -> Tensor:
    """[-1, 1] to [epsilon, 1 - epsilon], where logits are finite. Ramesh et al., arXiv:2102.12092."""
    return 0.5 + (0.5 - epsilon) * pixels


def _logit_location(pixels: Tensor) -> Tensor:
    """The logit of mapped pixels; beyond [-1, 1] it goes on in a straight line, so that any output has a gradient."""
    inside = pixels.clamp(-1, 1)
    slope = (0.5 - LOGIT_EPSILON) / (LOGIT_EPSILON * (1 - LOGIT_EPSILON))
    return torch.logit(map_pixels(inside)) + slope * (pixels - inside)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent element, in nats, averaged over every element."""
    _check_shapes(mean, logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def _check_shapes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"a loss compares equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}")
