"""Codes that are combinations of small digits: the digits of each channel to one id, and back; how they are used.

In:   digits B C t h w, from 0 to levels - 1 of their channel; ids B 1 t h w; both int64.
Out:  the other one, channel 0 being the lowest digit of the id; statistics of use.
Cost: elementwise, whatever the number of codes: no codebook is made. Use: two numbers per code up to MAX_WINDOW_CODES,
      beyond them a sort of the batch's ids.
Errors: ValueError for ids that are no codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.bottlenecks.ranks import sum_over_ranks
from models.bottlenecks.usage import UsageWindow, count_codes, perplexity

MAX_WINDOW_CODES = 1 << 16


def digits_to_ids(digits: Tensor, levels: Tensor) -> Tensor:
    """The id of each position's digits, B 1 t h w; levels 1 C 1 1 1."""
    return (digits * _place_values(levels)).sum(dim=1, keepdim=True)


def ids_to_digits(ids: Tensor, levels: Tensor) -> Tensor:
    """The digits B C t h w of each position's id.

    Raises:
        ValueError: an id is negative, or not below the number of codes.
    """
    size = int(levels.prod())
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids must be from 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids // _place_values(levels) % levels


def _place_values(levels: Tensor) -> Tensor:
    """1, l0, l0 * l1, ...: what one unit of each digit is worth."""
    return levels.cumprod(dim=1) // levels


class CodeUsage(nn.Module):
    """How the codes are used: as in UsageWindow; of more than MAX_WINDOW_CODES, in this process's batch only."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.window = UsageWindow(codebook_size) if codebook_size <= MAX_WINDOW_CODES else None

    @torch.no_grad()
    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Statistics of a batch's ids, of any shape; in training mode of all ranks' ids, which enter the window."""
        if self.window is None:
            _, counts = torch.unique(ids, return_counts=True)
            usage = torch.tensor(len(counts) / self.codebook_size, device=ids.device)
            return {"usage": usage, "perplexity": perplexity(counts.float())}
        counts = count_codes(ids, self.codebook_size)
        statistics: dict[str, Tensor] = self.window(sum_over_ranks(counts) if self.training else counts)
        return statistics
