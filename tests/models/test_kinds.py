"""Every kind learns moving shapes, is saved, then encodes and decodes for the pipeline; and does what its name says."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from models.adversary import AdversarySettings
from models.bottlenecks.config import Gumbel, ResidualVq, Vq
from models.checkpoint import load_checkpoint, save_checkpoint
from models.config import BackboneConfig, Pyramid
from models.encoders import load_encoder
from models.generative.codes import grids_to_latent, latent_to_grids
from models.generative.pca import PatchPcaMeter, psnr
from models.kinds.ae import Ae
from models.kinds.contractive_ae import ContractiveAe, squared_sensitivity
from models.kinds.denoising_ae import DenoisingAe
from models.kinds.dvae import Dvae
from models.kinds.fsq_vae import FsqVae
from models.kinds.lfq import LfqVae
from models.kinds.registry import KINDS, kind_class
from models.kinds.rvq import RvqVae
from models.kinds.sparse_ae import SparseAe, activity_divergence
from models.kinds.vae import Vae
from models.kinds.vq_gan import VqGan
from models.kinds.vq_vae import VqVae
from models.kinds.vq_vae_2 import VqVae2
from models.train_settings import TrainSettings
from models.training import random_objective, train
from tests.backbones import NARROW
from tests.moving_shapes import moving_shapes, shapes_pixels
from tests.narrow import difference_std

STEPS = 80
SETTINGS = TrainSettings(learning_rate=3e-3, warmup_steps=5, ema_decay=0.9)
CODES = Vq(codebook_size=64)
EXAMPLES = (
    Ae(),
    DenoisingAe(),
    SparseAe(),
    ContractiveAe(),
    Vae(),
    VqVae(bottleneck=CODES),
    VqVae2(bottleneck=CODES),
    VqGan(bottleneck=CODES, adversary=AdversarySettings(channels=8, depth=2, start_step=40)),
    RvqVae(bottleneck=ResidualVq(num_quantisers=2, codebook_size=64)),
    FsqVae(),
    LfqVae(bits=10),
    Dvae(bottleneck=Gumbel(64, temperature=2.0, temperature_steps=STEPS, kl_weight=0.01, kl_steps=STEPS)),
)
# The error on clips that were not trained on, as a share of that of a clip's mean colour.
CONTINUOUS, DISCRETE = 0.5, 0.85
every_kind = pytest.mark.parametrize("kind", EXAMPLES, ids=[kind.name for kind in EXAMPLES])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each example's training losses and checkpoint, made when a test first asks for it."""
    made = {}

    def get(kind):
        if kind not in made:
            losses = []
            model = train(
                kind,
                NARROW,
                moving_shapes(),
                steps=STEPS,
                settings=SETTINGS,
                normaliser_batches=2,
                progress=lambda step, loss: losses.append(loss),
            )
            directory = tmp_path_factory.mktemp("kinds") / kind.name
            save_checkpoint(directory, model.model, model.normaliser)
            made[kind] = losses, directory
        return made[kind]

    return get


def test_every_kind_has_an_example_and_its_name():
    assert [kind.name for kind in EXAMPLES] == list(KINDS)
    assert [kind_class(kind.name) for kind in EXAMPLES] == [type(kind) for kind in EXAMPLES]
    with pytest.raises(ValueError, match="no model kind 'ea': use one of ae, denoising_ae"):
        kind_class("ea")


@every_kind
def test_it_learns_and_its_checkpoint_serves_the_pipeline(kind, trained):
    losses, directory = trained(kind)
    first, last = (sum(loss["loss"] for loss in part) / 5 for part in (losses[:5], losses[-5:]))
    if kind.name == "dvae":  # a log-likelihood, which has no zero
        assert last < first - 0.45
    else:
        assert last < 0.5 * first
    encoder = load_encoder(str(directory))
    frames = next(moving_shapes(seed=1000, batch=8))
    latents = encoder.encode(frames).mean
    assert latents.shape == (8, *encoder.card.geometry.latent_shape(5, 32, 32))
    assert encoder.card.name.startswith(f"{kind.name}-")
    mean_colour = frames.float().mean(dim=(1, 2, 3), keepdim=True)
    error = (encoder.decode(latents).float() - frames.float()).abs().mean() / (frames - mean_colour).abs().mean()
    discrete = bool(random_objective(kind, NARROW, seed=0).model.bottleneck.codebook_sizes)
    assert error < (DISCRETE if discrete else CONTINUOUS)


@every_kind
def test_it_serves_in_bfloat16(kind, trained):
    """Its latents are near float32's; those of a discrete kind are made of the very codes of its codebooks."""
    _, directory = trained(kind)
    exact, near = (load_encoder(str(directory), compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    frames = next(moving_shapes(seed=1000, batch=8))
    wanted, found = exact.encode(frames).mean, near.encode(frames).mean
    model, _ = load_checkpoint(directory)
    if model.bottleneck.codebook_sizes:
        assert torch.equal(grids_to_latent(model, latent_to_grids(model, found)), found)
        assert (found == wanted).float().mean() > 0.9
    else:
        assert 0 < difference_std(found, wanted) < 0.03
    clips, near_clips = (encoder.decode(wanted).float() for encoder in (exact, near))
    assert 0 < (near_clips - clips).abs().mean() < 2


@every_kind
def test_all_noise_is_the_generators(kind):
    """Two passes with one seed agree, the global seed is left alone, and so training can be resumed exactly."""
    pixels = shapes_pixels()
    losses = []
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for seed in (1, 1):
        objective = random_objective(kind, NARROW, seed=0).train()
        losses.append(objective(pixels, step=60, generator=torch.Generator().manual_seed(seed)).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_a_kinds_loss_reaches_every_weight_of_its_model(kind):
    objective = random_objective(kind, NARROW, seed=0).train()
    for weight in objective.model.parameters():  # some start at zero, and shut others off
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        weight.data.add_(noise, alpha=0.02)
    objective(shapes_pixels(), generator=torch.Generator().manual_seed(0)).loss.backward()
    silent = [
        name for name, weight in objective.model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert silent == []


@pytest.mark.parametrize("kind", [Ae(), Vae()], ids=["ae", "vae"])
def test_it_beats_pca_of_the_same_rank(kind):
    """Three numbers per block of 2 x 8 x 8 pixels, on clips that neither has seen."""
    backbone = BackboneConfig(4, ((2, 2),), Pyramid((32, 32), 1), Pyramid((32, 64), 1), latent_channels=3)
    settings = TrainSettings(learning_rate=1e-3, warmup_steps=5, ema_decay=0.95)
    model = train(kind, backbone, moving_shapes(), steps=150, settings=settings).model
    meter = PatchPcaMeter(model.config.geometry)
    meter.update(shapes_pixels(seed=2000, batch=400))
    pixels = shapes_pixels(seed=1000, batch=16)
    with torch.inference_mode():
        reconstruction = model.decode(model.encode(pixels).mean)
    assert psnr(reconstruction, pixels) > psnr(meter.result().reconstruct(pixels), pixels) + 0.3


class TestDenoising:
    def test_only_what_the_encoder_sees_is_damaged(self):
        objective = random_objective(DenoisingAe(noise_std=0.2, mask_share=0.3), NARROW, seed=0)
        seen, compared = [], []
        objective.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        compare = objective.compare
        objective.compare = lambda found, wanted: compared.append(wanted) or compare(found, wanted)
        pixels = shapes_pixels()
        objective(pixels, generator=torch.Generator().manual_seed(0))
        assert torch.equal(compared[0], pixels)
        assert not torch.equal(seen[0], pixels)
        objective.model.encode(pixels)
        assert torch.equal(seen[1], pixels)

    def test_the_noise_has_the_deviation_that_was_asked_for(self):
        pixels = shapes_pixels(batch=8)
        damaged = self._corrupt(DenoisingAe(noise_std=0.2, mask_share=0.0), pixels)
        assert (damaged - pixels).std().item() == pytest.approx(0.2, rel=0.02)
        assert (damaged - pixels).mean().item() == pytest.approx(0.0, abs=0.005)

    def test_masks_are_grey_patches_through_all_frames(self):
        pixels = torch.ones(64, 3, 2, 20, 32)  # 20 is no multiple of 8
        damaged = self._corrupt(DenoisingAe(noise_std=0.0, mask_share=0.25, mask_patch=8), pixels)
        assert set(damaged.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(damaged, damaged[:, :1, :1].expand_as(damaged))
        patch = damaged[:, 0, 0, :8, 8:16].flatten(1)
        assert torch.equal(patch, patch[:, :1].expand_as(patch))
        assert (damaged == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)

    def test_a_denoiser_repairs_what_an_autoencoder_does_not(self, trained):
        clean = next(moving_shapes(seed=1000, batch=8))
        noise = 40 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = (clean.float() + noise).round().clamp(0, 255).to(torch.uint8)
        errors = []
        for kind in EXAMPLES[:2]:
            encoder = load_encoder(str(trained(kind)[1]))
            decoded = encoder.decode(encoder.encode(noisy).mean)
            errors.append((decoded.float() - clean.float()).abs().mean().item())
        assert errors[1] < errors[0]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"noise_std": -0.1}, "must not be negative"),
            ({"mask_share": 1.0}, r"lie in \[0, 1\)"),
            ({"noise_std": 0.0, "mask_share": 0.0}, "else use the kind ae"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            DenoisingAe(**fields)

    def _corrupt(self, kind, pixels):
        return random_objective(kind, NARROW, seed=0).corrupt(pixels, torch.Generator().manual_seed(0))


class TestSparse:
    @pytest.mark.parametrize("penalty", ["l1", "kl"])
    def test_the_penalty_makes_the_code_sparse(self, penalty, trained):
        """Measured by the kurtosis, which knows no scale: many values near zero, and few far from it."""
        plain, sparse = (code_of(trained(kind)) for kind in (EXAMPLES[0], SparseAe(penalty=penalty)))
        assert kurtosis(sparse) > 1.4 * kurtosis(plain)

    def test_the_divergence_is_that_of_two_coins(self):
        code = torch.atanh(torch.tensor([0.2, -0.6])).view(2, 1, 1, 1, 1)  # one channel of mean activity 0.4
        coins = torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(torch.tensor(0.1)), torch.distributions.Bernoulli(torch.tensor(0.4))
        )
        assert activity_divergence(code, 0.1).item() == pytest.approx(coins.item(), rel=1e-5)
        assert activity_divergence(torch.zeros(1, 2, 1, 1, 1), 0.1).isfinite()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"penalty": "l0"}, "not one of l1, kl"),
            ({"sparsity": 0.0}, "must be positive"),
            ({"rho": 1.0}, "rho between"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            SparseAe(**fields)


def code_of(trained_kind):
    """The code of clips that were not trained on."""
    model, _ = load_checkpoint(trained_kind[1])
    with torch.inference_mode():
        return model.encode(shapes_pixels(seed=1000, batch=8)).mean


def kurtosis(code):
    return (code**4).mean() / code.square().mean() ** 2


class TestContractive:
    def test_the_estimate_is_the_exact_jacobians_norm_on_average(self):
        model = random_objective(ContractiveAe(), NARROW, seed=0).model
        pixels = shapes_pixels(batch=1, frames=1, side=8).requires_grad_()
        jacobian = torch.autograd.functional.jacobian(lambda clip: model.encoder(clip, None), pixels)
        code = model.encoder(pixels, None)
        exact = jacobian.square().sum().item() / code.numel()
        generator = torch.Generator().manual_seed(0)
        estimates = [squared_sensitivity(pixels, code, generator).item() for _ in range(400)]
        error = np.std(estimates) / np.sqrt(len(estimates))
        assert np.mean(estimates) == pytest.approx(exact, abs=4 * error)
        assert error < 0.04 * exact

    def test_its_gradient_is_the_exact_one_where_no_chance_is_involved(self):
        """A linear map of one number to one: the estimate is v^2 w^2, whose gradient in w is 2 v^2 w."""
        weight = torch.tensor(3.0, requires_grad=True)
        pixels = torch.tensor([2.0], requires_grad=True)
        drawn = torch.empty(1).normal_(generator=torch.Generator().manual_seed(5)).item()
        value = squared_sensitivity(pixels, weight * pixels, torch.Generator().manual_seed(5))
        value.backward()
        assert value.item() == pytest.approx(9 * drawn**2)
        assert weight.grad.item() == pytest.approx(6 * drawn**2)

    def test_it_is_the_sum_over_a_batch_of_separate_clips(self):
        pixels = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        estimates = [
            squared_sensitivity(pixels, pixels * 2, torch.Generator().manual_seed(seed)).item() for seed in range(500)
        ]
        assert np.mean(estimates) == pytest.approx(4.0, rel=0.05)  # |d code / d pixels|^2 = 4 per element

    def test_training_makes_the_code_less_sensitive(self, trained):
        """In units of the code's own variance, so that to shrink is not enough."""
        sensitivities = []
        for kind in (EXAMPLES[0], EXAMPLES[3]):
            model, _ = load_checkpoint(trained(kind)[1])
            pixels = shapes_pixels(seed=1000, batch=8).requires_grad_()
            code = model.encode(pixels).mean
            value = squared_sensitivity(pixels, code, torch.Generator().manual_seed(0))
            sensitivities.append(value.item() / code.var().item())
        assert sensitivities[1] < 0.7 * sensitivities[0]

    def test_a_contraction_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="use the kind ae"):
            ContractiveAe(contraction=0.0)


def test_kinds_whose_code_sets_the_latents_channels():
    assert FsqVae().model_config(NARROW).backbone.latent_channels == 6
    assert LfqVae(bits=12).model_config(NARROW).backbone.latent_channels == 12


@every_kind
def test_a_kind_is_a_frozen_record_that_names_its_source(kind):
    assert dataclasses.is_dataclass(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.weights = None
    assert any(word in inspect.getmodule(kind).__doc__.splitlines()[0] for word in ("arXiv", "et al.", "Science", "Ng"))
