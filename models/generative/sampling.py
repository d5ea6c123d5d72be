"""Latents of clips that never were: draws from a model's prior, or from what stands in for one.

In:   an autoencoder, the clips' T x H x W pixels, and a prior by name or a CodePrior.
Out:  latents B C t h w, unnormalised, for the model's decoder.
Cost: one random number per element; a CodePrior one pass per code.
Errors: ValueError for a prior that the model does not have; GeometryError for clips off its grid.

What each prior is, and is not:

    gaussian    z ~ N(0, 1): the prior that a KL model was trained against (Kingma and Welling, arXiv:1312.6114). With a
                small beta, as autoencoders for latent diffusion have, latents do not follow it.
    aggregate   z ~ N(mean, std) per channel of the normaliser, which was measured on real latents. It has their right
                scale under any beta, and it is all that a plain autoencoder has, which was trained against no prior.
    uniform     every code of a discrete model as likely as any other: the prior that the VQ-VAE is trained with.
    a CodePrior the codes' own distribution, learned from stored latents (models.generative.prior).

The first three draw every position by itself: such samples show textures, not scenes. What ties positions together is
a CodePrior, or the diffusion model that the latents are made for.
"""

from __future__ import annotations

import math
import typing
from typing import Literal

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import Kl
from models.generative.codes import code_extents, codebook_sizes, grids_to_latent
from models.generative.prior import CodePrior
from models.spec import Normaliser

PriorName = Literal["gaussian", "aggregate", "uniform"]
PRIOR_NAMES: tuple[PriorName, ...] = typing.get_args(PriorName)


def prior_names(model: CausalAutoencoder) -> tuple[PriorName, ...]:
    """The priors that a model has without training one; the first is its own, or the nearest thing to it."""
    if model.bottleneck.codebook_sizes:
        return ("uniform",)
    return ("gaussian", "aggregate") if isinstance(model.config.bottleneck, Kl) else ("aggregate",)


def sample_latents(
    model: CausalAutoencoder,
    normaliser: Normaliser,
    prior: PriorName | CodePrior,
    num_clips: int,
    clip_shape: tuple[int, int, int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents of `num_clips` clips of (T, H, W) pixels.

    temperature: multiplies a Gaussian's standard deviation, divides a CodePrior's logits. top_k: of a CodePrior only.

    Raises:
        ValueError: the prior is not one of this model's, or an option is not one of the prior's.
        GeometryError: the clip is off the model's grid.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if isinstance(prior, CodePrior):
        return _learned_codes(model, prior, num_clips, clip_shape, temperature, top_k, generator)
    if prior not in prior_names(model):
        raise ValueError(
            f"a {model.config.kind} with bottleneck {model.config.bottleneck.name} has no prior {prior!r}: "
            f"use {' or '.join(prior_names(model))}"
        )
    if top_k is not None:
        raise ValueError(f"top_k chooses among the codes of a learned prior, not of {prior!r}")
    if prior == "uniform":
        if temperature != 1:
            raise ValueError(f"uniform codes have no temperature, got {temperature}")
        return _uniform_codes(model, num_clips, clip_shape, generator)
    shape = (num_clips, *model.config.geometry.latent_shape(*clip_shape))
    noise = temperature * torch.randn(shape, generator=generator)
    if prior == "gaussian":
        return noise
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (normaliser.mean, normaliser.std))
    return mean + std * noise


def _uniform_codes(
    model: CausalAutoencoder, num_clips: int, clip_shape: tuple[int, int, int], generator: torch.Generator | None
) -> Tensor:
    extents = code_extents(model.config, *clip_shape)
    grids = [
        torch.stack([torch.randint(size, (num_clips, *extent), generator=generator) for size in sizes], dim=1)
        for sizes, extent in zip(codebook_sizes(model), extents, strict=True)
    ]
    return grids_to_latent(model, grids)


def _learned_codes(
    model: CausalAutoencoder,
    prior: CodePrior,
    num_clips: int,
    clip_shape: tuple[int, int, int],
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    if not model.bottleneck.codebook_sizes or prior.config.codebook_sizes != codebook_sizes(model):
        raise ValueError(
            f"a prior over codebooks of {prior.config.codebook_sizes} does not fit a {model.config.kind} "
            f"with bottleneck {model.config.bottleneck.name}"
        )
    extents = code_extents(model.config, *clip_shape)
    grids = prior.sample(num_clips, extents, temperature=temperature, top_k=top_k, generator=generator)
    return grids_to_latent(model, grids)
