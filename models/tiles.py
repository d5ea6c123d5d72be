"""Large pictures in tiles that give exactly the whole picture's latents: each is run with all that its inside can see.

In:   a CausalAutoencoder without attention, and the side of a tile in latent positions.
Out:  TiledBackend, a StreamingBackend (models.streamed): tiles in space and chunks in time go together.
Cost: activations of one tile and one chunk, for which each tile computes its halo again; a state per tile.
Errors: ValueError for a model with attention or of two levels, which has no halo; GeometryError for sizes off the grid.

A convolution sees one position further in space, so an output sees a finite number of positions around it: the halo,
summed over the layers. A tile is cut with that much around it, less only where the picture ends, and the model's own
padding there is the whole picture's. What is kept of each tile is then what the whole picture gives, with no blending.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.causal import State
from models.cost import Half, layers
from models.spec import Posterior

if TYPE_CHECKING:
    from models.autoencoder import CausalAutoencoder
    from models.config import BackboneConfig

RunTile = Callable[[Tensor, State], tuple[Tensor, State]]


def halo(config: BackboneConfig, half: Half) -> int:
    """Latent positions on each side of a tile that its inside can see, through the encoder or the decoder.

    Raises:
        ValueError: attention sees the whole picture.
    """
    if config.attention:
        raise ValueError("attention sees the whole picture: a model with attention=True has no exact tiles")
    pixels = sum(layer.position_pixels for layer in layers(config, half))
    return -(-pixels // config.geometry.spatial_stride)


@dataclasses.dataclass(frozen=True)
class Span:
    """One side of a tile, in latent positions: [start, stop) is kept of [outer_start, outer_stop)."""

    outer_start: int
    start: int
    stop: int
    outer_stop: int

    def outer(self, scale: int) -> slice:
        """Where the tile with its halo lies in the picture, in units of 1 / scale positions."""
        return slice(self.outer_start * scale, self.outer_stop * scale)

    def inner(self, scale: int) -> slice:
        """Where what is kept lies in the tile with its halo."""
        return slice((self.start - self.outer_start) * scale, (self.stop - self.outer_start) * scale)


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """The sides of tiles that cover `length` latent positions, each with up to `margin` more on both sides."""
    return [
        Span(max(0, start - margin), start, min(length, start + tile), min(length, start + tile + margin))
        for start in range(0, length, tile)
    ]


class TiledBackend:
    """A CausalAutoencoder that encodes and decodes tile by tile. Its state is one State per tile.

    tile: side of the square that is kept of each tile, in latent positions.
    """

    one_at_a_time = False

    def __init__(self, model: CausalAutoencoder, tile: int) -> None:
        if tile < 1:
            raise ValueError(f"a tile's side must be at least 1 latent position, got {tile}")
        if model.config.top is not None:
            raise ValueError("a model of two levels has no exact tiles: the halo of its top is not known")
        self.model = model
        self.tile = tile
        self.stride = model.config.geometry.spatial_stride
        self.halos: dict[Half, int] = {
            "encoder": halo(model.config.backbone, "encoder"),
            "decoder": halo(model.config.backbone, "decoder"),
        }

    def encode_chunk(self, pixels: Tensor, state: Sequence[State] | None) -> tuple[Posterior, list[State]]:
        """Encode the next frames, B 3 T H W, as CausalAutoencoder.encode_chunk does."""
        self.model.config.geometry.latent_shape(1, *pixels.shape[3:])
        has_logvar = self.model.bottleneck.has_logvar

        def encode(tile: Tensor, before: State) -> tuple[Tensor, State]:
            posterior, after = self.model.encode_chunk(tile, before)
            moments = [posterior.mean] if posterior.logvar is None else [posterior.mean, posterior.logvar]
            return torch.cat(moments, dim=1), after

        joined, following = self._run_tiles(encode, "encoder", pixels, state)
        mean, logvar = joined.chunk(2, dim=1) if has_logvar else (joined, None)
        return Posterior(mean, logvar), following

    def decode_chunk(self, latents: Tensor, state: Sequence[State] | None) -> tuple[Tensor, list[State]]:
        """Decode the next latent frames, B C t h w, as CausalAutoencoder.decode_chunk does."""
        return self._run_tiles(self.model.decode_chunk, "decoder", latents, state)

    def _run_tiles(
        self, run: RunTile, half: Half, x: Tensor, state: Sequence[State] | None
    ) -> tuple[Tensor, list[State]]:
        scale_in, scale_out = (self.stride, 1) if half == "encoder" else (1, self.stride)
        rows, columns = (spans(length // scale_in, self.tile, self.halos[half]) for length in x.shape[3:])
        before = iter([{}] * (len(rows) * len(columns)) if state is None else state)
        strips, following = [], []
        for row in rows:
            kept = []
            for column in columns:
                output, after = run(x[..., row.outer(scale_in), column.outer(scale_in)], next(before))
                kept.append(output[..., row.inner(scale_out), column.inner(scale_out)])
                following.append(after)
            strips.append(torch.cat(kept, dim=-1))
        return torch.cat(strips, dim=-2), following

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.move(device, dtype)
