"""What data-parallel ranks must agree on while they learn: sums, and rows drawn from everybody's features.

In:   tensors of one rank.
Out:  tensors that are the same on every rank; a process without torch.distributed is a world of one.
Cost: one collective per call. Every rank must call in the same order: call in training mode only.
Errors: those of torch.distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor, summed over the ranks in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(value: float, device: torch.device | str = "cpu") -> float:
    """Rank 0's value, on every rank; `device` is the one that the ranks compute on."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def wait_for_ranks() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def draw_rows(rows: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """At most `count` random rows, N x C, an equal share from each rank and none twice; fewer if ranks have fewer."""
    ranks = world_size()
    share = -(-count // ranks)
    drawn = rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:share]]
    if ranks == 1:
        return drawn
    # Collectives want one shape: rows that a rank does not have are NaN until they have travelled.
    padded = rows.new_full((share, rows.shape[1]), torch.nan)
    padded[: len(drawn)] = drawn
    everyone = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(everyone, padded)
    gathered = torch.stack(everyone, dim=1).flatten(0, 1)
    return gathered[~gathered.isnan().any(dim=1)][:count]
