"""The Gumbel-softmax bottleneck: schedules, noise, gradients, ids."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.bottlenecks.config import Gumbel
from models.bottlenecks.gumbel import GumbelBottleneck, gumbel_noise, kl_to_uniform, kl_weight, temperature
from models.bottlenecks.registry import build_bottleneck
from models.bottlenecks.vq import to_grid, to_rows

CODES, CHANNELS = 12, 5


def build(**fields):
    torch.manual_seed(0)
    return GumbelBottleneck(Gumbel(**{"codebook_size": CODES, **fields}), CHANNELS).train()


def logits(seed=0, extents=(3, 4, 4)):
    return 2 * torch.randn(2, CODES, *extents, generator=torch.Generator().manual_seed(seed))


def noise(seed=3):
    return torch.Generator().manual_seed(seed)


def test_the_registry_builds_it_and_the_encoder_gives_one_logit_per_code():
    bottleneck = build_bottleneck(Gumbel(codebook_size=7), 4)
    assert isinstance(bottleneck, GumbelBottleneck)
    assert bottleneck.channels_in == 7
    assert bottleneck.codes.shape == (7, 4)


@pytest.mark.parametrize(("step", "expected"), [(0, 2.0), (50, 1.0), (100, 0.5), (150, 0.5)])
def test_the_temperature_falls_by_one_factor_per_step(step, expected):
    config = Gumbel(temperature=2.0, final_temperature=0.5, temperature_steps=100)
    assert temperature(config, step) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (5, 0.1), (20, 0.4), (80, 0.4)])
def test_the_weight_of_the_divergence_rises_in_a_line(step, expected):
    assert kl_weight(Gumbel(kl_weight=0.4, kl_steps=20), step) == pytest.approx(expected)


def test_the_divergence_is_that_of_torch_distributions_and_is_weighted_by_step():
    rows = to_rows(logits())
    categorical = torch.distributions.Categorical(logits=rows)
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(rows))
    expected = torch.distributions.kl_divergence(categorical, uniform).mean()
    assert torch.allclose(kl_to_uniform(rows), expected, rtol=1e-5)
    assert kl_to_uniform(torch.zeros(3, 8)) == pytest.approx(0, abs=1e-6)
    assert kl_to_uniform(1e4 * torch.eye(8)).item() == pytest.approx(math.log(8), rel=1e-5)
    bottleneck = build(kl_weight=0.5, kl_steps=10)
    for step, weight in ((0, 0.0), (4, 0.2), (30, 0.5)):
        output = bottleneck(logits(), step=step)
        assert output.loss.item() == pytest.approx(weight * expected.item(), rel=1e-4)
        assert output.statistics["kl"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_training_mixes_codes_by_the_softmax_of_noisy_logits():
    bottleneck = build(temperature=1.5, final_temperature=0.75, temperature_steps=10)
    x = logits()
    for step, tau in ((0, 1.5), (10, 0.75)):
        output = bottleneck(x, step=step, generator=noise())
        noisy = to_rows(x) + gumbel_noise(to_rows(x), noise())
        assert torch.allclose(to_rows(output.latent), (noisy / tau).softmax(1) @ bottleneck.codes, atol=1e-5)
        assert torch.equal(output.ids, to_grid(noisy.argmax(1), x))


def test_the_noise_is_gumbel_so_that_the_largest_is_drawn_from_the_softmax():
    row = torch.tensor([0.0, 1.0, 2.0])
    drawn = (row + gumbel_noise(row.expand(20_000, 3), noise())).argmax(1)
    assert torch.allclose(torch.bincount(drawn) / 20_000, row.softmax(0), atol=0.015)


def test_a_low_temperature_is_nearly_one_code():
    output = build(final_temperature=0.01, temperature_steps=1)(logits(), step=5, generator=noise())
    bottleneck = build()
    distances = (output.latent - bottleneck.ids_to_latent(output.ids)).norm(dim=1)
    assert (distances < 1e-2).float().mean() > 0.9


def test_eval_mode_is_hard_and_without_noise_and_changes_nothing():
    bottleneck = build()
    bottleneck(logits())
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    x = logits(1)
    output = bottleneck.eval()(x)
    assert torch.equal(output.ids, x.argmax(1, keepdim=True))
    assert torch.equal(output.latent, bottleneck.ids_to_latent(output.ids))
    assert torch.equal(bottleneck.posterior(x).mean, output.latent)
    assert bottleneck.posterior(x).logvar is None
    assert all(torch.equal(value, before[name]) for name, value in bottleneck.state_dict().items())


def test_gradients_reach_logits_and_codes():
    bottleneck, x = build(kl_weight=0.0), logits().requires_grad_()
    output = bottleneck(x, generator=noise())
    (output.latent * torch.randn(output.latent.shape, generator=noise(1))).sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()
    assert (bottleneck.codes.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ids_round_trip(dtype):
    bottleneck = build(codebook_size=100)
    ids = torch.arange(100).view(1, 1, 4, 5, 5)
    assert torch.equal(bottleneck.latent_to_ids(bottleneck.ids_to_latent(ids).to(dtype)), ids)
    with pytest.raises(ValueError, match="ids must be B 1 t h w"):
        bottleneck.ids_to_latent(ids[:, 0])


def test_the_generator_makes_noise_repeatable():
    bottleneck = build()
    first, second, other = (bottleneck(logits(), generator=noise(seed)).latent for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_arithmetic_is_float32_under_autocast():
    plain, under = build(), build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = under(logits(), step=3, generator=noise())
    expected = plain(logits(), step=3, generator=noise())
    assert torch.equal(output.latent, expected.latent)
    assert torch.equal(output.loss, expected.loss)
    low = under(logits().bfloat16(), generator=noise())
    assert (low.latent.dtype, low.loss.dtype) == (torch.bfloat16, torch.float32)


def test_a_clip_in_chunks_has_the_latent_of_the_whole():
    bottleneck, x = build().eval(), logits(extents=(5, 4, 4))
    chunks = [bottleneck.posterior(chunk).mean for chunk in x.split([1, 4], dim=2)]
    assert torch.equal(bottleneck.posterior(x).mean, torch.cat(chunks, dim=2))


def test_it_learns_a_mixture_and_uses_its_codes():
    """A linear encoder of 8 far Gaussians: the hard latent tells them apart."""
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(8, CHANNELS, generator=generator)
    bottleneck = build(codebook_size=16, temperature_steps=150, final_temperature=0.3, kl_weight=0.05, kl_steps=50)
    encoder = torch.nn.Linear(CHANNELS, 16)
    optimiser = torch.optim.Adam([*encoder.parameters(), *bottleneck.parameters()], lr=3e-2)
    like = torch.empty(1, 1, 1, 16, 16)

    def rows():
        chosen = means[torch.randint(8, (256,), generator=generator)]
        return chosen + 0.1 * torch.randn(chosen.shape, generator=generator)

    for step in range(200):
        x = rows()
        output = bottleneck(to_grid(encoder(x), like), step=step, generator=generator)
        optimiser.zero_grad()
        (F.mse_loss(to_rows(output.latent), x) + output.loss).backward()
        optimiser.step()
    x = rows()
    hard = bottleneck.eval()(to_grid(encoder(x), like))
    assert F.mse_loss(to_rows(hard.latent), x) < 0.1 * x.var()
    assert len(hard.ids.unique()) >= 7
