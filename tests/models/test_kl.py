"""The continuous bottlenecks: divergence against torch's closed form, free bits, the three log-variances, noise."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models.bottlenecks.config import Kl, NoBottleneck
from models.bottlenecks.registry import build_bottleneck

CHANNELS = 3


def features_of(bottleneck, *extents):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, bottleneck.channels_in, *(extents or (2, 3, 4)), generator=generator)


@pytest.mark.parametrize("logvar", ["per_channel", "shared", "fixed"])
def test_loss_is_beta_times_the_closed_form(logvar):
    bottleneck = build_bottleneck(Kl(logvar=logvar, fixed_logvar=-1.5, beta=0.3), CHANNELS)
    features = features_of(bottleneck)
    posterior = bottleneck.posterior(features)
    normal = Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))
    expected = kl_divergence(normal, Normal(0.0, 1.0)).mean()
    out = bottleneck(features)
    assert out.statistics["kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.3 * expected.item(), rel=1e-5)


def test_where_the_log_variance_comes_from():
    per_channel, shared, fixed = (
        build_bottleneck(Kl(logvar=name), CHANNELS) for name in ("per_channel", "shared", "fixed")
    )
    assert [bottleneck.channels_in for bottleneck in (per_channel, shared, fixed)] == [6, 4, 3]
    assert all(bottleneck.has_logvar for bottleneck in (per_channel, shared, fixed))
    features = features_of(per_channel)
    assert torch.equal(per_channel.posterior(features).logvar, features[:, 3:])
    features = features_of(shared)
    assert torch.equal(shared.posterior(features).logvar, features[:, 3:].repeat(1, 3, 1, 1, 1))
    assert torch.equal(shared.posterior(features).mean, features[:, :3])
    features = features_of(fixed)
    assert torch.equal(fixed.posterior(features).logvar, torch.full_like(features, -6.0))


@pytest.mark.parametrize("logvar", ["per_channel", "shared"])
def test_training_starts_with_little_noise(logvar):
    bottleneck = build_bottleneck(Kl(logvar=logvar), CHANNELS)
    start = bottleneck.initial_features().view(1, -1, 1, 1, 1)
    posterior = bottleneck.posterior(start)
    assert not posterior.mean.any()
    assert torch.equal(posterior.logvar, torch.full((1, 3, 1, 1, 1), -6.0))


def test_fixed_log_variance_starts_the_encoder_anywhere():
    assert build_bottleneck(Kl(logvar="fixed"), CHANNELS).initial_features() is None


def test_log_variance_is_clamped():
    posterior = build_bottleneck(Kl(), 1).posterior(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1, 1))
    assert posterior.logvar.item() == 20.0


def test_a_channel_below_its_free_bits_costs_them_and_has_no_gradient():
    # Divergences per channel, at log-variance 0: mean ** 2 / 2 = 0.02, 0.5, 2.
    bottleneck = build_bottleneck(Kl(logvar="fixed", fixed_logvar=0.0, beta=1.0, free_bits=0.25), CHANNELS)
    features = torch.tensor([0.2, 1.0, 2.0]).view(1, 3, 1, 1, 1).repeat(2, 1, 2, 1, 1).requires_grad_()
    out = bottleneck(features)
    assert out.loss.item() == pytest.approx((0.25 + 0.5 + 2.0) / 3, rel=1e-6)
    assert out.statistics["kl"].item() == pytest.approx((0.02 + 0.5 + 2.0) / 3, rel=1e-6)
    out.loss.backward()
    assert not features.grad[:, 0].any()
    assert torch.allclose(features.grad[:, 1:], features[:, 1:].detach() / (3 * 4))  # a mean over channels, 4 places


def test_free_bits_are_of_the_channel_s_average_not_of_each_element():
    bottleneck = build_bottleneck(Kl(logvar="fixed", fixed_logvar=0.0, beta=1.0, free_bits=0.5), 1)
    features = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1, 1)  # divergences 0 and 2: 1 on average
    assert bottleneck(features).loss.item() == pytest.approx(1.0)


def test_noise_is_the_generator_s_and_of_the_posterior_s_size():
    bottleneck = build_bottleneck(Kl(), 2)
    features = torch.cat([torch.full((4, 2, 8, 16, 16), 3.0), torch.full((4, 2, 8, 16, 16), 2 * math.log(0.5))], dim=1)
    sample, again, other = (bottleneck(features, generator=torch.Generator().manual_seed(s)).latent for s in (0, 0, 1))
    assert torch.equal(sample, again)
    assert not torch.equal(sample, other)
    assert sample.mean().item() == pytest.approx(3.0, abs=0.02)
    assert sample.std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(bottleneck.posterior(features).mean, features[:, :2])


def test_noise_does_not_depend_on_memory_layout():
    bottleneck = build_bottleneck(Kl(), 2)
    features = features_of(bottleneck)
    channels_last = features.contiguous(memory_format=torch.channels_last_3d)
    plain, strided = (
        bottleneck(x, generator=torch.Generator().manual_seed(0)).latent for x in (features, channels_last)
    )
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("config", [NoBottleneck(), Kl(), Kl(logvar="shared"), Kl(logvar="fixed")])
def test_gradient_reaches_the_encoder(config):
    bottleneck = build_bottleneck(config, CHANNELS)
    features = features_of(bottleneck).requires_grad_()
    bottleneck(features).latent.square().mean().backward()
    assert (features.grad != 0).all()


def test_a_plain_latent_is_the_features():
    bottleneck = build_bottleneck(NoBottleneck(), CHANNELS)
    features = features_of(bottleneck)
    assert bottleneck(features).latent is features
    assert bottleneck(features).loss.item() == 0.0
    assert torch.equal(bottleneck.posterior(features).mean, features)
    assert bottleneck.posterior(features).logvar is None


def test_a_continuous_latent_has_no_ids():
    with pytest.raises(TypeError, match="no ids"):
        build_bottleneck(Kl(), CHANNELS).latent_to_ids(torch.zeros(1, 3, 1, 1, 1))


def test_a_fixed_log_variance_out_of_range_is_refused():
    with pytest.raises(ValueError, match="fixed_logvar must be from -30 to 20"):
        Kl(logvar="fixed", fixed_logvar=21.0)
