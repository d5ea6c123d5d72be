"""A discrete model's latent as grids of codes, one per level, and back.

In:   an autoencoder with a discrete bottleneck; its stored latent B C t h w; or grids, int64 B L t h w each.
Out:  codebook sizes, extents and grids per level, the top first where there are two; the latent.
Cost: the bottleneck's search for codes; nothing else.
Errors: TypeError for a continuous latent; GeometryError for clips off the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.config import ModelConfig
from models.two_level import TwoLevelAutoencoder

Extents = tuple[int, int, int]
"""(t, h, w) of a grid."""


def codebook_sizes(model: CausalAutoencoder) -> tuple[tuple[int, ...], ...]:
    """Of each level, the number of codes of each of its codebooks.

    Raises:
        TypeError: the model's latent is continuous.
    """
    levels = [model.top_bottleneck] if isinstance(model, TwoLevelAutoencoder) else []
    levels.append(model.bottleneck)
    if not all(level.codebook_sizes for level in levels):
        raise TypeError(f"a {model.config.kind} with bottleneck {model.config.bottleneck.name} has no codes")
    return tuple(level.codebook_sizes for level in levels)


def code_extents(config: ModelConfig, num_frames: int, height: int, width: int) -> tuple[Extents, ...]:
    """(t, h, w) of each level's grid for a clip of T x H x W pixels.

    Raises:
        GeometryError: the clip is off the model's grid.
    """
    geometries = [config.geometry] if config.top is None else [config.geometry, config.backbone.geometry]
    extents = []
    for geometry in geometries:
        _, *extent = geometry.latent_shape(num_frames, height, width)
        extents.append((extent[0], extent[1], extent[2]))
    return tuple(extents)


def latent_to_grids(model: CausalAutoencoder, latent: Tensor) -> tuple[Tensor, ...]:
    """The codes of a stored latent of whole clips."""
    if isinstance(model, TwoLevelAutoencoder):
        return model.latent_to_ids(latent)
    return (model.bottleneck.latent_to_ids(latent),)


def grids_to_latent(model: CausalAutoencoder, grids: Sequence[Tensor]) -> Tensor:
    """The latent that a decoder takes of codes of whole clips."""
    if isinstance(model, TwoLevelAutoencoder):
        top, bottom = grids
        return model.ids_to_latent((top, bottom))
    (ids,) = grids
    return model.bottleneck.ids_to_latent(ids)
