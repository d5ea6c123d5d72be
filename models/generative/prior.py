"""A learned prior over grids of codes: a causal transformer that predicts each code from those before it.

In:   grids of codes, int64 B L t h w, one per level; or extents and a number of clips to sample.
Out:  logits of every code; sampled grids.
Cost: a clip of N codes takes O(N^2) attention to train, and as much to sample, one code at a time, with keys and values
      of all codes so far kept (2 * depth * width floats per code).
Errors: ValueError for grids that are larger than the prior's largest, or codes that its codebooks lack.

The order is raster, frame by frame (t, h, w), a position's codebooks one after another; the top level's grid comes
before the bottom's. A second model over the codes of a first is van den Oord et al., arXiv:1711.00937, section 3.3; a
transformer in its place, Esser et al., arXiv:2012.09841; over video, Yan et al., arXiv:2104.10157.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generative.codes import Extents
from models.generative.prior_config import PriorConfig


class KeyValues:
    """Keys and values of the codes so far, of one layer; room for a whole clip is taken at once."""

    def __init__(self, num_clips: int, num_codes: int, config: PriorConfig, device: torch.device) -> None:
        shape = (num_clips, config.heads, num_codes, config.width // config.heads)
        self._keys, self._values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self._length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one code's, B heads 1 d, and give those of all."""
        self._keys[:, :, self._length], self._values[:, :, self._length] = key[:, :, 0], value[:, :, 0]
        self._length += 1
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm. Vaswani et al., arXiv:1706.03762; Radford et al., 2019."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: KeyValues | None) -> Tensor:
        """B N width of a whole sequence; or B 1 width of the next code, with its past."""
        query, key, value = self.to_qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is None:
            seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            seen = F.scaled_dot_product_attention(query, *past.append(key, value))
        x = x + self.to_out(seen.transpose(1, 2).flatten(2))
        output: Tensor = x + self.perceptron(self.norm2(x))
        return output


class CodePrior(nn.Module):
    """p(codes), code by code. Build it under `torch.manual_seed` for repeatable weights; it starts uniform."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks = [size for sizes in config.codebook_sizes for size in sizes]
        self.first_code = [sum(self.codebooks[:book]) for book in range(len(self.codebooks))]
        width = config.width
        self.code = nn.Embedding(sum(self.codebooks), width)
        self.start = nn.Parameter(torch.zeros(width))
        axes = zip(*config.max_extents, strict=True)
        self.place = nn.ModuleList(nn.Embedding(sum(lengths), width) for lengths in axes)
        self.book = nn.Embedding(len(self.codebooks), width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, sum(self.codebooks))
        for table in (self.code, self.book, *self.place):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.to_logits.weight)
        nn.init.zeros_(self.to_logits.bias)

    def forward(self, grids: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits B K t h w of each codebook, the levels one after another; a code's own value never reaches its logits.

        Raises:
            ValueError: grids that do not fit this prior.
        """
        extents = self._check_grids(grids)
        places = self._places(extents)
        codes = torch.cat([grid.movedim(1, -1).flatten(1) for grid in grids], dim=1)
        first_code = torch.tensor(self.first_code, device=codes.device)
        before = self.code(codes[:, :-1] + first_code[places[:-1, 3]])
        x = torch.cat([self.start.expand(len(codes), 1, -1), before], dim=1) + self._embed(places)
        for block in self.blocks:
            x = block(x, None)
        return tuple(self._logits_of(x, places, book, extents) for book in range(len(self.codebooks)))

    def nats(self, grids: Sequence[Tensor]) -> Tensor:
        """-log p of every code given those before it, in nats, B N; codebook by codebook."""
        targets = [grid[:, book] for grid in grids for book in range(grid.shape[1])]
        pairs = zip(self(grids), targets, strict=True)
        return torch.cat([F.cross_entropy(logits, ids, reduction="none").flatten(1) for logits, ids in pairs], dim=1)

    @torch.inference_mode()
    def sample(
        self,
        num_clips: int,
        extents: Sequence[Extents],
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """Grids of codes of new clips, int64 B L t h w, one per level.

        temperature: divides the logits; below 1 for likelier codes. top_k: draw among the k likeliest only.

        Raises:
            ValueError: extents that do not fit this prior, or a temperature or top_k that cannot be.
        """
        if not (temperature > 0 and math.isfinite(temperature)) or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature must be positive and top_k at least 1, got {temperature=} {top_k=}")
        self.config.check_extents(extents)
        places = self._places(extents)
        device = places.device
        past = [KeyValues(num_clips, len(places), self.config, device) for _ in self.blocks]
        codes = torch.empty(num_clips, len(places), dtype=torch.int64, device=device)
        x = self.start.expand(num_clips, 1, -1)
        embedded = self._embed(places)
        for position, book in enumerate(places[:, 3].tolist()):
            x = x + embedded[position]
            for block, layer_past in zip(self.blocks, past, strict=True):
                x = block(x, layer_past)
            codes[:, position] = draw(self._logits(x[:, 0], book), temperature, top_k, generator)
            x = self.code(codes[:, position, None] + self.first_code[book])
        return self._to_grids(codes, extents)

    def _places(self, extents: Sequence[Extents]) -> Tensor:
        """Of each code of a clip its t, h and w among those of all levels, and its codebook, N 4."""
        pieces, first = [], torch.zeros(4, dtype=torch.int64)
        for extent, largest, sizes in zip(extents, self.config.max_extents, self.config.codebook_sizes, strict=True):
            pieces.append(torch.cartesian_prod(*(torch.arange(length) for length in (*extent, len(sizes)))) + first)
            first = first + torch.tensor([*largest, len(sizes)])
        return torch.cat(pieces).to(self.start.device)

    def _embed(self, places: Tensor) -> Tensor:
        tables = [*self.place, self.book]
        return torch.stack([table(places[:, axis]) for axis, table in enumerate(tables)]).sum(dim=0)

    def _logits(self, x: Tensor, book: int) -> Tensor:
        first, size = self.first_code[book], self.codebooks[book]
        rows = slice(first, first + size)
        return F.linear(self.norm(x), self.to_logits.weight[rows], self.to_logits.bias[rows])

    def _logits_of(self, x: Tensor, places: Tensor, book: int, extents: Sequence[Extents]) -> Tensor:
        """The logits of one codebook as B K t h w."""
        levels = [level for level, sizes in enumerate(self.config.codebook_sizes) for _ in sizes]
        logits = self._logits(x[:, places[:, 3] == book], book)
        return torch.unflatten(logits.movedim(-1, 1), 2, extents[levels[book]])

    def _to_grids(self, codes: Tensor, extents: Sequence[Extents]) -> tuple[Tensor, ...]:
        sizes = self.config.codebook_sizes
        counts = [math.prod(extent) * len(books) for extent, books in zip(extents, sizes, strict=True)]
        return tuple(
            torch.unflatten(piece, 1, (*extent, len(books))).movedim(-1, 1)
            for piece, extent, books in zip(torch.split(codes, counts, dim=1), extents, sizes, strict=True)
        )

    def _check_grids(self, grids: Sequence[Tensor]) -> list[Extents]:
        extents = [(grid.shape[2], grid.shape[3], grid.shape[4]) for grid in grids if grid.ndim == 5]
        self.config.check_extents(extents)
        for grid, sizes in zip(grids, self.config.codebook_sizes, strict=True):
            if grid.shape[1] != len(sizes):
                raise ValueError(f"a grid of codes is B {len(sizes)} t h w here, got {tuple(grid.shape)}")
            largest = grid.amax(dim=(0, 2, 3, 4))
            if grid.min() < 0 or (largest >= torch.tensor(sizes, device=grid.device)).any():
                raise ValueError(f"codes are from 0 to below {sizes}, got {grid.min().item()} to {largest.tolist()}")
        return extents


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One code for each row of logits, B K."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(torch.softmax(logits / temperature, dim=1), 1, generator=generator)[:, 0]
