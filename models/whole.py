"""A VideoEncoder for autoencoders that cannot take a clip in chunks: each clip is encoded and decoded whole.

In:   a WholeBackend and its EncoderCard.
Out:  WholeEncoder, a VideoEncoder (models.spec).
Cost: the activations of a whole batch of clips: they grow with T, and with attention over the past as T squared.
Errors: GeometryError before the model is called, for clips and latents off the grid, and for any wish to stream.

Such a model attends to all of a clip's past, or takes statistics over all of its frames; any division into chunks would
make other latents. One call at a time runs on the model: a lock is held, so threads may share the encoder.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch

from models.pixels import to_frames, to_pixels
from models.spec import EncoderCard, GeometryError, Posterior

if TYPE_CHECKING:
    from torch import Tensor

    from models.chunks import StreamState


class WholeBackend(Protocol):
    """An autoencoder on its device, in its compute dtype."""

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode whole clips, B 3 T H W in float32: a backend casts them itself, where its model does."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode whole latents, B C t h w, to pixels B 3 T H W."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        ...


class WholeEncoder:
    """A VideoEncoder over a WholeBackend. Threads may share it; they take turns."""

    one_at_a_time = True

    def __init__(self, card: EncoderCard, backend: WholeBackend, device: str, compute_dtype: torch.dtype) -> None:
        self._card = card
        self._backend = backend
        self._device = torch.device(device)
        self._dtype = compute_dtype
        self._lock = threading.Lock()
        backend.to(self._device, compute_dtype)

    @property
    def card(self) -> EncoderCard:
        return self._card

    def encode(self, frames_BTHWC: Tensor, chunk_frames: int | None = None) -> Posterior:
        if chunk_frames is not None:
            raise GeometryError(f"chunk_frames {chunk_frames}: {self._cannot_stream()}; leave chunk_frames out")
        if frames_BTHWC.ndim != 5:
            raise GeometryError(f"frames are uint8 B T H W 3, got {tuple(frames_BTHWC.shape)}")
        self._card.geometry.latent_shape(*frames_BTHWC.shape[1:4])
        with self._lock, torch.inference_mode():
            pixels = to_pixels(frames_BTHWC, self._device, torch.float32, self._card.pixel_range)
            posterior = self._backend.encode(pixels)
            logvar = None if posterior.logvar is None else posterior.logvar.float().cpu()
            return Posterior(posterior.mean.float().cpu(), logvar)

    def decode(self, latents: Tensor) -> Tensor:
        channels = self._card.geometry.channels
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.numel():
            raise GeometryError(f"latents are B {channels} t h w, got {tuple(latents.shape)}")
        with self._lock, torch.inference_mode():
            pixels = self._backend.decode(latents.to(self._device, self._dtype))
            return to_frames(pixels, self._card.pixel_range)

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> NoReturn:
        """Raise GeometryError: there is no stream that would give the same latents."""
        raise GeometryError(f"{self._cannot_stream()}; encode the clip whole")

    def _cannot_stream(self) -> str:
        return f"{self._card.kind} cannot stream a clip (causality {self._card.geometry.causality!r})"
