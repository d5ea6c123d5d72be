"""The cost that is worked out from a config is the cost of the model that is built from it."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import CausalAutoencoder
from models.config import PRESETS, ModelConfig, preset
from models.cost import kmacs_per_pixel, macs, parameters
from models.spec import GeometryError
from tests.narrow import BACKBONES

CONFIGS = {**BACKBONES, **{name: PRESETS[name] for name in PRESETS if name.startswith("tiny")}}


def on_meta(config):
    with torch.device("meta"):
        return CausalAutoencoder(ModelConfig(config))


@pytest.mark.parametrize("name", sorted({**BACKBONES, **PRESETS}))
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_parameters_are_those_of_the_model(name, half):
    config = {**BACKBONES, **PRESETS}[name]
    module = getattr(on_meta(config), half)
    assert parameters(config, half) == sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("latent_frames", [1, 3])
def test_macs_are_what_torch_counts(name, half, latent_frames):
    config = CONFIGS[name]
    geometry = config.geometry
    shape = (
        1 + geometry.temporal_stride * (latent_frames - 1),
        2 * geometry.spatial_stride,
        3 * geometry.spatial_stride,
    )
    model = on_meta(config)
    given = torch.empty(1, 3, *shape, device="meta")
    if half == "decoder":
        given = torch.empty(1, *geometry.latent_shape(*shape), device="meta")
    with FlopCounterMode(display=False) as counter:
        getattr(model, half)(given, None)
    assert 2 * macs(config, half, shape) == counter.get_total_flops()


def test_a_bottleneck_of_fewer_features_costs_less():
    config = preset("tiny-4x8x8x16")
    width = config.encoder.channels[-1]
    assert parameters(config, "encoder") - parameters(config, "encoder", features=16) == 16 * (27 * width + 1)
    assert parameters(config, "decoder") == parameters(config, "decoder", features=16)
    assert macs(config, "encoder", (1, 8, 8)) - macs(config, "encoder", (1, 8, 8), features=16) == 16 * 27 * width


def test_the_cost_per_pixel_is_that_of_long_clips():
    config = preset("tiny-4x8x8x16")
    frames, side = 1 + 4 * 1000, 64
    per_pixel = macs(config, "decoder", (frames, side, side)) / (frames * side * side) / 1000
    assert kmacs_per_pixel(config, "decoder") == pytest.approx(per_pixel, rel=1e-3)
    assert kmacs_per_pixel(config, "decoder", 64, 32) == kmacs_per_pixel(config, "decoder")
    attending = dataclasses.replace(config, attention=True)
    assert kmacs_per_pixel(attending, "decoder", 512, 512) > kmacs_per_pixel(attending, "decoder", 64, 64)
    with pytest.raises(GeometryError, match="height 60"):
        macs(config, "encoder", (5, 60, 64))


def test_the_decoder_of_a_base_preset_is_the_larger_half():
    for name, config in PRESETS.items():
        if not name.startswith("tiny"):
            assert parameters(config, "decoder") > 1.5 * parameters(config, "encoder")
            assert kmacs_per_pixel(config, "decoder") > 1.5 * kmacs_per_pixel(config, "encoder")
