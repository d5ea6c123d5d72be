"""Bounds on log p(x) against probabilistic PCA, where log p(x) and all posteriors are known; and the likelihoods."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import NoBottleneck
from models.config import ModelConfig, preset
from models.generative.bounds import PIXEL_STEP, PixelModel, bits_per_dimension, elbo, importance_weighted_bound
from models.generative.likelihoods import Gaussian, Laplace, LogitLaplace
from models.spec import Posterior

NOISE = 0.5


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, 1) of 2 dimensions, x | z ~ N(W z + b, NOISE ** 2) of 5. Tipping and Bishop, 1999.

    W has orthogonal columns, so that the exact posterior is diagonal. `shift` and `stretch` make q imperfect.
    """

    shift: float = 0.0
    stretch: float = 1.0

    @property
    def weight(self):
        columns = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
        return columns * torch.tensor([1.5, 0.8])

    @property
    def bias(self):
        return torch.arange(5, dtype=torch.float64) / 5

    def exact_posterior(self, x):
        precision = 1 + self.weight.square().sum(0) / NOISE**2
        return Normal((x - self.bias) @ self.weight / NOISE**2 / precision, precision.rsqrt().expand(len(x), 2))

    def encode(self, x):
        exact = self.exact_posterior(x)
        return Posterior(exact.mean + self.shift, 2 * torch.log(exact.stddev * self.stretch))

    def log_likelihood(self, latent, x):
        return Normal(latent @ self.weight.T + self.bias, NOISE).log_prob(x).sum(1)

    def exact_log_marginal(self, x):
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(5)
        return MultivariateNormal(self.bias, covariance).log_prob(x)


EXACT = LinearGaussian()
IMPERFECT = LinearGaussian(shift=0.5, stretch=1.6)


def data(count=4):
    return EXACT.bias + torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_with_the_exact_posterior_one_sample_is_the_log_marginal():
    x = data()
    assert torch.allclose(importance_weighted_bound(EXACT, x, 1, generator=seeded()), EXACT.exact_log_marginal(x))
    assert torch.allclose(elbo(EXACT, x, 4_000, generator=seeded()), EXACT.exact_log_marginal(x), atol=0.1)


def test_with_an_imperfect_posterior_the_bound_grows_to_the_log_marginal():
    x = data()
    exact = IMPERFECT.exact_log_marginal(x)
    many = x.repeat(2000, 1)  # the mean of 2000 bounds each
    gaps = []
    for num_samples in (1, 2, 4, 16, 64):
        bound = importance_weighted_bound(IMPERFECT, many, num_samples, generator=seeded())
        gaps.append((exact - bound.view(2000, 4).mean(0)).mean().item())
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[0] > 0.5
    assert 0 < gaps[-1] < 0.03
    once = importance_weighted_bound(IMPERFECT, x, 20_000, samples_per_slice=5_000, generator=seeded())
    assert torch.allclose(once, exact, atol=0.03)


def test_the_elbo_lacks_the_divergence_from_the_exact_posterior():
    x = data()
    posterior = IMPERFECT.encode(x)
    normal = Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))
    gap = kl_divergence(normal, IMPERFECT.exact_posterior(x)).sum(1)
    bound = elbo(IMPERFECT, x.repeat(500, 1), 100, generator=seeded()).view(500, 4).mean(0)
    assert torch.allclose(bound, IMPERFECT.exact_log_marginal(x) - gap, atol=0.05)


def test_slices_do_not_change_the_bound_and_bound_the_memory():
    largest = []

    class Watched(LinearGaussian):
        def log_likelihood(self, latent, x):
            largest.append(len(latent))
            return super().log_likelihood(latent, x)

    model, x = Watched(shift=0.5, stretch=1.6), data()
    bounds = [importance_weighted_bound(model, x, 10, samples_per_slice=n, generator=seeded()) for n in (1, 4, 10)]
    assert largest == [4] * 10 + [16, 16, 8] + [40]
    assert torch.allclose(bounds[0], bounds[1], rtol=1e-12)
    assert torch.allclose(bounds[0], bounds[2], rtol=1e-12)
    assert not torch.equal(bounds[0], importance_weighted_bound(model, x, 10, generator=seeded(1)))


def test_weights_far_below_what_a_float_holds_are_summed():
    far = LinearGaussian(shift=100.0)
    bound = importance_weighted_bound(far, data(), 8, samples_per_slice=3, generator=seeded())
    assert bound.isfinite().all()
    assert (bound < -10_000).all()


def test_what_cannot_be_bounded_is_refused():
    for samples, per_slice in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            importance_weighted_bound(EXACT, data(), samples, samples_per_slice=per_slice)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        elbo(EXACT, data(), 0)


def test_bits_per_dimension():
    # Eight bits: a density that is flat over [-1, 1] gives each of 256 steps (one of them in two halves) its share.
    nats = torch.tensor([-3 * math.log(2.0)])
    assert bits_per_dimension(nats, 3).item() == pytest.approx(math.log2(255))
    assert bits_per_dimension(nats, 3, bin_width=1.0).item() == pytest.approx(1.0)
    assert pytest.approx(2 / 255) == PIXEL_STEP


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"))).eval()


def test_a_video_autoencoder_with_a_likelihood(vae):
    pixels = torch.rand(2, 3, 5, 16, 16, generator=seeded()) * 1.8 - 0.9
    model = PixelModel(vae, Gaussian(0.3))
    bound = importance_weighted_bound(model, pixels, 3, samples_per_slice=2, generator=seeded())
    assert bound.shape == (2,)
    assert bound.dtype == torch.float64
    assert not bound.requires_grad
    with torch.no_grad():
        posterior = vae.encode(pixels)
        noise = [torch.randn(posterior.mean.shape, generator=generator) for generator in [seeded()] for _ in range(3)]
        log_weights = []
        for sample in noise:
            latent = posterior.mean + torch.exp(0.5 * posterior.logvar) * sample
            log_prior = Normal(0.0, 1.0).log_prob(latent).flatten(1).sum(1)
            log_posterior = Normal(posterior.mean, torch.exp(0.5 * posterior.logvar)).log_prob(latent).flatten(1).sum(1)
            log_likelihood = Normal(vae.decode(latent), 0.3).log_prob(pixels).flatten(1).sum(1)
            log_weights.append(log_likelihood + log_prior - log_posterior)
    expected = torch.stack(log_weights).double().logsumexp(0) - math.log(3)
    assert torch.allclose(bound, expected, rtol=1e-4)


def test_a_plain_autoencoder_has_no_bound():
    torch.manual_seed(0)
    plain = CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"), NoBottleneck(), "ae"))
    with pytest.raises(ValueError, match="needs a Gaussian posterior"):
        elbo(PixelModel(plain, Gaussian(1.0)), torch.zeros(1, 3, 1, 8, 8))


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.2), Laplace(0.1), LogitLaplace(0.4)], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("prediction", [0.3, -1.7])
def test_a_density_integrates_to_one(likelihood, prediction):
    ends = (-1.25, 1.25) if isinstance(likelihood, LogitLaplace) else (-8.0, 8.0)
    width = (ends[1] - ends[0]) / 400_000
    pixels = torch.linspace(*ends, 400_001, dtype=torch.float64)[:-1] + width / 2
    density = likelihood.log_density(torch.full_like(pixels, prediction), pixels).exp()
    assert density.sum().item() * width == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", [Gaussian, Laplace, LogitLaplace])
def test_a_fitted_scale_is_the_most_likely_one(kind):
    generator = seeded()
    pairs = []
    for count in (100, 300):
        pixels = torch.rand(count, generator=generator) * 1.6 - 0.8
        pairs.append((pixels + 0.1 * torch.randn(count, generator=generator), pixels))

    def likelihood(scale):
        return sum(kind(scale).log_density(*pair).sum().item() for pair in pairs)

    scale = kind.fit(pairs).scale
    assert likelihood(scale) > max(likelihood(0.98 * scale), likelihood(1.02 * scale))


def test_scales_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must be positive and finite, got 0"):
        Gaussian(0.0)
    with pytest.raises(ValueError, match="got none"):
        Laplace.fit([])
