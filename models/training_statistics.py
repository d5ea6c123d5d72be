"""Training in numbers for a person to watch: grouped losses, the latent's statistics, how each codebook is used.

In:   the losses of a step, by name; a latent B C t h w; a model.
Out:  scalars by name, as "group/name".
Cost: one pass over the latent; two reductions over each codebook's codes.
Errors: none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.bottlenecks.usage import WINDOW_STEPS, UsageWindow, perplexity

_ABOUT_CODES = ("usage", "perplexity")


def grouped(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses under "loss/"; what a bottleneck says of its codes ("usage", "window_perplexity") under "code/"."""
    return {f"{'code' if name.endswith(_ABOUT_CODES) else 'loss'}/{name}": value for name, value in losses.items()}


@torch.no_grad()
def latent_statistics(latent: Tensor) -> dict[str, float]:
    """A summary over the channels of their means and standard deviations, B C t h w.

    A channel whose std goes to 0 carries nothing any more; abs_max says how near the latent is to what float16 holds,
    65504.
    """
    channels = latent.detach().movedim(1, 0).flatten(1).double()
    std, mean = torch.std_mean(channels, dim=1, correction=0)
    summary = {
        "mean_min": mean.min(),
        "mean_max": mean.max(),
        "std_min": std.min(),
        "std_median": std.median(),
        "std_max": std.max(),
        "abs_max": channels.abs().max(),
    }
    values = torch.stack(list(summary.values())).tolist()
    return {f"latent/{name}": value for name, value in zip(summary, values, strict=True)}


@torch.no_grad()
def code_statistics(model: nn.Module) -> dict[str, float]:
    """Of each codebook on its own, over the last WINDOW_STEPS training steps: usage and perplexity.

    Codebooks are numbered in the order in which the model holds them; a continuous latent has none. A residual
    quantiser's losses give the mean of its codebooks, which hides one that has collapsed.
    """
    windows = [module for module in model.modules() if isinstance(module, UsageWindow)]
    return {
        f"code/codebook_{number}_{name}": value.item()
        for number, window in enumerate(windows)
        for name, value in (
            ("window_usage", (window.steps_unused < WINDOW_STEPS).float().mean()),
            ("window_perplexity", perplexity(window.frequencies)),
        )
    }
