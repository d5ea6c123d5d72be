"""Vector quantisation: each position of the latent is a code of one learned codebook.

In:   features B C t h w.
Out:  Bottlenecked with ids B 1 t h w; the latent that is stored is the codes themselves.
Cost: models.bottlenecks.codebook.
Errors: ValueError when ids have another number of codebooks than one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bottlenecks.codebook import Codebook
from models.bottlenecks.config import ResidualVq, Vq
from models.bottlenecks.interface import Bottleneck, Bottlenecked
from models.spec import Posterior


class VqBottleneck(Bottleneck):
    """The nearest code of each position. van den Oord et al., arXiv:1711.00937."""

    def __init__(self, config: Vq, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels_in = latent_channels
        self.codebook_sizes = (config.codebook_size,)
        self.codebook = Codebook(config, latent_channels, cosine=config.cosine)

    def posterior(self, features: Tensor) -> Posterior:
        with torch.autocast(features.device.type, enabled=False):
            ids = self.codebook.search(self._rows(features).detach())
            return Posterior(self.ids_to_latent(to_grid(ids, features)).detach(), None)

    def forward(self, features: Tensor, *, step: int = 0, generator: torch.Generator | None = None) -> Bottlenecked:
        with torch.autocast(features.device.type, enabled=False):
            rows = self._rows(features)
            chosen = self.codebook(rows, generator)
            commitment, loss = codebook_losses(rows, chosen.codes, self.config)
            latent = pass_gradient(rows, chosen.codes.detach(), self.config.gradient)
        statistics = {"commitment": commitment, **chosen.statistics}
        latent = to_grid(latent, features).to(features.dtype)
        return Bottlenecked(latent, loss, to_grid(chosen.ids, features), statistics)

    def ids_to_latent(self, ids: Tensor) -> Tensor:
        check_codebooks(ids, len(self.codebook_sizes))
        return self.codebook.lookup(ids[:, 0]).movedim(-1, 1)

    def latent_to_ids(self, latent: Tensor) -> Tensor:
        return to_grid(self.codebook.match(to_rows(latent)), latent)

    def _rows(self, features: Tensor) -> Tensor:
        rows = to_rows(features)
        return F.normalize(rows, dim=1) if self.config.cosine else rows


def to_rows(grid: Tensor) -> Tensor:
    """B C t h w as float32 rows, B*t*h*w x C."""
    return grid.float().movedim(1, -1).flatten(0, -2)


def to_grid(rows: Tensor, like: Tensor) -> Tensor:
    """Rows, or one id per row, as B C t h w (C = 1 for ids), with B t h w those of `like`."""
    batch, _, *extents = like.shape
    return rows.reshape(batch, *extents, -1).movedim(-1, 1)


def check_codebooks(ids: Tensor, num_codebooks: int) -> None:
    """Refuse ids that are not B L t h w."""
    if ids.ndim != 5 or ids.shape[1] != num_codebooks:
        raise ValueError(f"ids must be B {num_codebooks} t h w, one grid per codebook, got {tuple(ids.shape)}")


def codebook_losses(rows: Tensor, codes: Tensor, config: Vq | ResidualVq) -> tuple[Tensor, Tensor]:
    """The commitment by itself, detached; and the weighted loss, with the codes' own term if a gradient moves them."""
    commitment = F.mse_loss(rows, codes.detach())
    loss = config.commitment * commitment
    if config.update == "gradient":
        loss = loss + F.mse_loss(codes, rows.detach())
    return commitment.detach(), loss


def pass_gradient(rows: Tensor, codes: Tensor, gradient: Literal["straight_through", "rotation"]) -> Tensor:
    """Exactly the codes, with a gradient to the rows that chose them.

    "straight_through" hands the gradient on as it is. "rotation" takes the map from row to code as a rotation and a
    scale, both constant, so that the gradient keeps its angle to the code. Fifty et al., arXiv:2410.06424, section 4.
    """
    moved = rows if gradient == "straight_through" else _rotate(rows, codes)
    return codes + (moved - moved.detach())


def _rotate(rows: Tensor, codes: Tensor) -> Tensor:
    row_length, code_length = (vectors.norm(dim=1, keepdim=True).clamp(min=1e-6) for vectors in (rows.detach(), codes))
    start, end = rows.detach() / row_length, codes / code_length
    middle = F.normalize(start + end, dim=1)
    reflected = rows - 2 * (rows * middle).sum(1, keepdim=True) * middle
    rotated: Tensor = reflected + 2 * (rows * start).sum(1, keepdim=True) * end
    return rotated.mul(code_length / row_length)
