"""Our own autoencoder as an encoder of the pipeline.

In:   a checkpoint directory (models.checkpoint).
Out:  its EncoderCard, from config and hashes alone; or a Backend.
Cost: the card reads the weights once to hash them; the backend loads them.
Errors: CheckpointError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.checkpoint import KIND, ModelDocument, check_weights, load_checkpoint, read_document
from models.spec import EncoderCard, Posterior

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from models.causal import State
    from models.vae import CausalVae

DECODE_LATENT_FRAMES = 2


class NativeBackend:
    """A CausalVae. Keeps nothing between calls: any number of threads may share it."""

    def __init__(self, model: CausalVae) -> None:
        self.model = model

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        return self.model.encode_chunk(pixels, state or {})

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        stream = self.model.decode_stream()
        for start in range(0, latents.shape[2], DECODE_LATENT_FRAMES):
            yield stream.push(latents[:, :, start : start + DECODE_LATENT_FRAMES])

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device, dtype)


def describe_native(directory: Path) -> EncoderCard:
    """The card of a checkpoint of ours; every byte is checked."""
    document = read_document(directory)
    check_weights(directory, document)
    return _card(document)


def load_native(directory: Path) -> tuple[EncoderCard, NativeBackend]:
    """The card and the loaded model, on the CPU in float32."""
    model, document = load_checkpoint(directory)
    return _card(document), NativeBackend(model)


def _card(document: ModelDocument) -> EncoderCard:
    geometry = document.config.geometry
    strides = f"{geometry.temporal_stride}x{geometry.spatial_stride}x{geometry.spatial_stride}"
    return EncoderCard(
        name=f"{KIND}-{strides}x{geometry.channels}",
        kind=KIND,
        geometry=geometry,
        normaliser=document.normaliser,
        fingerprint=document.fingerprint,
        posterior=True,
    )
