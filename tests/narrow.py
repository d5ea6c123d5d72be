"""Narrow models in every temporal mode, with weights that make every layer count; clips for them.

In:   a mode, with or without attention.
Out:  CausalAutoencoders, encoders over them, random clips, distances in standard deviations.
Cost: milliseconds.
Errors: none.
"""

from __future__ import annotations

import dataclasses

import torch

from models.autoencoder import CausalAutoencoder
from models.config import BackboneConfig, ModelConfig, Pyramid
from models.native import NativeBackend
from models.spec import EncoderCard, Normaliser
from models.streamed import ChunkedEncoder

NARROW = BackboneConfig(2, ((2, 2), (2, 2)), Pyramid((8, 16, 16), 1), Pyramid((8, 16, 32), 1), 4)
NARROW_FRAME = dataclasses.replace(
    NARROW, downs=((1, 2), (1, 2)), decoder=Pyramid((8, 16, 16), 1), temporal_mode="frame"
)
NARROW_8X32X32 = BackboneConfig(4, ((2, 2),) * 3, Pyramid((8, 16, 16, 16), 1), Pyramid((8, 16, 16, 16), 1), 8)
BACKBONES = {
    "causal": NARROW,
    "causal-8x32x32": NARROW_8X32X32,
    "causal-attention": dataclasses.replace(NARROW, attention=True),
    "chunk_causal": dataclasses.replace(NARROW, temporal_mode="chunk_causal"),
    "chunk_causal-attention": dataclasses.replace(NARROW, temporal_mode="chunk_causal", attention=True),
    "frame": NARROW_FRAME,
    "frame-attention": dataclasses.replace(NARROW_FRAME, attention=True),
}


def random_model(config: BackboneConfig) -> CausalAutoencoder:
    """Layers that start at zero would hide a fault in those before them, so that all are drawn at random."""
    torch.manual_seed(0)
    model = CausalAutoencoder(ModelConfig(config)).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def native_encoder(model: CausalAutoencoder) -> ChunkedEncoder:
    geometry = model.config.geometry
    normaliser = Normaliser((0.0,) * geometry.channels, (1.0,) * geometry.channels)
    card = EncoderCard("narrow", "narrow", geometry, normaliser, "0" * 64, posterior=True)
    return ChunkedEncoder(card, NativeBackend(model), "cpu", torch.float32)


def random_pixels(model: CausalAutoencoder, latent_frames: int, batch: int = 1) -> torch.Tensor:
    """A clip, float B 3 T H W, whose latent is latent_frames x 1 x 2."""
    stride, size = model.config.geometry.temporal_stride, model.config.geometry.spatial_stride
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, 1 + stride * (latent_frames - 1), size, 2 * size)
    return torch.rand(shape, generator=generator) * 2 - 1


def random_frames(num_frames: int, batch: int = 1, height: int = 8, width: int = 16) -> torch.Tensor:
    """uint8 B T H W 3; a shorter clip is the beginning of a longer one."""
    generator = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (num_frames, batch, height, width, 3), generator=generator, dtype=torch.uint8)
    return frames.transpose(0, 1).contiguous()


def difference_std(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square difference in standard deviations of what was expected."""
    assert actual.shape == expected.shape
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()
