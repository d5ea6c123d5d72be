"""Gradient checkpointing changes what is kept between the two passes, and nothing else."""

import copy

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.blocks import BlockStack, Downsample, FrameAttention, ResidualBlock, Upsample
from models.bottlenecks.config import Kl
from models.build import build_model
from models.config import BackboneConfig, ModelConfig, Pyramid, TopLevel
from models.kinds.kind import Objective
from models.kinds.registry import KINDS
from models.train_settings import TrainSettings
from models.trainer import Trainer
from tests.narrow import BACKBONES

DEEP = BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 3), Pyramid((8, 16), 3), 4, attention=True)
NARROW_TOP = BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 1), Pyramid((8, 16), 1), 4)
CONFIGS = {
    **{name: ModelConfig(backbone) for name, backbone in BACKBONES.items() if name != "causal-8x32x32"},
    "two levels": ModelConfig(NARROW_TOP, Kl(), "vq_vae_2", TopLevel(((2, 2),), (16,), 1, 6)),
}


def training_model(config: ModelConfig) -> CausalAutoencoder:
    torch.manual_seed(0)
    return draw_zeros(build_model(config).train())


def draw_zeros(model: CausalAutoencoder) -> CausalAutoencoder:
    """Layers that start at zero would stop the gradient of those before them."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def pixels(model: CausalAutoencoder, size: int = 16) -> torch.Tensor:
    frames = 1 + model.config.geometry.temporal_stride
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(objective: Objective, *, enabled: bool) -> dict:
    """Of a pass with noise, of the bottleneck's own generator and the global one alike; with what the pass gave."""
    objective = copy.deepcopy(objective)
    objective.model.gradient_checkpointing = enabled
    torch.manual_seed(5)
    terms = objective(pixels(objective.model), step=10**6, generator=torch.Generator().manual_seed(6))
    terms.loss.backward()
    found = {name: weight.grad for name, weight in objective.model.named_parameters() if weight.grad is not None}
    buffers = {f"buffer {name}": value for name, value in objective.model.named_buffers()}
    return {**found, **buffers, "loss": terms.loss.detach(), "next random number": torch.rand(())}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_bit_equal(name: str) -> None:
    objective = KINDS["vae"]().objective(training_model(CONFIGS[name]))
    expected = gradients(objective, enabled=False)
    assert any(value.any() for value in expected.values())
    assert_equal(gradients(objective, enabled=True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_the_same(kind: str) -> None:
    settings = KINDS[kind]()
    torch.manual_seed(0)
    model = draw_zeros(build_model(settings.model_config(NARROW_TOP)).train())
    objective = settings.objective(model)
    assert_equal(gradients(objective, enabled=True), gradients(objective, enabled=False))


@pytest.mark.parametrize("name", ["causal-attention", "chunk_causal", "two levels"])
def test_a_trainer_learns_the_same_in_bfloat16(name: str) -> None:
    states = []
    for enabled in (False, True):
        model = training_model(CONFIGS[name])
        model.gradient_checkpointing = enabled
        trainer = Trainer(KINDS["vae"]().objective(model), TrainSettings(precision="bfloat16", micro_batches=2))
        losses = [trainer.train_step(pixels(model)) for _ in range(2)]
        states.append({**trainer.state_dict(), "loss": torch.tensor([step["loss"] for step in losses])})
    assert_equal(states[1], states[0])


def kept_bytes(model: CausalAutoencoder) -> int:
    """Of the distinct tensors, weights aside, that wait for the backward pass: autograd's, and inputs of blocks.

    A checkpointed block's input is held by what computes the block again, where autograd's hooks do not see it.
    """
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def keep_input(_block: torch.nn.Module, inputs: tuple) -> None:
        keep(inputs[0])

    blocks = [block for stack in model.modules() if isinstance(stack, BlockStack) for block in stack]
    hooks = [block.register_forward_pre_hook(keep_input) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(pixels(model, size=32))
    for hook in hooks:
        hook.remove()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert output.pixels.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize(("config", "share"), [(ModelConfig(DEEP), 0.2), (CONFIGS["two levels"], 0.35)])
def test_less_is_kept_between_the_passes(config: ModelConfig, share: float) -> None:
    model = training_model(config)
    everything = kept_bytes(model)
    model.gradient_checkpointing = True
    assert kept_bytes(model) < share * everything
    model.gradient_checkpointing = False
    assert kept_bytes(model) == everything


def count_block_passes(model: CausalAutoencoder) -> list[str]:
    passes: list[str] = []
    for module in model.modules():
        if isinstance(module, ResidualBlock | Downsample | Upsample | FrameAttention):
            module.register_forward_pre_hook(lambda module, _: passes.append(type(module).__name__))
    return passes


def test_every_block_is_computed_again_in_training_and_once_otherwise() -> None:
    model = training_model(CONFIGS["two levels"])
    model.gradient_checkpointing = True
    passes = count_block_passes(model)
    num_blocks = sum(len(stack) for stack in model.modules() if isinstance(stack, BlockStack))
    model(pixels(model)).pixels.sum().backward()
    assert len(passes) == 2 * num_blocks
    passes.clear()
    model.eval()
    model(pixels(model)).pixels.sum().backward()
    assert len(passes) == num_blocks
    passes.clear()
    model.train()
    with torch.no_grad():
        model(pixels(model))
    assert len(passes) == num_blocks


def test_a_stream_is_encoded_the_same_in_training_mode() -> None:
    model = training_model(CONFIGS["causal"])
    clip = pixels(model)
    _, state = model.encode_chunk(clip, {})
    state = {name: frames.detach() for name, frames in state.items()}
    expected, _ = model.encode_chunk(clip[:, :, 1:], state)
    model.gradient_checkpointing = True
    actual, _ = model.encode_chunk(clip[:, :, 1:], state)
    (gradient,) = torch.autograd.grad(actual.mean.sum(), model.encoder.conv_in.conv.weight)
    (wanted,) = torch.autograd.grad(expected.mean.sum(), model.encoder.conv_in.conv.weight)
    assert torch.equal(actual.mean, expected.mean)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("name", ["causal", "two levels"])
def test_the_switch_is_no_part_of_the_model(name: str) -> None:
    model = training_model(CONFIGS[name])
    assert not model.gradient_checkpointing
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.as_json()
    model.gradient_checkpointing = True
    assert model.gradient_checkpointing
    assert copy.deepcopy(model).gradient_checkpointing
    assert model.config.as_json() == config
    assert_equal(model.state_dict(), plain)
    assert not build_model(model.config).gradient_checkpointing
