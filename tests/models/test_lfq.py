"""LFQ and BSQ: bits, ids, entropies against sums over all codes, memory, and equality with vector-quantize-pytorch."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.bottlenecks.config import Lfq
from models.bottlenecks.registry import build_bottleneck

both = pytest.mark.parametrize("spherical", [False, True], ids=["lfq", "bsq"])


def lfq(channels, **settings):
    return build_bottleneck(Lfq(**settings), channels)


def random_features(channels, batch=2, side=8):
    return torch.randn(batch, channels, 3, side, side, generator=torch.Generator().manual_seed(0))


@both
@pytest.mark.parametrize("channels", [1, 6, 12])
def test_every_id_survives_the_latent_in_float16(channels, spherical):
    bottleneck = lfq(channels, spherical=spherical)
    ids = torch.arange(2**channels).view(1, 1, 1, 1, -1)
    latent = bottleneck.ids_to_latent(ids)
    assert torch.equal(bottleneck.latent_to_ids(latent.half()), ids)
    assert len(latent.flatten(2)[0].T.unique(dim=0)) == 2**channels
    assert bottleneck.codebook_sizes == (2**channels,)


@both
@pytest.mark.parametrize("channels", [6, 32])
def test_a_latent_is_the_code_of_its_ids(channels, spherical):
    bottleneck = lfq(channels, spherical=spherical)
    features = random_features(channels)
    out = bottleneck(features)
    stored = bottleneck.posterior(features).mean
    assert torch.equal(out.latent, stored)
    assert torch.equal(stored > 0, features > 0)
    assert out.ids.shape == (2, 1, 3, 8, 8)
    assert torch.equal(bottleneck.ids_to_latent(out.ids), stored)
    assert torch.equal(bottleneck.latent_to_ids(stored.half()), out.ids)
    length = 1.0 if spherical else math.sqrt(channels)
    assert stored.norm(dim=1).allclose(torch.tensor(length))


def test_ids_have_the_first_channel_as_lowest_bit():
    latent = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]).view(2, 3, 1, 1, 1)
    assert lfq(3).latent_to_ids(latent).flatten().tolist() == [1, 6]


@both
def test_gradient_reaches_the_encoder(spherical):
    features = random_features(6).requires_grad_()
    weights = torch.randn(2, 6, 3, 8, 8)
    out = lfq(6, spherical=spherical, entropy=0.0, commitment=0.0)(features)
    (out.latent * weights).sum().backward()
    same = torch.nn.functional.normalize(features, dim=1) if spherical else features
    (expected,) = torch.autograd.grad((same * weights).sum(), features)
    assert torch.allclose(features.grad, expected, atol=1e-6)
    assert (features.grad != 0).all()


def entropies_over_codes(features, codes, temperature):
    """The definitions, with a probability for every code: mean entropy, and entropy of the mean, in nats."""
    rows = features.movedim(1, -1).flatten(0, -2).double()
    probabilities = (-torch.cdist(rows, codes.double()).square() / temperature).softmax(dim=1)
    return torch.special.entr(probabilities).sum(1).mean(), torch.special.entr(probabilities.mean(0)).sum()


@both
def test_entropies_are_those_over_all_codes(spherical):
    channels = 6
    bottleneck = lfq(channels, spherical=spherical, temperature=1.7)
    codes = bottleneck.ids_to_latent(torch.arange(2**channels).view(1, 1, 1, 1, -1)).view(channels, -1).T
    values = torch.nn.functional.normalize(random_features(channels), dim=1) if spherical else random_features(channels)
    temperature = 1.7 / channels if spherical else 1.7  # ours is in units of a code's component
    sample, batch = entropies_over_codes(values, codes, temperature)
    statistics = bottleneck(random_features(channels)).statistics
    assert statistics["entropy"].item() * channels == pytest.approx(sample.item(), rel=1e-5)
    bound = statistics["batch_entropy"].item() * channels
    assert batch.item() <= bound <= batch.item() * 1.02  # independent bits: nearly equal
    one = random_features(channels)[:1, :, :1, :1, :1]  # of one position the average is a product: exactly equal
    statistics = bottleneck(one).statistics
    assert statistics["batch_entropy"].item() == pytest.approx(statistics["entropy"].item(), rel=1e-5)


def test_dependent_bits_make_the_bound_loose_upwards():
    features = 3 * random_features(1).repeat(1, 4, 1, 1, 1)  # four bits that are one
    bottleneck = lfq(4)
    codes = bottleneck.ids_to_latent(torch.arange(16).view(1, 1, 1, 1, -1)).view(4, -1).T
    _, batch = entropies_over_codes(features, codes, 1.0)
    assert bottleneck(features).statistics["batch_entropy"].item() * 4 > 2 * batch.item()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    out = lfq(6, entropy=0.3, diversity=2.0, commitment=0.7)(random_features(6))
    entropy, batch_entropy, commitment = (out.statistics[name] for name in ("entropy", "batch_entropy", "commitment"))
    assert out.loss.item() == pytest.approx((0.7 * commitment + 0.3 * (entropy - 2.0 * batch_entropy)).item(), rel=1e-5)
    features = random_features(6)
    assert commitment.item() == pytest.approx((features - features.sign()).square().mean().item(), rel=1e-5)


def test_entropy_is_finite_far_from_the_codes():
    features = (1e4 * random_features(3)).requires_grad_()
    out = lfq(3)(features)
    out.loss.backward()
    assert out.statistics["entropy"].item() == pytest.approx(0.0, abs=1e-3)
    assert features.grad.isfinite().all()


@both
def test_equals_vector_quantize_pytorch(spherical):
    from vector_quantize_pytorch import LFQ

    channels, inverse_temperature = 6, 1.5
    theirs = LFQ(dim=channels, commitment_loss_weight=0.25, spherical=spherical)
    theirs.train()
    size = 1 / math.sqrt(channels) if spherical else 1.0
    ours = lfq(channels, spherical=spherical, temperature=1 / (inverse_temperature * size**2))
    features = random_features(channels)
    (latent, ids, _), losses = theirs(features, inv_temperature=inverse_temperature, return_loss_breakdown=True)
    out = ours(features)
    assert torch.allclose(out.latent, latent, atol=1e-6)
    assert torch.allclose(ours.ids_to_latent(out.ids), theirs.indices_to_codes(ids), atol=1e-6)
    # theirs: nats per code, squared distances as they are; and log(p) is cut off at p = 1e-5
    assert out.statistics["entropy"].item() * channels == pytest.approx(losses.per_sample_entropy.item(), rel=1e-3)
    assert out.statistics["commitment"].item() * size**2 == pytest.approx(losses.commitment.item(), rel=1e-5)
    one = features[:1, :, :1, :1, :1]
    _, losses = theirs(one, inv_temperature=inverse_temperature, return_loss_breakdown=True)
    batch_entropy = ours(one).statistics["batch_entropy"].item() * channels
    assert batch_entropy == pytest.approx(losses.batch_entropy.item(), rel=1e-3)


class LargestTensor(TorchDispatchMode):
    """Watches every operation, those of the backward pass included, for the largest tensor that it gives."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@both
def test_memory_of_the_entropy_does_not_grow_with_the_codes(spherical):
    features = random_features(18, batch=1).requires_grad_()
    with LargestTensor() as largest:
        bottleneck = lfq(18, spherical=spherical)  # 2 ** 18 codes
        bottleneck(features).loss.backward()
    assert features.grad.any()
    assert largest.num_elements == features.numel() < 2**18


@both
def test_training_on_a_mixture_uses_the_codes(spherical):
    """32 clusters in 8 dimensions, 64 codes: about as many codes as there are clusters must come into use."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = 2 * torch.randn(32, 8, generator=generator)
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 6))
    decoder = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
    bottleneck = lfq(6, spherical=spherical)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    losses = []
    for _ in range(400):
        chosen = torch.randint(32, (256,), generator=generator)
        points = centres[chosen] + 0.1 * torch.randn(256, 8, generator=generator)
        out = bottleneck(encoder(points).view(256, 6, 1, 1, 1))
        loss = (decoder(out.latent.view(256, 6)) - points).square().mean()
        optimiser.zero_grad()
        (loss + out.loss).backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert out.statistics["perplexity"] > 24
    assert out.statistics["window_usage"] > 0.7


@both
def test_diversity_frees_bits_that_are_stuck(spherical):
    features = (0.5 + 0.1 * random_features(4)).requires_grad_()
    bottleneck = lfq(4, spherical=spherical, entropy=1.0, diversity=2.0, commitment=0.0)
    assert bottleneck(features).statistics["perplexity"].item() == pytest.approx(1.0)
    optimiser = torch.optim.Adam([features], lr=0.05)
    for _ in range(50):
        optimiser.zero_grad()
        bottleneck(features).loss.backward()
        optimiser.step()
    assert bottleneck(features).statistics["perplexity"] > 10


def test_ids_that_are_no_codes_are_refused():
    with pytest.raises(ValueError, match="must be from 0 to 7, got 8 to 8"):
        lfq(3).ids_to_latent(torch.full((1, 1, 1, 1, 1), 8))


def test_more_channels_than_an_id_has_bits_for_are_refused():
    with pytest.raises(ValueError, match="at most 32 latent channels"):
        Lfq().check_latent_channels(33)
