"""Lower bounds on log p(x) for a Gaussian posterior and a unit Gaussian prior: ELBO, and the importance-weighted one.

In:   a LatentVariableModel, such as PixelModel(autoencoder, likelihood); data x, B ...; how many samples.
Out:  one bound per example in nats, float64; `bits_per_dimension` of them.
Cost: one decode per sample and example; memory for `samples_per_slice` of them at once, however many there are.
Errors: ValueError for a model without a Gaussian posterior, and for less than one sample.

Gradients are not recorded: these are numbers for an evaluation. On average the importance-weighted bound grows with the
number of samples, from an ELBO at 1 to log p(x).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.generative.likelihoods import Likelihood
from models.losses import kl_divergence
from models.spec import Posterior

# The distance between neighbouring 8-bit values when 0..255 is mapped to [-1, 1].
PIXEL_STEP = 2 / 255


class LatentVariableModel(Protocol):
    """p(x | z) and an approximate posterior q(z | x)."""

    def encode(self, x: Tensor) -> Posterior:
        """Mean and log-variance of q(z | x), B ... each."""
        ...

    def log_likelihood(self, latent: Tensor, x: Tensor) -> Tensor:
        """Log p(x | z) of each example, B, in nats: a sum over the dimensions of x."""
        ...


@dataclasses.dataclass(frozen=True)
class PixelModel:
    """An autoencoder whose reconstruction of pixels B 3 T H W is the centre of a likelihood."""

    autoencoder: CausalAutoencoder
    likelihood: Likelihood

    def encode(self, x: Tensor) -> Posterior:
        return self.autoencoder.encode(x)

    def log_likelihood(self, latent: Tensor, x: Tensor) -> Tensor:
        log_density = self.likelihood.log_density(self.autoencoder.decode(latent).float(), x.float())
        return log_density.flatten(1).sum(1, dtype=torch.float64)


@torch.no_grad()
def elbo(
    model: LatentVariableModel, x: Tensor, num_samples: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """E_q[log p(x | z)] - KL(q || p): the first by samples, the second in closed form. Nats, B.

    Kingma and Welling, arXiv:1312.6114.
    """
    _check_at_least_one("num_samples", num_samples)
    mean, logvar = _moments(model, x)
    log_likelihood = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(num_samples):
        latent = mean + torch.exp(0.5 * logvar) * _noise(mean, generator)
        log_likelihood += model.log_likelihood(latent, x) / num_samples
    elements = mean[0].numel()
    return log_likelihood - elements * torch.vmap(kl_divergence)(mean.double(), logvar.double())


@torch.no_grad()
def importance_weighted_bound(
    model: LatentVariableModel,
    x: Tensor,
    num_samples: int,
    *,
    samples_per_slice: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log(1/K sum_k p(x, z_k) / q(z_k | x)) with K = num_samples. Nats, B. Burda et al., arXiv:1509.00519.

    samples_per_slice: samples that are decoded at once; up to rounding it does not change the result.
    """
    _check_at_least_one("num_samples", num_samples)
    _check_at_least_one("samples_per_slice", samples_per_slice)
    moments = _moments(model, x)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for start in range(0, num_samples, samples_per_slice):
        count = min(samples_per_slice, num_samples - start)
        log_weights = _log_weights(model, x, moments, count, generator)
        total = torch.logaddexp(total, log_weights.logsumexp(0))
    return total - math.log(num_samples)


def bits_per_dimension(nats: Tensor, num_dimensions: int, bin_width: float = PIXEL_STEP) -> Tensor:
    """Bits per dimension of x, lower being better, from log-densities (or bounds on them) in nats.

    A density is not yet a probability: it is multiplied by `bin_width` for each dimension, by default the step of an
    8-bit pixel in [-1, 1], as if the density were flat over a step. 1.0 leaves it a density.
    """
    return -(nats / num_dimensions + math.log(bin_width)) / math.log(2)


def _log_weights(
    model: LatentVariableModel,
    x: Tensor,
    moments: tuple[Tensor, Tensor],
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Log p(x, z) - log q(z | x) of `count` samples of each example, count x B."""
    mean, logvar = moments
    noise = torch.stack([_noise(mean, generator) for _ in range(count)])
    latent = mean + torch.exp(0.5 * logvar) * noise
    prior_over_posterior = 0.5 * (noise.double().square() + logvar - latent.double().square()).flatten(2).sum(2)
    repeated = x.expand(count, *x.shape).flatten(0, 1)
    log_likelihood = model.log_likelihood(latent.flatten(0, 1), repeated).double().view(count, len(x))
    return log_likelihood + prior_over_posterior


def _moments(model: LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.encode(x)
    if posterior.logvar is None:
        raise ValueError("a bound on log p(x) needs a Gaussian posterior, and this model has none: use kind vae")
    return posterior.mean, posterior.logvar


def _noise(mean: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
