"""Reconstruction and bottleneck losses, each a mean over all elements, none in need of downloaded weights.

In:   pixels B C T H W in [-1, 1]; means and log-variances of one shape.
Out:  a scalar tensor each. Means, not sums: a loss's weight keeps its meaning at any clip size.
Cost: elementwise; the Haar pyramid adds about a third of one L1 per level.
Errors: ValueError when two shapes differ, where broadcasting would hide it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l1_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    _check_shapes(reconstruction, target)
    return (reconstruction - target).abs().mean()


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


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent element, in nats, averaged over every element."""
    _check_shapes(mean, logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def _check_shapes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"a loss compares equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}")
