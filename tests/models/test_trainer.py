"""The trainer step by step: resuming, averages, schedule, precision, parts of batches, frozen encoders, adversaries."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from models.adversary import AdversarySettings
from models.blocks import ChannelRMSNorm
from models.bottlenecks.config import Kl, Vq
from models.kinds.ae import Ae
from models.kinds.dvae import Dvae
from models.kinds.kind import Adversary, DiscriminatorTerms
from models.kinds.vae import Vae
from models.kinds.vq_gan import VqGan
from models.kinds.vq_vae import VqVae
from models.losses import ReconstructionWeights
from models.train_settings import TrainSettings
from models.trainer import Trainer
from models.training import random_objective
from tests.backbones import NARROW
from tests.moving_shapes import shapes_pixels

SETTINGS = TrainSettings(learning_rate=2e-3, warmup_steps=2)
SMALL = Vq(codebook_size=32)
GAN = VqGan(bottleneck=SMALL, adversary=AdversarySettings(channels=8, depth=1, start_step=2))


def make(kind, seed=0, **changes):
    return Trainer(random_objective(kind, NARROW, seed), dataclasses.replace(SETTINGS, **changes), seed=seed)


def steps(trainer, first, last):
    return [trainer.train_step(shapes_pixels(seed, side=16), seed / 8) for seed in range(first, last)]


def state_differences(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


class TestResume:
    @pytest.mark.parametrize("kind", [Vae(), VqVae(bottleneck=SMALL), GAN, Dvae()], ids=lambda kind: kind.name)
    def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(self, kind):
        undisturbed = make(kind)
        steps(undisturbed, 0, 4)
        file = save(undisturbed.state_dict())
        losses = steps(undisturbed, 4, 7)
        resumed = make(kind, seed=1)  # other weights, other noise
        steps(resumed, 0, 1)
        resumed.load_state_dict(load(file))
        assert resumed.step == 4
        assert steps(resumed, 4, 7) == losses
        assert state_differences(resumed, undisturbed) == []

    def test_the_state_is_a_copy(self):
        trainer = make(Ae())
        steps(trainer, 0, 1)
        state = trainer.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        steps(trainer, 1, 2)
        assert all(torch.equal(state[name], before[name]) for name in state)
        changed = set(state_differences(trainer, _Frozen(state)))
        assert {"step", "optimiser.decoder.conv_in.conv.weight.exp_avg", "model.decoder.conv_in.conv.weight"} <= changed

    def test_another_models_state_is_refused_by_name(self):
        ae, vae = make(Ae()), make(Vae())
        steps(vae, 0, 1)
        with pytest.raises(ValueError, match=r"of another model: it differs at average\.encoder\.conv_out\.conv\.bias"):
            ae.load_state_dict(vae.state_dict())
        gan = make(GAN)
        with pytest.raises(ValueError, match=r"adversary\."):
            gan.load_state_dict(make(VqVae(bottleneck=SMALL)).state_dict())
        state = {**ae.state_dict(), "optimiser.nose.exp_avg": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"optimiser's nose\.exp_avg"):
            ae.load_state_dict(state)


class _Frozen:
    def __init__(self, state):
        self._state = state

    def state_dict(self):
        return self._state


class TestAverage:
    def test_is_of_weights(self):
        trainer = make(VqVae(bottleneck=SMALL), ema_decay=0.5)
        before = {name: value.clone() for name, value in trainer.average.state_dict().items()}
        for step in (1, 2):
            steps(trainer, step, step + 1)
            decay = min(0.5, (1 + step) / (10 + step))
            for name, value in trainer.model.named_parameters():
                before[name] = decay * before[name] + (1 - decay) * value
        for name, value in trainer.average.named_parameters():
            torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6, msg=name)
        assert not trainer.average.training

    def test_a_codebook_is_the_one_that_learns(self):
        """It is an average already; one more would leave a revived code between two places."""
        trainer = make(VqVae(bottleneck=Vq(codebook_size=32, revive_below=0.5)), ema_decay=0.9)
        steps(trainer, 0, 6)
        live, kept = (dict(model.named_buffers()) for model in (trainer.model, trainer.average))
        assert {name.rpartition(".")[2] for name in live} >= {"weight", "sums", "counts", "frequencies"}
        for name, value in live.items():
            assert torch.equal(kept[name], value), name
        book = trainer.average.bottleneck.codebook
        chosen = book.counts > 1e-3
        torch.testing.assert_close((book.sums / book.counts.unsqueeze(1))[chosen], book.weight[chosen])

    def test_a_long_average_is_better_than_the_last_weights_at_a_high_rate(self):
        trainer = make(Ae(), learning_rate=1e-2, ema_decay=0.9)
        for seed in range(40):
            trainer.train_step(shapes_pixels(seed, side=16))
        pixels = shapes_pixels(1000, batch=16, side=16)
        with torch.inference_mode():
            errors = [
                (model.decode(model.encode(pixels).mean) - pixels).abs().mean()
                for model in (trainer.average, trainer.model)
            ]
        assert errors[0] < errors[1]


class TestSchedule:
    @pytest.mark.parametrize(
        ("warmup_steps", "done", "share"), [(0, 0.0, 1.0), (3, 0.0, 0.25), (0, 0.5, 0.55), (0, 1.0, 0.1)]
    )
    def test_the_first_step_is_as_long_as_the_rate_says(self, warmup_steps, done, share):
        """Adam's first step moves every weight that has a clear gradient by the learning rate."""
        trainer = make(Ae(), warmup_steps=warmup_steps, weight_decay=0.0, final_learning_rate_ratio=0.1)
        weight = trainer.model.decoder.conv_out.conv.weight
        before = weight.detach().clone()
        trainer.train_step(shapes_pixels(side=16), done)
        assert (weight - before).abs().max().item() == pytest.approx(share * 2e-3, rel=1e-2)

    def test_gradients_are_clipped(self):
        """Beyond the bound a loss ten times as large has the same gradient."""
        states = []
        for weight in (10.0, 100.0):
            trainer = make(Ae(weights=ReconstructionWeights(l1=weight, haar=0.0)), clip_norm=1e-3)
            steps(trainer, 0, 2)
            states.append(trainer.model.state_dict()["decoder.conv_in.conv.weight"])
            moments = [value for name, value in trainer.state_dict().items() if name.endswith("exp_avg")]
            assert torch.cat([value.flatten() for value in moments]).norm() < 1e-3
        torch.testing.assert_close(*states)


class TestPrecision:
    def test_bfloat16_is_for_convolutions_and_not_for_norms_codes_or_weights(self):
        trainer = make(VqVae(bottleneck=Vq(codebook_size=32, commitment=1.0)), precision="bfloat16")
        seen = {}
        for name, module in trainer.model.named_modules():
            if isinstance(module, nn.Conv3d | ChannelRMSNorm):
                module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
        assert any("norm" in name for name, module in trainer.model.named_modules())
        losses = steps(trainer, 0, 8)
        convolutions = {output.dtype for name, output in seen.items() if name.endswith("conv")}
        norms = {output.dtype for name, output in seen.items() if "norm" in name}
        assert (convolutions, norms) == ({torch.bfloat16}, {torch.float32})
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
        assert {value.dtype for name, value in trainer.model.named_buffers()} <= {
            torch.float32,
            torch.int64,
            torch.bool,
        }
        assert losses[-1]["loss"] < losses[0]["loss"]
        reference = steps(make(VqVae(bottleneck=Vq(codebook_size=32, commitment=1.0))), 0, 1)[0]
        assert losses[0]["l1"] == pytest.approx(reference["l1"], rel=0.02)


class TestMicroBatches:
    def test_parts_of_a_batch_give_the_step_of_the_whole(self):
        whole, parts = (make(Ae(), clip_norm=1e6, micro_batches=count) for count in (1, 4))
        pixels = shapes_pixels(batch=4, side=16)
        losses = [trainer.train_step(pixels) for trainer in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        names = [name for name in whole.state_dict() if name.endswith("exp_avg")]
        assert names
        for name in names:
            torch.testing.assert_close(whole.state_dict()[name], parts.state_dict()[name], rtol=1e-3, atol=1e-6)

    def test_parts_must_be_equal(self):
        with pytest.raises(ValueError, match="a batch of 4 clips has no 3 equal parts"):
            make(Ae(), micro_batches=3).train_step(shapes_pixels(batch=4, side=16))


class TestFrozenEncoder:
    @pytest.mark.parametrize("kind", [Vae(bottleneck=Kl(beta=1.0)), GAN], ids=lambda kind: kind.name)
    def test_latents_stay_valid_while_the_decoder_learns(self, kind):
        taught = make(kind)
        steps(taught, 0, 3)
        trainer = make(kind, freeze_encoder=True)
        trainer.model.load_state_dict(taught.model.state_dict())
        trainer.average.load_state_dict(taught.model.state_dict())
        pixels = shapes_pixels(1000)
        latent = taught.model.encode(pixels).mean
        decoded = taught.model.decode(latent)
        steps(trainer, 0, 4)
        for model in (trainer.model, trainer.average):
            assert torch.equal(model.encode(pixels).mean, latent)
            assert not torch.equal(model.decode(latent), decoded)
        changed = {
            name.split(".")[0]
            for name, value in trainer.model.state_dict().items()
            if not torch.equal(value, taught.model.state_dict()[name])
        }
        assert changed == {"decoder"}
        assert all(
            name.startswith("optimiser.decoder.") for name in trainer.state_dict() if name.startswith("optimiser.")
        )


class CountingAdversary(Adversary):
    """Judges by one weight, from step 2 on, and remembers how it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.calls = []
        self.trainable = []

    def discriminator_terms(self, pixels, reconstruction, step):
        self.calls.append((step, pixels.shape, reconstruction.shape, reconstruction.requires_grad))
        self.trainable.append(self.weight.requires_grad)
        if step < 2:
            return None
        loss = self.weight * (1 + (pixels - reconstruction).abs().mean())
        return DiscriminatorTerms(loss, {"judgement": self.weight.detach().clone()})


class TestAdversary:
    @pytest.fixture
    def wrapped(self):
        return []

    @pytest.fixture
    def trainer(self, wrapped):
        objective = random_objective(Ae(), NARROW, seed=0)
        objective.adversary = CountingAdversary()
        penalty = objective.penalty

        def deceive(pixels, output, generator):
            _, values = penalty(pixels, output, generator)
            assert not objective.adversary.weight.requires_grad
            return objective.adversary.weight * output.pixels.mean(), values

        objective.penalty = deceive
        return Trainer(
            objective,
            dataclasses.replace(SETTINGS, micro_batches=2),
            wrap=lambda module: wrapped.append(module) or module,
        )

    def test_learns_after_the_autoencoder_from_its_start_on(self, trainer):
        losses = steps(trainer, 0, 4)
        adversary = trainer.adversary
        part = torch.Size((2, 3, 5, 16, 16))
        assert adversary.calls == [(step, part, part, False) for step in (0, 0, 1, 1, 2, 2, 3, 3)]
        assert all(adversary.trainable)
        assert adversary.weight.grad is None
        assert [set(loss) - {"loss", "l1", "haar"} for loss in losses] == [
            set(),
            set(),
            *2 * [{"discriminator", "judgement"}],
        ]
        assert losses[2]["judgement"] == 1.0 > losses[3]["judgement"]

    def test_an_objective_can_be_trained_again(self):
        objective = random_objective(GAN, NARROW, seed=0)
        for _ in range(2):
            losses = steps(Trainer(objective, SETTINGS), 0, 4)
            assert "discriminator" in losses[-1]

    def test_both_passes_are_wrapped(self, trainer, wrapped):
        ran = []
        for module in wrapped:
            module.register_forward_hook(lambda module, inputs, output: ran.append(module))
        steps(trainer, 0, 1)
        adversarial, objective = wrapped
        assert objective.model is trainer.model
        assert ran == [objective, objective, adversarial, adversarial]
        assert {id(weight) for weight in adversarial.parameters()} == {id(trainer.adversary.weight)}

    def test_a_loss_that_is_not_finite_is_named(self, trainer):
        trainer.adversary.weight.data.fill_(float("nan"))
        trainer.step = 2
        with pytest.raises(ValueError, match=r"not finite.*lower learning_rate \(0.002\)"):
            steps(trainer, 2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batches": 0}, "micro_batches must be positive"),
        ({"precision": "float16"}, "not one of float32, bfloat16"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"ema_decay": 1.5}, "from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**fields)
