"""KL and ELBO of any encoder with a Gaussian posterior, ours or a released one.

In:   a VideoEncoder; training clips to fit a likelihood to; then clips uint8 T H W 3 with their posteriors.
Out:  a Gaussian likelihood; PosteriorNumbers of a clip.
Cost: fitting: one encode and one decode per clip; ELBO: one more encode, and one decode per sample.
Errors: UsageError where nothing can be fitted; SampleError for a posterior that is no Gaussian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.generative.bounds import elbo
from models.generative.likelihoods import Gaussian, Likelihood
from models.losses import kl_divergence
from models.pixels import to_pixels
from models.spec import Posterior, VideoEncoder
from pipeline.errors import SampleError, UsageError


@dataclasses.dataclass(frozen=True)
class FrameModel:
    """A VAE of any library as models.generative.bounds takes it: x is uint8 frames B T H W 3, predicted in 8 bits."""

    encoder: VideoEncoder
    likelihood: Likelihood

    def encode(self, x: Tensor) -> Posterior:
        return self.encoder.encode(x)

    def log_likelihood(self, latent: Tensor, x: Tensor) -> Tensor:
        prediction = to_pixels(self.encoder.decode(latent), "cpu")
        return self.likelihood.log_density(prediction, to_pixels(x, "cpu")).flatten(1).sum(1, dtype=torch.float64)


def fit_likelihood(encoder: VideoEncoder, clips: Iterable[np.ndarray]) -> Gaussian:
    """The scale that training clips are likeliest under, each decoded from a sample of its posterior.

    Raises:
        UsageError: there is no clip, or every one is reconstructed exactly.
    """

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for frames in clips:
            posterior = encoder.encode(torch.from_numpy(frames)[None])
            yield to_pixels(encoder.decode(_sample(posterior)), "cpu"), to_pixels(torch.from_numpy(frames)[None], "cpu")

    try:
        return Gaussian.fit(pairs())
    except ValueError as error:
        raise UsageError(f"--baseline-shards: {error}") from error


@dataclasses.dataclass(frozen=True)
class PosteriorNumbers:
    """Of one clip: KL in nats per latent element; ELBO in nats, None without a likelihood."""

    kl: float
    elbo: float | None


def judge_posterior(
    encoder: VideoEncoder, posterior: Posterior, frames: np.ndarray, likelihood: Likelihood | None, num_samples: int
) -> PosteriorNumbers | None:
    """What a Gaussian posterior says of its clip; None for a latent without one. Every clip draws the same noise.

    Raises:
        SampleError: its log-variance is not finite.
    """
    if posterior.logvar is None:
        return None
    kl = float(kl_divergence(posterior.mean.double(), posterior.logvar.double()))
    if not math.isfinite(kl):
        raise SampleError("not_finite", "the encoder made an infinite or NaN log-variance")
    if likelihood is None:
        return PosteriorNumbers(kl, None)
    model, noise = FrameModel(encoder, likelihood), torch.Generator().manual_seed(0)
    bound = elbo(model, torch.from_numpy(frames)[None], num_samples, generator=noise)
    return PosteriorNumbers(kl, float(bound))


def _sample(posterior: Posterior) -> Tensor:
    assert posterior.logvar is not None
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
