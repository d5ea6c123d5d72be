"""Vector quantisation: gradients, ids, what the codebook learns and keeps, equality with another library."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.bottlenecks.config import Vq
from models.bottlenecks.registry import build_bottleneck
from models.bottlenecks.vq import VqBottleneck, pass_gradient, to_grid, to_rows

CHANNELS = 8
BOTH_UPDATES = pytest.mark.parametrize("update", ["ema", "gradient"])


def build(seed=0, **fields):
    torch.manual_seed(seed)
    return VqBottleneck(Vq(**{"codebook_size": 16, **fields}), CHANNELS).train()


def features(seed=0, batch=2, extents=(3, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, *extents, generator=generator)


def trained(steps=3, **fields):
    bottleneck = build(**fields)
    for step in range(steps):
        bottleneck(features(seed=step), step=step)
    return bottleneck.eval()


def without_data_initialisation(bottleneck):
    bottleneck.codebook.initialised.fill_(value=True)
    return bottleneck


def train_on_mixture(bottleneck, steps=100):
    """The last step's statistics after batches of 512 from 64 Gaussians in 8 dimensions, off the origin."""
    generator = torch.Generator().manual_seed(1)
    means = 3 * torch.randn(64, CHANNELS, generator=generator) + 5
    weights = [weight for weight in bottleneck.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=1e-2) if weights else None
    for step in range(steps):
        chosen = means[torch.randint(64, (512,), generator=generator)]
        rows = chosen + 0.3 * torch.randn(512, CHANNELS, generator=generator)
        output = bottleneck(to_grid(rows, torch.empty(2, 1, 4, 8, 8)), step=step, generator=generator)
        if optimiser is not None:
            optimiser.zero_grad()
            output.loss.backward()
            optimiser.step()
    return output.statistics


def test_the_registry_builds_it():
    assert isinstance(build_bottleneck(Vq(), 4), VqBottleneck)


def test_the_latent_is_the_nearest_code():
    bottleneck = trained()
    x = features(9)
    output = bottleneck(x)
    distances = (to_rows(x)[:, None] - bottleneck.codebook.weight).norm(dim=-1)
    assert torch.equal(output.ids, to_grid(distances.argmin(1), x))
    assert output.ids.dtype == torch.int64
    assert torch.equal(output.latent, bottleneck.ids_to_latent(output.ids))
    assert torch.equal(output.latent, bottleneck.posterior(x).mean)
    assert bottleneck.posterior(x).logvar is None


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_gradient_of_the_latent_reaches_the_features(gradient):
    bottleneck = build(gradient=gradient, commitment=0.0)
    x = features().requires_grad_()
    weights = features(5)
    (bottleneck(x).latent * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert torch.equal(x.grad, weights) == (gradient == "straight_through")


def test_rotation_turns_the_gradient_as_the_feature_was_turned():
    rows, codes, gradient = (to_rows(features(seed)) for seed in range(3))
    rows.requires_grad_()
    latent = pass_gradient(rows, codes, "rotation")
    assert torch.equal(latent, codes)
    (latent * gradient).sum().backward()
    scale = codes.norm(dim=1) / rows.norm(dim=1)
    assert torch.allclose(rows.grad.norm(dim=1), gradient.norm(dim=1) * scale, rtol=1e-4)
    turned = (F.normalize(rows.grad) * F.normalize(rows)).sum(1)
    assert torch.allclose(turned, (F.normalize(gradient) * F.normalize(codes)).sum(1), atol=1e-5)


def test_the_commitment_pulls_features_and_the_gradient_moves_codes():
    x = features().requires_grad_()
    ema = build(commitment=0.5)
    learned = without_data_initialisation(build(update="gradient", commitment=0.5))
    output = ema(x)
    assert not list(ema.parameters())
    assert output.loss.item() == pytest.approx(0.5 * output.statistics["commitment"].item())
    output.loss.backward()
    codes = to_rows(output.latent.detach())
    assert torch.allclose(to_rows(x.grad), (to_rows(x) - codes) / codes.numel(), atol=1e-7)
    output = learned(features())
    assert output.loss.item() == pytest.approx(1.5 * output.statistics["commitment"].item(), rel=1e-5)
    output.loss.backward()
    chosen = torch.bincount(output.ids.flatten(), minlength=16) > 0
    assert torch.equal(learned.codebook.weight.grad.abs().sum(1) > 0, chosen)


@BOTH_UPDATES
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ids_round_trip(update, cosine, dtype):
    bottleneck = trained(update=update, cosine=cosine, codebook_size=200)
    ids = torch.arange(200).view(2, 1, 4, 5, 5)
    assert torch.equal(bottleneck.latent_to_ids(bottleneck.ids_to_latent(ids).to(dtype)), ids)
    output = bottleneck(features(3))
    assert torch.equal(bottleneck.latent_to_ids(output.latent.to(dtype)), output.ids)


def test_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"ids must be B 1 t h w.*\(2, 2, 1, 4, 4\)"):
        build().ids_to_latent(torch.zeros(2, 2, 1, 4, 4, dtype=torch.long))


def test_a_clip_in_chunks_has_the_latent_of_the_whole():
    bottleneck = trained(codebook_size=64)
    x = features(4, extents=(7, 4, 4))
    whole = bottleneck.posterior(x).mean
    chunks = [bottleneck.posterior(chunk).mean for chunk in x.split([1, 4, 2], dim=2)]
    assert torch.equal(whole, torch.cat(chunks, dim=2))


def test_posterior_and_eval_mode_change_nothing():
    bottleneck = build(revive_below=1.0)
    bottleneck(features())
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    bottleneck.posterior(features(1))
    bottleneck.eval()
    bottleneck(features(2))
    assert all(torch.equal(value, before[name]) for name, value in bottleneck.state_dict().items())
    bottleneck.train()(features(2))
    assert not torch.equal(bottleneck.codebook.weight, before["codebook.weight"])


def test_arithmetic_is_float32_under_autocast():
    plain, under = without_data_initialisation(build()), without_data_initialisation(build())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = under(features())
    assert torch.equal(output.latent, plain(features()).latent)
    assert torch.equal(plain.codebook.weight, under.codebook.weight)
    low = under(features().bfloat16())
    assert (low.latent.dtype, low.loss.dtype) == (torch.bfloat16, torch.float32)


def test_the_average_is_the_closed_form():
    decay = 0.75
    bottleneck = without_data_initialisation(build(codebook_size=2, ema_decay=decay, revive_below=0.0))
    book = bottleneck.codebook
    book.weight.copy_(torch.stack([torch.full((CHANNELS,), -5.0), torch.full((CHANNELS,), 5.0)]))
    book.sums.copy_(book.weight)
    batches = [features(seed, batch=1, extents=(1, 1, 3)).abs() for seed in range(4)]  # all near the second code
    for batch in batches:
        assert bottleneck(batch).ids.unique().tolist() == [1]
    weights = [0.25 * decay**age for age in (3, 2, 1, 0)]
    count = decay**4 + 3 * sum(weights)
    total = 5 * decay**4 + sum(w * to_rows(batch).sum(0) for w, batch in zip(weights, batches, strict=True))
    assert torch.allclose(book.weight[1], total / count, rtol=1e-5)
    assert torch.equal(book.weight[0], torch.full((CHANNELS,), -5.0))  # what nobody chooses stays where it is
    assert torch.allclose(book.counts, torch.tensor([decay**4, count]))


def test_the_first_batch_places_the_codes_and_a_checkpoint_remembers_it(tmp_path):
    bottleneck = build(revive_below=0.0)
    assert not bottleneck.codebook.initialised
    means = 20 * torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(1))
    rows = (means.repeat(6, 1) + 0.01 * torch.randn(96, CHANNELS))[torch.randperm(96)]
    bottleneck(to_grid(rows, features()))
    assert bottleneck.codebook.initialised
    # k-means may put two codes on one mean, but each code is the centre of rows of this batch
    assert (bottleneck.codebook.counts.sum() - 96).abs() < 1e-3
    assert torch.cdist(rows, bottleneck.codebook.weight).amin(1).median() < 0.1
    save_file(bottleneck.state_dict(), tmp_path / "vq.safetensors")
    loaded = build(seed=1, revive_below=0.0)
    loaded.load_state_dict(load_file(tmp_path / "vq.safetensors"))
    assert torch.equal(loaded.codebook.weight, bottleneck.codebook.weight)
    for model in (bottleneck, loaded):
        model(features(3))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in bottleneck.state_dict().items())
    # placed once and then averaged: had it been placed again, no code would be near those rows
    assert (torch.cdist(rows, loaded.codebook.weight).amin(1) < 0.1).float().mean() > 0.3


def test_fewer_features_than_codes_place_as_many_codes_as_there_are():
    bottleneck = build(codebook_size=64, revive_below=0.0)
    before = bottleneck.codebook.weight.clone()
    x = features(batch=1, extents=(1, 4, 4))
    for _ in range(3):
        bottleneck(x)
    assert torch.equal((bottleneck.codebook.weight == before).all(1), bottleneck.codebook.counts == 0)
    assert torch.cdist(to_rows(x), bottleneck.codebook.weight).amin(1).max() < 1e-2


@BOTH_UPDATES
def test_dead_codes_move_to_features_and_live_ones_stay(update):
    bottleneck = without_data_initialisation(build(update=update, revive_below=0.5, ema_decay=0.0))
    book = bottleneck.codebook
    with torch.no_grad():
        book.weight[:4] += 1000
    x = features()
    expected = book.weight.clone() if update == "gradient" else None
    output = bottleneck(x, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(output.ids.flatten(), minlength=16)
    dead = counts < 0.5 * counts.float().mean()
    assert dead[:4].all()
    assert not dead.all()
    on_a_feature = (
        torch.cdist(book.weight.detach(), to_rows(x), compute_mode="donot_use_mm_for_euclid_dist").amin(1) == 0
    )
    assert on_a_feature[dead].all()
    assert torch.unique(book.weight[dead], dim=0).shape[0] == dead.sum()  # no feature is drawn twice
    assert torch.equal(book.counts[dead], counts.float().mean().expand(int(dead.sum())))
    if expected is not None:
        assert torch.equal(book.weight[~dead], expected[~dead])
    else:
        assert torch.allclose(book.sums[dead], book.weight[dead] * book.counts[dead, None])


@BOTH_UPDATES
def test_a_mixture_fills_the_codebook_and_without_data_or_revival_it_does_not(update):
    statistics = train_on_mixture(build(codebook_size=64, update=update))
    assert statistics["window_usage"] >= 0.95  # 1.0 when this was written
    assert statistics["perplexity"] > 40  # 48
    revived = train_on_mixture(without_data_initialisation(build(codebook_size=64, update=update)))
    assert revived["window_usage"] >= 0.9  # 1.0
    plain = train_on_mixture(without_data_initialisation(build(codebook_size=64, update=update, revive_below=0.0)))
    assert plain["window_usage"] < 0.3  # 0.16
    assert plain["commitment"] > 3 * statistics["commitment"]


def test_the_same_seed_learns_the_same_and_the_generator_draws():
    def learn(seed):
        bottleneck = build(revive_below=1.0)
        generator = torch.Generator().manual_seed(seed)
        for step in range(4):
            torch.rand(1)  # the global generator is of no consequence
            bottleneck(features(step), generator=generator)
        return bottleneck.codebook.weight

    assert torch.equal(learn(0), learn(0))
    assert not torch.equal(learn(0), learn(1))


@pytest.mark.parametrize("cosine", [False, True])
def test_the_average_and_the_gradients_are_those_of_vector_quantize_pytorch(cosine):
    from vector_quantize_pytorch import VectorQuantize

    for gradient in ("straight_through", "rotation"):
        ours = without_data_initialisation(build(cosine=cosine, gradient=gradient, ema_decay=0.8, revive_below=0.0))
        theirs = VectorQuantize(
            CHANNELS, 16, decay=0.8, eps=1e-12, commitment_weight=0.25, use_cosine_sim=cosine,
            accept_3d_fmap=True, rotation_trick=gradient == "rotation",
        ).train()  # fmt: skip
        theirs._codebook.embed.copy_(ours.codebook.weight[None])
        theirs._codebook.embed_avg.copy_(ours.codebook.weight[None])
        for step in range(5):
            x, y = features(step).requires_grad_(), features(step).requires_grad_()
            output = ours(x)
            latent, ids, loss = theirs(y)
            assert torch.equal(output.ids[:, 0], ids)
            assert torch.allclose(output.latent, latent, atol=1e-5)
            assert torch.allclose(output.loss, loss, rtol=1e-5)
            weights = features(step + 50)
            ((output.latent * weights).sum() + output.loss).backward()
            ((latent * weights).sum() + loss).backward()
            assert torch.allclose(x.grad, y.grad, atol=1e-5)
            assert torch.allclose(ours.codebook.weight, theirs._codebook.embed[0], atol=1e-5)
            assert torch.allclose(ours.codebook.counts, theirs._codebook.cluster_size[0], atol=1e-4)


def test_cosine_ignores_length():
    bottleneck = trained(cosine=True)
    x = features(7)
    assert torch.equal(bottleneck(x).ids, bottleneck(17 * x).ids)
    assert torch.allclose(bottleneck(x).latent.norm(dim=1), torch.ones(()), atol=1e-6)
    assert torch.allclose(bottleneck.codebook.weight.norm(dim=1), torch.ones(()), atol=1e-6)


def test_the_whole_model_trains_and_goes_through_a_checkpoint(tmp_path):
    from models.autoencoder import CausalAutoencoder
    from models.checkpoint import load_checkpoint, save_checkpoint
    from models.config import BackboneConfig, ModelConfig, Pyramid
    from models.spec import Normaliser

    backbone = BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 1), Pyramid((8, 16), 1), latent_channels=4)
    torch.manual_seed(0)
    model = CausalAutoencoder(ModelConfig(backbone, Vq(codebook_size=32, cosine=True)))
    pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    output = model(pixels)
    (output.pixels.square().mean() + output.bottlenecked.loss).backward()
    assert model.encoder.conv_in.conv.weight.grad.abs().sum() > 0
    save_checkpoint(tmp_path / "vq", model.eval(), Normaliser((0.0,) * 4, (1.0,) * 4))
    loaded, document = load_checkpoint(tmp_path / "vq")
    assert document.config.bottleneck == dataclasses.replace(Vq(), codebook_size=32, cosine=True)
    assert loaded.bottleneck.codebook.initialised
    with torch.no_grad():
        latent = loaded.encode(pixels).mean
        assert torch.equal(latent, model.encode(pixels).mean)
        assert torch.equal(loaded.bottleneck.ids_to_latent(loaded.bottleneck.latent_to_ids(latent.half())), latent)


@pytest.mark.parametrize(
    ("field", "value"), [("revive_below", 2.0), ("ema_decay", 1.5), ("update", "adam"), ("codebook_size", 1)]
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Vq(**{field: value})
