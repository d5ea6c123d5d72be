"""From one latent to another, along a line or along a sphere.

In:   two latents of one shape, B C t h w; how many steps.
Out:  latents steps B C t h w; the first and the last are the two, unchanged.
Cost: elementwise; the output is `num_steps` latents.
Errors: ValueError for latents of different shapes, and for fewer than two steps.

Samples of a unit Gaussian in many dimensions all lie near a sphere. The line between two passes well inside of it,
where a decoder has seen nothing; the sphere keeps the length. White, arXiv:1609.04468.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Below this sine of the angle the sphere's weights lose their digits. The line is the same path when the latents point
# the same way; when they point opposite ways no path on the sphere is the shortest.
MIN_SINE = 1e-4


def interpolate(first: Tensor, second: Tensor, num_steps: int, path: Literal["line", "sphere"] = "sphere") -> Tensor:
    """Evenly spaced latents from `first` to `second`, both included: num_steps B C t h w, float32."""
    if first.shape != second.shape:
        raise ValueError(f"latents of one shape are needed, got {tuple(first.shape)} and {tuple(second.shape)}")
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, for both ends, got {num_steps}")
    first, second = first.float(), second.float()
    share = torch.linspace(0, 1, num_steps, dtype=torch.float64, device=first.device).view(-1, 1)
    to_first, to_second = (1 - share, share) if path == "line" else _sphere_weights(first, second, share)
    shape = (num_steps, -1, *[1] * (first.ndim - 1))
    return to_first.float().view(shape) * first + to_second.float().view(shape) * second


def _sphere_weights(first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """sin((1 - s) angle) / sin(angle) and sin(s angle) / sin(angle), steps x B. Shoemake, SIGGRAPH 1985.

    Each latent is one vector, whatever its channels and positions; the angle is that between two whole vectors.
    """
    units = [torch.nn.functional.normalize(latent.double().flatten(1), dim=1) for latent in (first, second)]
    angle = torch.acos((units[0] * units[1]).sum(1).clamp(-1, 1))
    sine = torch.sin(angle)
    on_sphere = sine > MIN_SINE
    sine = torch.where(on_sphere, sine, 1.0)
    to_first = torch.where(on_sphere, torch.sin((1 - share) * angle) / sine, 1 - share)
    to_second = torch.where(on_sphere, torch.sin(share * angle) / sine, share)
    return to_first, to_second
