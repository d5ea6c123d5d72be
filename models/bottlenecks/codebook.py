"""A learned codebook: finding codes, learning them, moving those that nobody chooses.

In:   feature rows N x C, float32.
Out:  int64 ids N, codes N x C, statistics of use.
Cost: about 2 N K C multiply-adds per training pass, and two waits for the device; memory beyond rows and codes is
      bounded by MAX_DISTANCES.
Errors: none.

In training mode the first batch places the codes (k-means), and every batch updates them; the buffer `initialised` says
that the first batch has been, so a model that is loaded goes on where it was. Ranks of torch.distributed learn as one:
all counts and sums are theirs together, and so are the features that codes are moved to.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bottlenecks.config import ResidualVq, Vq
from models.bottlenecks.ranks import draw_rows, sum_over_ranks
from models.bottlenecks.usage import UsageWindow, count_codes

MAX_DISTANCES = 1 << 24  # float32 numbers that a search holds at once: 64 MiB
KMEANS_ITERATIONS = 10


@dataclasses.dataclass(frozen=True)
class Chosen:
    """For each row its id and its code, which carries a gradient when codes are parameters; how the codes are used."""

    ids: Tensor
    codes: Tensor
    statistics: dict[str, Tensor]


class Codebook(nn.Module):
    """The codes and what is known of their use.

    Learns by averages (van den Oord et al., arXiv:1711.00937, appendix A.1) or leaves that to a gradient. With
    `cosine`, codes have unit length (Yu et al., arXiv:2110.04627); rows are expected to have, too.
    """

    weight: Tensor
    counts: Tensor
    initialised: Tensor
    sums: Tensor | None

    def __init__(self, config: Vq | ResidualVq, channels: int, *, cosine: bool = False) -> None:
        super().__init__()
        self.config = config
        self.cosine = cosine
        weight = self._normalised(torch.randn(config.codebook_size, channels))
        if config.update == "gradient":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("sums", weight.clone() if config.update == "ema" else None)
        self.register_buffer("counts", torch.ones(config.codebook_size))
        self.register_buffer("initialised", torch.tensor(data=False))
        self.usage = UsageWindow(config.codebook_size)

    def forward(self, rows: Tensor, generator: torch.Generator | None = None) -> Chosen:
        """Choose a code per row and then, in training mode, learn from the rows; the first of them place the codes."""
        features = rows.detach()
        first = self.training and not self.initialised
        if first:
            self._place_by_kmeans(features, generator)
        ids = self.search(features)
        codes = self.lookup(ids)
        counts = count_codes(ids, self.config.codebook_size)
        if self.training:
            sum_over_ranks(counts)
        if self.training and not first:
            self._average(features, ids, counts)
            self._revive(features, generator)
        return Chosen(ids, codes, self.usage(counts))

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes of ids of any shape, channels last."""
        return self._normalised(F.embedding(ids, self.weight))

    def search(self, rows: Tensor) -> Tensor:
        """The id of each row's nearest code."""
        return nearest(rows, self.codes())

    def match(self, rows: Tensor) -> Tensor:
        """The ids of rows that are codes already, up to the rounding of float16."""
        return match_float16(rows, self.codes())

    def codes(self) -> Tensor:
        """All codes, K x C, detached."""
        return self._normalised(self.weight.detach())

    def _normalised(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1) if self.cosine else codes

    @torch.no_grad()
    def _average(self, rows: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Codes become the averages of the rows that chose them, all rows' weights decaying step by step."""
        self.counts.lerp_(counts, 1 - self.config.ema_decay)
        if self.sums is not None:
            sums = sum_over_ranks(sum_by_code(rows, ids, self.config.codebook_size))
            self.sums.lerp_(sums, 1 - self.config.ema_decay)
            self.weight.copy_(self._normalised(_means(self.sums, self.counts, self.weight)))

    @torch.no_grad()
    def _revive(self, rows: Tensor, generator: torch.Generator | None) -> None:
        """Move codes that are hardly chosen to features of this batch, there to start with an average count."""
        average = self.counts.mean()
        dead = (self.counts < self.config.revive_below * average).nonzero().flatten()
        if len(dead):
            features = draw_rows(rows, len(dead), generator)
            self._place(dead[: len(features)], features, average)

    @torch.no_grad()
    def _place_by_kmeans(self, rows: Tensor, generator: torch.Generator | None) -> None:
        """Lloyd's iterations from random rows; codes beyond the number of rows stay as they are, with a count of 0."""
        size = self.config.codebook_size
        centres = draw_rows(rows, size, generator)
        for _ in range(KMEANS_ITERATIONS):
            ids = nearest(rows, centres)
            counts = sum_over_ranks(count_codes(ids, len(centres)))
            sums = sum_over_ranks(sum_by_code(rows, ids, len(centres)))
            centres = self._normalised(_means(sums, counts, centres))
        self.counts.zero_()
        if self.sums is not None:
            self.sums.zero_()
        self._place(torch.arange(len(centres), device=rows.device), centres, counts)
        self.initialised.fill_(value=True)

    def _place(self, ids: Tensor, codes: Tensor, counts: Tensor) -> None:
        self.weight[ids] = codes
        self.counts[ids] = counts
        if self.sums is not None:
            self.sums[ids] = codes * counts.unsqueeze(-1)


@torch.no_grad()
def nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """The index of the code nearest to each row; of codes as near as float32 can tell, any one."""
    # |row - code|^2 less what all codes share, from the codes' middle, where the least is lost to rounding.
    middle = codes.mean(0)
    codes = codes - middle
    half_squares = 0.5 * codes.square().sum(1)
    distances = (torch.addmm(half_squares, some - middle, codes.T, alpha=-1) for some in _split(rows, codes))
    return torch.cat([chunk.argmin(1) for chunk in distances])


@torch.no_grad()
def match_float16(rows: Tensor, codes: Tensor) -> Tensor:
    """The index of the code that each row is, up to the rounding of float16.

    Exact, unless two codes are one in float16: then the first of them.
    """
    codes = codes.half().float()
    return torch.cat([pairwise_distances(some.half().float(), codes).argmin(1) for some in _split(rows, codes)])


def sum_by_code(rows: Tensor, ids: Tensor, codebook_size: int) -> Tensor:
    """The sum of the rows that chose each code, K x C."""
    sums = rows.new_zeros(codebook_size, rows.shape[1])
    size = _rows_at_once(codebook_size)
    # A product with one-hot rows gives the same bits each time; a scatter-add on a GPU does not.
    for some, chosen in zip(torch.split(rows, size), torch.split(ids, size), strict=True):
        one_hot = some.new_zeros(len(some), codebook_size).scatter_(1, chosen.unsqueeze(1), 1.0)
        sums.addmm_(one_hot.T, some)
    return sums


def _means(sums: Tensor, counts: Tensor, otherwise: Tensor) -> Tensor:
    """Sum over count, and `otherwise` where so little is left of a count that the quotient would be noise."""
    counts = counts.unsqueeze(1)
    return torch.where(counts > 1e-10, sums / counts, otherwise)


def pairwise_distances(rows: Tensor, codes: Tensor) -> Tensor:
    """N x K, without the cancellation of the quicker expanded square: 0 for equal vectors."""
    return torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist")


def _rows_at_once(codebook_size: int) -> int:
    return max(1, MAX_DISTANCES // codebook_size)


def _split(rows: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, _rows_at_once(len(codes)))
