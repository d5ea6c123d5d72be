"""Our own autoencoder as an encoder of the pipeline.

In:   a checkpoint directory (models.checkpoint).
Out:  its EncoderCard, from config and hashes alone; or a StreamingBackend.
Cost: the card reads the weights once to hash them; the backend loads them.
Errors: CheckpointError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.bottlenecks.config import Kl
from models.checkpoint import KIND, ModelDocument, check_weights, load_checkpoint, read_document
from models.spec import EncoderCard, Posterior

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from models.autoencoder import CausalAutoencoder
    from models.causal import State


class NativeBackend:
    """A CausalAutoencoder. Keeps nothing between calls: any number of threads may share it."""

    one_at_a_time = False

    def __init__(self, model: CausalAutoencoder) -> None:
        self.model = model

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        return self.model.encode_chunk(pixels, state or {})

    def decode_chunk(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        return self.model.decode_chunk(latents, state or {})

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.move(device, dtype)


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
    config = document.config
    geometry = config.geometry
    strides = f"{geometry.temporal_stride}x{geometry.spatial_stride}x{geometry.spatial_stride}"
    return EncoderCard(
        name=f"{config.kind}-{strides}x{geometry.channels}",
        kind=KIND,
        geometry=geometry,
        normaliser=document.normaliser,
        fingerprint=document.fingerprint,
        posterior=isinstance(config.bottleneck, Kl),
    )
