"""How much of a codebook is in use: per batch, and over a window of training steps. For every discrete bottleneck.

In:   ids of any shape; or how often each code was chosen, counts[codebook_size].
Out:  scalar statistics by name: usage and perplexity, of the batch and of the window.
Cost: two numbers per code, which are part of a checkpoint; one reduction over the codes per pass.
Errors: none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WINDOW_STEPS = 100


def count_codes(ids: Tensor, codebook_size: int) -> Tensor:
    """How often each code was chosen: float32, one number per code."""
    return torch.bincount(ids.flatten(), minlength=codebook_size).float()


def perplexity(counts: Tensor) -> Tensor:
    """The number of codes that, chosen equally often, would have the entropy of these counts; a scalar."""
    shares = counts / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


class UsageWindow(nn.Module):
    """Which codes were chosen of late. Its buffers survive a checkpoint; only training mode changes them."""

    frequencies: Tensor
    steps_unused: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(codebook_size))
        self.register_buffer("steps_unused", torch.full((codebook_size,), WINDOW_STEPS))

    @torch.no_grad()
    def forward(self, counts: Tensor) -> dict[str, Tensor]:
        """Take in one step's counts, summed over ranks, and say how the codebook is used.

        usage: share of the codes that were chosen in this batch. perplexity: of this batch's choices.
        window_usage: share of the codes that were chosen in the last WINDOW_STEPS steps.
        window_perplexity: of choices averaged with a decay of 1 - 1 / WINDOW_STEPS.
        """
        if self.training:
            # Over their sum the frequencies are those of the steps so far: an early window is short, not biased.
            self.frequencies.lerp_(counts / counts.sum().clamp(min=1.0), 1 / WINDOW_STEPS)
            self.steps_unused.add_(1).clamp_(max=WINDOW_STEPS).masked_fill_(counts > 0, 0)
        return {
            "usage": (counts > 0).float().mean(),
            "perplexity": perplexity(counts),
            "window_usage": (self.steps_unused < WINDOW_STEPS).float().mean(),
            "window_perplexity": perplexity(self.frequencies),
        }
