"""What reaches the convolutions' kernels: small inputs, which torch would leave to a slow one, and their layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.causal import CausalConv3d, FrameConv3d, GroupedConv3d, TemporalConv3d
from models.config import ModelConfig, preset

LAYERS = [CausalConv3d(16, 24), FrameConv3d(16, 24), GroupedConv3d(16, 24, 2)]


def clip(side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, 5, side, side, generator=generator).contiguous(memory_format=torch.channels_last_3d)


@pytest.fixture(params=LAYERS, ids=lambda layer: type(layer).__name__)
def layer(request: pytest.FixtureRequest) -> TemporalConv3d:
    chosen: TemporalConv3d = request.param
    torch.manual_seed(0)
    torch.nn.init.normal_(chosen.conv.weight, std=0.05)
    return chosen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_small_clip_by_itself_gets_the_bits_that_it_has_in_a_batch(layer: TemporalConv3d) -> None:
    x = clip(16)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        alone = layer(x, None)
    kernels = {event.name for event in profile.events() or ()}
    assert "aten::slow_conv3d_forward" not in kernels
    assert "aten::mkldnn_convolution" in kernels
    with torch.no_grad():
        together = layer(torch.cat([x, clip(16, seed=1)]).contiguous(memory_format=torch.channels_last_3d), None)
    assert torch.equal(alone, together[:1])


@pytest.mark.parametrize("side", [4, 16, 300])  # 300: not small
def test_it_is_the_convolution_that_torch_computes(layer: TemporalConv3d, side: int) -> None:
    x = torch.randn(1, 16, layer.conv.kernel_size[0], side, side, requires_grad=True)
    expected = torch.nn.functional.conv3d(
        x.double(),
        layer.conv.weight.double(),
        layer.conv.bias.double(),
        padding=layer.conv.padding,  # type: ignore[union-attr,arg-type]
    )
    output = layer.convolve(x)
    assert torch.allclose(output.double(), expected, atol=1e-4)
    inputs = (x, layer.conv.weight)
    for one, other in zip(
        torch.autograd.grad(output.square().mean(), inputs),
        torch.autograd.grad(expected.square().mean(), inputs),
        strict=True,
    ):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_no_convolution_of_a_preset_has_to_transpose_its_input() -> None:
    model = CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"))).eval().requires_grad_(False)
    transposed, num_calls = [], 0

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
        def look(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            nonlocal num_calls
            num_calls += 1
            if not inputs[0].is_contiguous(memory_format=torch.channels_last_3d):
                transposed.append((name, tuple(inputs[0].shape)))

        return look

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Conv3d)]
    for name, conv in convolutions:
        conv.register_forward_pre_hook(watch(name))
    pixels = torch.rand(2, 3, 9, 32, 32)
    _, state = model.encode_chunk(pixels[:, :, :1], {})
    model.encode_chunk(pixels[:, :, 1:], state)
    latent = model.encode(pixels).mean
    _, state = model.decode_chunk(latent[:, :, :1], {})
    model.decode_chunk(latent[:, :, 1:], state)
    assert transposed == []
    assert num_calls == 5 * len(convolutions) / 2
