"""The one way in which clips reach an autoencoder: checked, in canonical chunks, uint8 over the bus.

In:   a Backend (an autoencoder that takes chunks, its state passed in and out) and its EncoderCard.
Out:  ChunkedEncoder, a VideoEncoder (models.spec).
Cost: one chunk's activations, a backend's state, and the latent; no growth with T but the latent's own.
Errors: GeometryError before the model is called, for clips, chunks and latents that are off the grid.

Canonical chunking: the leading frame alone, then chunks of `chunk_frames`, the last one filled up by repeating the
clip's last frame; what the filling made is cut off. A chunk's arithmetic then never depends on how long the clip is:
with one batch size, thread count and device, a clip's first latent frames are bit for bit those of any longer clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from models.pixels import to_frames, to_pixels
from models.spec import EncoderCard, Geometry, GeometryError, Posterior

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MIN_DEFAULT_CHUNK_FRAMES = 8


class Backend(Protocol):
    """A causal autoencoder on its device, in its compute dtype. Its state may be anything; None starts a clip."""

    def encode_chunk(self, pixels: Tensor, state: Any) -> tuple[Posterior, Any]:
        """Encode the next frames, B 3 T H W: the leading one first, then multiples of the temporal stride."""
        ...

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode B C t h w; yields pixels B 3 T H W, in pieces, in order."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        ...


def default_chunk_frames(geometry: Geometry) -> int:
    """The smallest multiple of the temporal stride that is at least 8: clips of 9, 17 or 33 frames need no filling."""
    return -(-MIN_DEFAULT_CHUNK_FRAMES // geometry.temporal_stride) * geometry.temporal_stride


class ChunkedEncoder:
    """A VideoEncoder over a Backend. As thread-safe as its backend."""

    def __init__(self, card: EncoderCard, backend: Backend, device: str, compute_dtype: torch.dtype) -> None:
        self._card = card
        self._backend = backend
        self._device = torch.device(device)
        self._dtype = compute_dtype
        backend.to(self._device, compute_dtype)

    @property
    def card(self) -> EncoderCard:
        return self._card

    def encode(self, frames_BTHWC: Tensor, chunk_frames: int | None = None) -> Posterior:
        geometry = self._card.geometry
        if frames_BTHWC.ndim != 5:
            raise GeometryError(f"frames are uint8 B T H W 3, got {tuple(frames_BTHWC.shape)}")
        _, latent_frames, _, _ = geometry.latent_shape(*frames_BTHWC.shape[1:4])
        chunk_frames = default_chunk_frames(geometry) if chunk_frames is None else chunk_frames
        if chunk_frames < 1 or chunk_frames % geometry.temporal_stride:
            raise GeometryError(f"chunk_frames {chunk_frames} is not a multiple of {geometry.temporal_stride}")
        state, posteriors = None, []
        with torch.inference_mode():
            for chunk in canonical_chunks(frames_BTHWC, chunk_frames):
                pixels = to_pixels(chunk, self._device, self._dtype, self._card.pixel_range)
                posterior, state = self._backend.encode_chunk(pixels, state)
                posteriors.append(posterior)
            mean = torch.cat([posterior.mean for posterior in posteriors], dim=2)
            logvars = [posterior.logvar for posterior in posteriors if posterior.logvar is not None]
            logvar = torch.cat(logvars, dim=2)[:, :, :latent_frames].float().cpu() if logvars else None
            return Posterior(mean[:, :, :latent_frames].float().cpu(), logvar)

    def decode(self, latents: Tensor) -> Tensor:
        channels = self._card.geometry.channels
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.numel():
            raise GeometryError(f"latents are B {channels} t h w, got {tuple(latents.shape)}")
        with torch.inference_mode():
            pieces = self._backend.decode(latents.to(self._device, self._dtype))
            return torch.cat([to_frames(piece, self._card.pixel_range) for piece in pieces], dim=1)


def canonical_chunks(frames_BTHWC: Tensor, chunk_frames: int) -> Iterator[Tensor]:
    """The leading frame, then chunks of exactly `chunk_frames`, the last filled up with the clip's last frame."""
    yield frames_BTHWC[:, :1]
    for start in range(1, frames_BTHWC.shape[1], chunk_frames):
        chunk = frames_BTHWC[:, start : start + chunk_frames]
        missing = chunk_frames - chunk.shape[1]
        if missing:
            chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        yield chunk
