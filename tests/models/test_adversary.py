"""The adversary: its losses by hand, when it starts, who gets which gradient, and that training with it works."""

import math

import pytest
import torch
from torch import nn

from models.adversary import (
    AdversarySettings,
    PatchAdversary,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_regularisation,
)
from models.bottlenecks.config import Kl, Vq
from models.config import BackboneConfig, Pyramid
from models.discriminators import PatchDiscriminator
from models.kinds.registry import kind_class
from models.kinds.vq_gan import VqGan
from models.train_settings import TrainSettings
from models.trainer import Trainer
from models.training import random_objective
from tests.moving_shapes import squares_pixels

BACKBONE = BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 1), Pyramid((8, 16), 1), latent_channels=4)
SMALL = AdversarySettings(channels=8, depth=2, start_step=0)
QUICK = TrainSettings(learning_rate=2e-3, warmup_steps=5)


def settings(**changes):
    return AdversarySettings(**{"channels": 8, "depth": 2, "start_step": 0, **changes})


def adversary(**changes):
    torch.manual_seed(0)
    return PatchAdversary(settings(**changes))


def discriminator(dimensions, depth=2):
    torch.manual_seed(0)
    return PatchDiscriminator(dimensions, channels=8, depth=depth).requires_grad_(requires_grad=False)


def random_pixels(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert generator_loss(fake, "hinge").item() == pytest.approx(1.0)  # -(-3 + 1) / 2
    # Clips: (0 + 0.5) / 2; reconstructions: (0 + 2) / 2; half of both.
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 1.0))


def test_non_saturating_losses_by_hand():
    real, fake = torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, -math.log(3)])
    # -log sigmoid: sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4.
    assert generator_loss(fake, "non_saturating").item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    wrong = (math.log(2) + math.log(4 / 3)) / 2  # on each side
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(wrong)


def test_lecam_by_hand():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    logit_means = torch.tensor([2.0, -1.0], requires_grad=True)
    # Clips against -1: (4 + 16) / 2; reconstructions against 2: (9 + 4) / 2.
    regularisation = lecam_regularisation(real.requires_grad_(), fake, logit_means)
    assert regularisation.item() == pytest.approx(10 + 6.5)
    regularisation.backward()
    assert real.grad.tolist() == pytest.approx([2.0, 4.0])
    assert logit_means.grad is None


def test_the_adaptive_weight_by_hand():
    last_layer = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, generator = 3 * last_layer[0] + 4 * last_layer[1], 2 * last_layer[0]
    weight = adaptive_weight(reconstruction, generator, last_layer, 1e4)
    assert weight.item() == pytest.approx(5 / 2)
    assert not weight.requires_grad
    assert adaptive_weight(reconstruction, generator, last_layer, 1.5).item() == 1.5
    assert adaptive_weight(reconstruction, 0 * generator, last_layer, 1e4).item() == 1e4
    (reconstruction + weight * generator).backward()  # the graph is still there
    assert last_layer.grad.tolist() == pytest.approx([3 + 2.5 * 2, 4])
    with torch.no_grad():
        assert adaptive_weight(reconstruction, generator, last_layer, 1e4).item() == 1


def test_the_generators_term_is_as_strong_as_the_reconstructions():
    """After the adaptive weight, both gradients at the last layer are of one length, but for the weight."""
    last_layer = nn.Parameter(random_pixels(3, 3))
    pixels = random_pixels(1, 3, 3, 8, 8)
    reconstruction = torch.einsum("oc,bcthw->bothw", last_layer, pixels)
    reconstruction_loss = (reconstruction - pixels).abs().mean()
    loss, values = adversary(weight=0.3).generator_terms(pixels, reconstruction, last_layer, reconstruction_loss, 0)
    adversarial, own = (
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (loss, reconstruction_loss)
    )
    assert adversarial.item() == pytest.approx(0.3 * own.item(), rel=1e-3)
    assert loss.item() == pytest.approx(0.3 * (values["adaptive_weight"] * values["generator"]).item())


def test_there_is_nothing_before_the_start():
    late = adversary(start_step=3)
    last_layer = nn.Parameter(torch.ones(1))
    pixels = random_pixels(1, 3, 3, 8, 8)
    reconstruction = pixels * last_layer
    loss = (reconstruction - pixels).square().mean() + last_layer.sum()
    generator, values = late.generator_terms(pixels, reconstruction, last_layer, loss, step=2)
    assert generator.item() == 0
    assert not generator.requires_grad
    assert values == {}
    assert late.discriminator_terms(pixels, reconstruction, step=2) is None
    assert late.updates == 0
    generator, values = late.generator_terms(pixels, reconstruction, last_layer, loss, step=3)
    assert generator.requires_grad
    assert set(values) == {"generator", "adaptive_weight"}
    terms = late.discriminator_terms(pixels, reconstruction, step=3)
    assert set(terms.values) == {"real_logit", "fake_logit", "lecam"}
    assert late.updates == 1


@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_each_side_has_gradients_of_its_own(dimensions):
    judge = adversary(discriminator=dimensions)
    last_layer = nn.Parameter(torch.full((1,), 0.7))
    pixels = random_pixels(2, 3, 5, 8, 8)
    reconstruction = pixels * last_layer
    loss, _ = judge.generator_terms(pixels, reconstruction, last_layer, (reconstruction - pixels).abs().mean(), 0)
    loss.backward()
    assert last_layer.grad.abs() > 0
    assert all(weight.grad is None for weight in judge.parameters())
    last_layer.grad = None
    judge.discriminator_terms(pixels, pixels * last_layer, 0).loss.backward()
    assert last_layer.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in judge.parameters())


def test_the_averages_of_logits_start_as_plain_means():
    judge = adversary(lecam=0.5, lecam_decay=0.6)
    seen = []
    for seed in range(4):
        terms = judge.discriminator_terms(random_pixels(1, 3, 3, 8, 8, seed=seed), random_pixels(1, 3, 3, 8, 8), 0)
        seen.append(torch.stack([terms.values["real_logit"], terms.values["fake_logit"]]))
        if seed == 0:
            assert judge.logit_means.tolist() == pytest.approx(seen[0].tolist())
        if seed == 1:
            assert judge.logit_means.tolist() == pytest.approx(((seen[0] + seen[1]) / 2).tolist())
    after_two = (seen[0] + seen[1]) / 2
    after_three = 0.6 * after_two + 0.4 * seen[2]
    assert judge.logit_means.tolist() == pytest.approx((0.6 * after_three + 0.4 * seen[3]).tolist())
    assert {"logit_means", "updates"} <= judge.state_dict().keys()


def test_lecam_is_added_with_its_weight():
    pixels, reconstruction = random_pixels(1, 3, 3, 8, 8), random_pixels(1, 3, 3, 8, 8, seed=1)
    plain = adversary(lecam=0.0).discriminator_terms(pixels, reconstruction, 0)
    regularised = adversary(lecam=0.5).discriminator_terms(pixels, reconstruction, 0)
    assert "lecam" not in plain.values
    assert regularised.values["lecam"] > 0
    assert regularised.loss.item() == pytest.approx((plain.loss + 0.5 * regularised.values["lecam"]).item())


def test_2d_judges_every_frame_by_itself():
    judge = discriminator("2d")
    pixels = random_pixels(1, 3, 4, 16, 24)
    logits = judge(pixels)
    assert logits.shape == (1, 1, 4, 4, 6)
    frames = torch.cat([judge(frame) for frame in pixels.split(1, dim=2)], dim=2)
    torch.testing.assert_close(logits, frames)


def test_3d_judges_motion():
    judge = discriminator("3d")
    pixels = random_pixels(1, 3, 9, 16, 16)
    logits = judge(pixels)
    assert logits.shape == (1, 1, 3, 4, 4)
    assert (logits.mean() - judge(pixels.flip(2)).mean()).abs() > 1e-4
    assert judge(pixels[:, :, :1]).shape == (1, 1, 1, 4, 4)


@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_logits_do_not_depend_on_the_rest_of_the_batch(dimensions):
    judge = discriminator(dimensions).train()
    pixels = random_pixels(3, 3, 5, 16, 16)
    changed = torch.cat([pixels[:1], 0.1 * pixels[1:]])
    torch.testing.assert_close(judge(pixels)[:1], judge(changed)[:1])
    torch.testing.assert_close(judge(pixels)[:1], judge(pixels[:1]))


def test_settings_and_frames_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="frames of 16x4 are too small"):
        discriminator("2d", depth=3)(random_pixels(1, 3, 1, 16, 4))
    for change, message in [
        ({"discriminator": "4d"}, "'4d' is not one of 2d, 3d"),
        ({"loss": "wasserstein"}, "not one of hinge, non_saturating"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"weight": -0.1}, "weight must not be negative"),
        ({"start_step": -1}, "start_step must not be negative"),
        ({"lecam_decay": 1.5}, "lecam_decay must be from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(**change)


def test_the_generator_does_not_learn_the_adversary():
    assert kind_class("vq_gan") is VqGan
    objective = random_objective(VqGan(bottleneck=Vq(codebook_size=32), adversary=SMALL), BACKBONE, seed=0)
    learned = {id(weight) for weight in objective.model.parameters()}
    judges = {id(weight) for weight in objective.adversary.parameters()}
    assert judges
    assert not learned & judges
    assert not any("discriminator" in name for name in objective.model.state_dict())
    terms = objective.train()(next(squares_pixels()))
    terms.loss.backward()
    assert all(weight.grad is None for weight in objective.adversary.parameters())
    assert {"l1", "commitment", "generator", "adaptive_weight"} <= terms.values.keys()


def test_the_generators_term_is_part_of_the_loss():
    pixels, terms = next(squares_pixels()), []
    for start_step in (0, 1):
        kind = VqGan(bottleneck=Kl(), adversary=settings(start_step=start_step, weight=0.3))
        objective = random_objective(kind, BACKBONE, seed=0)
        terms.append(objective(pixels, step=0, generator=torch.Generator().manual_seed(0)))
    added = 0.3 * terms[0].values["adaptive_weight"] * terms[0].values["generator"]
    assert added.abs() > 1e-4
    assert terms[0].loss.item() == pytest.approx((terms[1].loss + added).item())


def test_an_objective_can_be_evaluated_without_gradients():
    objective = random_objective(VqGan(bottleneck=Kl(), adversary=SMALL), BACKBONE, seed=0).eval()
    with torch.no_grad():
        terms = objective(next(squares_pixels()))
    assert terms.values["adaptive_weight"] == 1
    assert not terms.loss.requires_grad


@pytest.mark.parametrize(
    ("bottleneck", "dimensions", "loss"),
    [(Vq(codebook_size=32), "3d", "hinge"), (Kl(), "2d", "non_saturating")],
    ids=["vq-3d-hinge", "kl-2d-non-saturating"],
)
def test_training_with_an_adversary(bottleneck, dimensions, loss):
    kind = VqGan(bottleneck=bottleneck, adversary=settings(discriminator=dimensions, loss=loss, start_step=20))
    objective = random_objective(kind, BACKBONE, seed=0)
    start = [weight.clone() for weight in objective.adversary.parameters()]
    trainer, batches = Trainer(objective, QUICK), squares_pixels()
    losses = [trainer.train_step(next(batches)) for _ in range(20)]
    assert not any({"discriminator", "generator"} & step.keys() for step in losses)
    assert all(torch.equal(*pair) for pair in zip(start, objective.adversary.parameters(), strict=True))
    losses += [trainer.train_step(next(batches)) for _ in range(50)]
    assert all(math.isfinite(value) for step in losses for value in step.values())
    assert all({"discriminator", "generator", "lecam"} <= step.keys() for step in losses[20:])
    assert not any(torch.equal(*pair) for pair in zip(start, objective.adversary.parameters(), strict=True))
    assert len({step["discriminator"] for step in losses[20:]}) == 50
    assert sum(step["l1"] for step in losses[-10:]) < 0.85 * sum(step["l1"] for step in losses[:10])  # 0.73, 0.62


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_a_discriminator_learns_to_tell_blurred_clips(dimensions, loss):
    judge = adversary(discriminator=dimensions, loss=loss)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, betas=(0.5, 0.9))
    batches, losses = squares_pixels(), []
    for _ in range(250):
        pixels = next(batches)
        terms = judge.discriminator_terms(pixels, nn.functional.avg_pool3d(pixels, (1, 3, 3), 1, (0, 1, 1)), step=0)
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        losses.append(terms.loss.item())
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    assert terms.values["real_logit"] > terms.values["fake_logit"]


def test_with_a_frozen_encoder_stored_latents_stay_valid():
    objective = random_objective(VqGan(bottleneck=Vq(codebook_size=32), adversary=SMALL), BACKBONE, seed=0)
    objective.train()(next(squares_pixels()))  # places the codes
    pixels = next(squares_pixels(seed=5))
    model = objective.model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latent = model.encode(pixels).mean
    trainer, batches = Trainer(objective, TrainSettings(freeze_encoder=True)), squares_pixels()
    losses = [trainer.train_step(next(batches)) for _ in range(3)]
    assert all("discriminator" in step for step in losses)
    for learned in (trainer.model, trainer.average):
        changed = {name for name, value in learned.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.split(".")[0] for name in changed} == {"decoder"}
        assert torch.equal(learned.encode(pixels).mean, latent)
