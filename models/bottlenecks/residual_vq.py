"""Residual vector quantisation: each codebook is for what the ones before left over; the latent is the sum.

In:   features B C t h w.
Out:  Bottlenecked with ids B L t h w, one grid per codebook; the latent that is stored is the sum of L codes.
Cost: L times models.bottlenecks.codebook; ids from a latent cost a search, up to 64 times that of encoding it.
Errors: ValueError when ids have another number of codebooks, or the codes of a latent are not found.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from models.bottlenecks.codebook import MAX_DISTANCES, Codebook, pairwise_distances
from models.bottlenecks.config import ResidualVq
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.bottlenecks.vq import check_codebooks, codebook_losses, pass_gradient, to_grid, to_rows
from models.spec import Posterior

BEAM_WIDTHS = (1, 8, 64, 512, 4096)
BEAMS_PER_POSITION = 64  # on average: a latent of another model is refused before the widest searches


class ResidualVqBottleneck(Bottleneck):
    """Zeghidour et al., arXiv:2107.03312; quantiser dropout per clip as in Kumar et al., arXiv:2306.06546.

    Training shows the decoder the sum of a clip's first codebooks only, at the rate of `quantiser_dropout`; ids are
    always of all codebooks, and all of them learn.
    """

    def __init__(self, config: ResidualVq, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels_in = latent_channels
        self.codebook_sizes = (config.codebook_size,) * config.num_quantisers
        self.codebooks = nn.ModuleList(Codebook(config, latent_channels) for _ in self.codebook_sizes)

    def posterior(self, features: Tensor) -> Posterior:
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features).detach()
            total = torch.zeros_like(rows)
            for codebook in self._books():
                total = total + codebook.lookup(codebook.search(rows - total)).detach()
            return Posterior(to_grid(total, features), None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features)
            kept = self._kept(features, generator)
            total, latent = torch.zeros_like(rows), torch.zeros_like(rows)
            ids, losses, statistics = [], [], []
            for level, codebook in enumerate(self._books()):
                residual = rows - total
                chosen = codebook(residual, generator)
                commitment, loss = codebook_losses(residual, chosen.codes, self.config)
                total = total + chosen.codes.detach()
                latent = torch.where(kept > level, total, latent)
                ids.append(chosen.ids)
                losses.append(loss)
                statistics.append({"commitment": commitment, **chosen.statistics})
            latent = pass_gradient(rows, latent, self.config.gradient)
        averages = {name: torch.stack([level[name] for level in statistics]).mean() for name in statistics[0]}
        return Bottlenecked(
            to_grid(latent, features).to(features.dtype),
            torch.stack(losses).mean(),
            to_grid(torch.stack(ids, dim=1), features),
            averages,
        )

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        check_codebooks(ids, len(self.codebook_sizes))
        codes = [codebook.lookup(ids[:, level]) for level, codebook in enumerate(self._books())]
        latent = codes[0]
        for code in codes[1:]:  # in the order in which latent_to_ids adds, so that the bits are the same
            latent = latent + code
        return latent.movedim(-1, 1)

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        """The ids whose codes sum to a latent, up to the rounding of float16.

        Encoding a sum again, code by code, need not find the codes that it was made of: for about a quarter of the
        positions it does not. So a beam search, ever wider for the positions where it failed, looks for codes whose sum
        is the latent, bit for bit in float16. With 4 codebooks of 256 codes and 16 channels it has always found them;
        with 8 codebooks it misses a position in thousands, and with 4 channels it may find other codes of the very same
        sum. Where ids must be had whatever the codebooks, keep those of `forward` in eval mode beside the latent.

        Raises:
            ValueError: there are positions for which no codes were found: the latent is not of this model, is kept in
                less than float16, or is among the few just mentioned.
        """
        rows = to_rows(latent)
        ids = torch.zeros(len(rows), len(self.codebook_sizes), dtype=torch.long, device=rows.device)
        missing = torch.arange(len(rows), device=rows.device)
        beams = max(len(rows), BEAM_WIDTHS[-1]) * BEAMS_PER_POSITION
        for width in BEAM_WIDTHS:
            if len(missing) == 0 or len(missing) * width > beams:
                break
            found = [self._decompose(some, width) for some in torch.split(rows[missing], self._rows_at_once(width))]
            solved = torch.cat([hits for _, hits in found])
            ids[missing[solved]] = torch.cat([some for some, _ in found])[solved]
            missing = missing[~solved]
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(rows)} latent positions were found to be no sum of {len(self.codebook_sizes)} "
                "codes in float16: check that the latent is of this model, or keep the ids of its eval mode"
            )
        return to_grid(ids, latent)

    @torch.no_grad()
    def _decompose(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """A beam search: N x L ids, and for each row whether their codes sum to it."""
        sums = torch.zeros_like(rows).unsqueeze(1)  # N x beams x C
        ids = torch.zeros(len(rows), 1, 0, dtype=torch.long, device=rows.device)
        size = self.config.codebook_size
        for codebook in self._books():
            residual = (rows.unsqueeze(1) - sums).flatten(0, 1)
            distances = pairwise_distances(residual, codebook.codes()).view(len(rows), -1)
            best = distances.topk(min(width, distances.shape[1]), largest=False).indices
            beams, chosen = best // size, best % size
            ids = torch.cat([_take(ids, beams), chosen.unsqueeze(-1)], dim=-1)
            sums = _take(sums, beams) + codebook.lookup(chosen)
        hits = (sums.half() == rows.half().unsqueeze(1)).all(-1)
        return _take(ids, hits.int().argmax(1, keepdim=True)).squeeze(1), hits.any(1)

    def _rows_at_once(self, width: int) -> int:
        return max(1, MAX_DISTANCES // (width * self.config.codebook_size))

    def _books(self) -> list[Codebook]:
        return cast("list[Codebook]", list(self.codebooks))

    def _kept(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """How many codebooks each row's clip is decoded from, N x 1."""
        batch, _, *extents = features.shape
        kept = torch.full((batch,), len(self.codebooks), device=features.device)
        if self.training and self.config.quantiser_dropout:
            fewer = torch.randint(1, len(self.codebooks) + 1, (batch,), generator=generator, device=features.device)
            dropped = torch.rand(batch, generator=generator, device=features.device) < self.config.quantiser_dropout
            kept = torch.where(dropped, fewer, kept)
        return to_rows(kept.view(batch, 1, 1, 1, 1).expand(batch, 1, *extents))


def _take(values: Tensor, beams: Tensor) -> Tensor:
    """values[n, beams[n]] for each n."""
    return values.take_along_dim(beams.unsqueeze(-1), dim=1)
