"""FSQ: levels, ids, gradient, use of the codes, and equality with vector-quantize-pytorch."""

import itertools

import pytest
import torch

from models.bottlenecks.config import Fsq
from models.bottlenecks.registry import build_bottleneck

LEVELS = [(5,), (8, 5), (3, 4, 7), (8, 8, 8, 5, 5, 5), (33, 64)]
every_levels = pytest.mark.parametrize("levels", LEVELS, ids=str)


def fsq(levels):
    return build_bottleneck(Fsq(levels), len(levels))


def random_features(levels, batch=2):
    return 3 * torch.randn(batch, len(levels), 3, 8, 8, generator=torch.Generator().manual_seed(0))


def all_ids(bottleneck):
    return torch.arange(bottleneck.codebook_sizes[0]).view(1, 1, 1, 1, -1)


@every_levels
def test_every_id_survives_the_latent_in_float16(levels):
    bottleneck = fsq(levels)
    ids = all_ids(bottleneck)
    latent = bottleneck.ids_to_latent(ids)
    assert torch.equal(bottleneck.latent_to_ids(latent), ids)
    assert torch.equal(bottleneck.latent_to_ids(latent.half()), ids)
    assert len(latent.flatten(2)[0].T.unique(dim=0)) == ids.numel()  # no two codes are one


@every_levels
def test_a_latent_is_the_code_of_its_ids(levels):
    bottleneck = fsq(levels)
    features = random_features(levels)
    out = bottleneck(features)
    stored = bottleneck.posterior(features)
    assert torch.equal(out.latent, stored.mean)
    assert stored.logvar is None
    assert out.ids.shape == (2, 1, 3, 8, 8)
    assert out.ids.dtype == torch.int64
    assert torch.equal(bottleneck.ids_to_latent(out.ids), stored.mean)
    assert torch.equal(bottleneck.latent_to_ids(stored.mean.half()), out.ids)


@pytest.mark.parametrize("levels", [3, 4, 5, 8])
def test_each_channel_reaches_every_level_and_no_more(levels):
    sweep = torch.linspace(-6, 6, 1001).view(1, 1, 1, 1, -1)
    reached = fsq((levels,)).posterior(sweep).mean.flatten()
    expected = torch.arange(-(levels // 2), (levels + 1) // 2) / (levels // 2)
    assert torch.equal(reached.unique(), expected)
    assert (reached.diff() >= 0).all()
    assert fsq((levels,)).posterior(torch.zeros(1, 1, 1, 1, 1)).mean.item() == 0.0


def test_ids_are_mixed_radix_numbers_with_the_first_channel_lowest():
    bottleneck = fsq((4, 3))
    digits = torch.tensor(list(itertools.product(range(3), range(4)))).flip(1)
    latent = (digits - torch.tensor([2, 1])) / torch.tensor([2, 1])
    assert torch.equal(bottleneck.ids_to_latent(all_ids(bottleneck)).view(2, 12).T, latent)


def test_a_latent_that_is_no_code_gets_the_nearest_one():
    bottleneck = fsq((5,))
    latent = torch.tensor([-9.0, -0.7, 0.1, 0.3, 9.0]).view(1, 1, 1, 1, 5)
    assert bottleneck.latent_to_ids(latent).flatten().tolist() == [0, 1, 2, 3, 4]


@every_levels
def test_gradient_reaches_the_encoder(levels):
    features = random_features(levels).requires_grad_()
    fsq(levels)(features).latent.sum().backward()
    assert (features.grad > 0).float().mean() > 0.9  # but for features far out, where tanh is flat
    # the rounding is passed as if it were not there: the gradient is that of the squashing alone
    wanted = torch.zeros_like(features, requires_grad=True)
    (gradient,) = torch.autograd.grad(fsq(levels)(wanted).latent.sum(), wanted)
    half_range = torch.tensor([(count - 1) * 1.001 / 2 for count in levels])
    offset = torch.tensor([0.0 if count % 2 else 0.5 for count in levels])
    half_width = torch.tensor([count // 2 for count in levels])
    slope = half_range * (1 - (offset / half_range) ** 2) / half_width
    assert torch.allclose(gradient[0, :, 0, 0, 0], slope, rtol=1e-5)


def test_features_that_have_run_away_are_pulled_back():
    """Where tanh is flat no other gradient is left."""
    features = torch.tensor([-30.0, -2.0, 0.0, 1.9, 30.0]).view(1, 1, 1, 1, 5).requires_grad_()
    out = fsq((8,))(features)
    (lost,) = torch.autograd.grad(out.latent.sum(), features, retain_graph=True)
    assert (lost.flatten()[[0, 4]] == 0).all()
    (pull,) = torch.autograd.grad(out.loss, features)
    assert pull.flatten().sign().tolist() == [-1, 0, 0, 0, 1]
    assert out.statistics["excess"].item() == pytest.approx(2 * 28**2 / 5)
    assert out.loss.item() == pytest.approx(0.1 * 2 * 28**2 / 5)


@every_levels
def test_equals_vector_quantize_pytorch(levels):
    from vector_quantize_pytorch import FSQ

    theirs, ours = FSQ(list(levels)), fsq(levels)
    first = random_features(levels).requires_grad_()
    second = first.detach().clone().requires_grad_()
    out = ours(first)
    latent, ids = theirs(second)
    # theirs passes the gradient by an addition that rounds
    assert torch.allclose(out.latent, latent, atol=1e-6)
    assert torch.equal(out.ids[:, 0], ids.long())
    out.latent.square().sum().backward()
    latent.square().sum().backward()
    assert torch.allclose(first.grad, second.grad, atol=1e-5)


def test_training_on_a_mixture_uses_the_codes():
    """32 clusters in 8 dimensions, 64 codes: as many codes as there are clusters must come into use."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = 2 * torch.randn(32, 8, generator=generator)
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 3))
    decoder = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
    bottleneck = fsq((4, 4, 4))
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    losses = []
    for _ in range(400):
        chosen = torch.randint(32, (256,), generator=generator)
        points = centres[chosen] + 0.1 * torch.randn(256, 8, generator=generator)
        out = bottleneck(encoder(points).view(256, 3, 1, 1, 1))
        loss = (decoder(out.latent.view(256, 3)) - points).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert out.statistics["perplexity"] > 24
    assert out.statistics["window_usage"] > 0.7


def test_statistics_of_many_codes_need_no_count_per_code():
    bottleneck = fsq((8,) * 6)
    assert sum(buffer.numel() for buffer in bottleneck.buffers()) == 6  # the levels alone
    latent = bottleneck.ids_to_latent(torch.tensor([5, 5, 7, 200_000]).view(1, 1, 1, 1, 4))
    statistics = bottleneck(torch.atanh(latent * 0.99) - torch.atanh(torch.tensor(0.5 / 3.5035))).statistics
    assert statistics["usage"].item() == pytest.approx(3 / 8**6)
    assert statistics["perplexity"].item() == pytest.approx(2**1.5)


@pytest.mark.parametrize(
    ("ids", "said"), [(-1, "must be from 0 to 19, got -1 to -1"), (20, "must be from 0 to 19, got 20 to 20")]
)
def test_ids_that_are_no_codes_are_refused(ids, said):
    with pytest.raises(ValueError, match=said):
        fsq((4, 5)).ids_to_latent(torch.full((1, 1, 1, 1, 1), ids))


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least 3 per channel"):
        Fsq((5, 2))
    with pytest.raises(ValueError, match="more codes than an int64"):
        Fsq((8,) * 21)
    with pytest.raises(ValueError, match="latent_channels must be 2"):
        Fsq((5, 5)).check_latent_channels(3)
