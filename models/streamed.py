"""The one way in which clips reach an autoencoder: checked, in canonical chunks, uint8 over the bus.

In:   a Backend (an autoencoder that takes chunks, its state passed in and out) and its EncoderCard.
Out:  ChunkedEncoder, a VideoEncoder (models.spec), and its streams; a whole clip is a stream that is pushed once.
Cost: one chunk's activations, a backend's state, and the latent; no growth with T but the latent's own, and a byte per
      value of a clip that comes whole, which goes to the device at once.
Errors: GeometryError before the model is called, for clips, chunks and latents that are off the grid.

Canonical chunking: the leading frame alone, then chunks of `chunk_frames`, the last one filled up by repeating the
clip's last frame; what the filling made is cut off. A chunk's arithmetic then depends neither on how long the clip is,
nor on how its frames arrive, nor on where a stream was taken up again: with one batch size, thread count and device, a
latent frame is bit for bit the same. Latents are decoded in chunks of `chunk_frames` pixels likewise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from models.chunks import ChunkedStream, RunChunk, StreamState
from models.pixels import to_frames, to_pixels
from models.spec import EncoderCard, Geometry, GeometryError, Posterior

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


class EncodesChunks(Protocol):
    """A causal autoencoder on its device, in its compute dtype.

    Its state is None at a clip's start, then whatever it likes of dictionaries, lists, tensors, numbers and strings, so
    that it can be saved. A state that was passed in is left as it was.

    one_at_a_time: whether threads that share it take turns; else their calls run beside each other.
    """

    one_at_a_time: bool

    def encode_chunk(self, pixels: Tensor, state: Any) -> tuple[Posterior, Any]:
        """Encode the next frames, B 3 T H W: the leading one first, then multiples of the temporal stride."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        ...


class Backend(EncodesChunks, Protocol):
    """One whose decoder is not resumed."""

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode B C t h w; yields pixels B 3 T H W, in pieces, in order."""
        ...


@runtime_checkable
class StreamingBackend(EncodesChunks, Protocol):
    """One whose decoder streams as well."""

    def decode_chunk(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode the next latent frames, B C t h w, the leading one first, to pixels B 3 T H W."""
        ...


class ChunkedEncoder:
    """A VideoEncoder over a Backend. As thread-safe as its backend; a stream belongs to one thread at a time."""

    def __init__(
        self, card: EncoderCard, backend: Backend | StreamingBackend, device: str, compute_dtype: torch.dtype
    ) -> None:
        self._card = card
        self._backend = backend
        self._device = torch.device(device)
        self._dtype = compute_dtype
        backend.to(self._device, compute_dtype)

    @property
    def card(self) -> EncoderCard:
        return self._card

    @property
    def one_at_a_time(self) -> bool:
        return self._backend.one_at_a_time or self._device.type != "cpu"

    def encode(self, frames_BTHWC: Tensor, chunk_frames: int | None = None) -> Posterior:
        _check_frames(frames_BTHWC, self._card.geometry)
        self._card.geometry.latent_shape(*frames_BTHWC.shape[1:4])
        # At once: a copy for each chunk would make the device wait for the bus each time.
        return self.encode_stream(chunk_frames).run(frames_BTHWC.to(self._device))

    def decode(self, latents: Tensor) -> Tensor:
        if isinstance(self._backend, StreamingBackend):
            return self.decode_stream().run(latents)
        _check_latents(latents, self._card.geometry)
        with torch.inference_mode():
            pieces = self._backend.decode(latents.to(self._device, self._dtype))
            return torch.cat([to_frames(piece, self._card.pixel_range) for piece in pieces], dim=1)

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        geometry = self._card.geometry
        if chunk_frames is None:
            chunk_frames = geometry.default_chunk_frames if state is None else state["chunk_frames"]
        if chunk_frames < 1 or chunk_frames % geometry.temporal_stride:
            raise GeometryError(f"chunk_frames {chunk_frames} is not a multiple of {geometry.temporal_stride}")
        return EncodeStream(geometry, self._encode_chunk, chunk_frames, state)

    def decode_stream(self, state: StreamState | None = None) -> DecodeStream:
        """A stream that decodes one batch of clips, from its start or from where `state` was left.

        Raises:
            GeometryError: this encoder decodes whole latents only.
        """
        if not isinstance(self._backend, StreamingBackend):
            raise GeometryError(f"{self._card.kind} decodes whole latents only: use decode")
        return DecodeStream(self._card.geometry, self._decode_chunk, state)

    def _encode_chunk(self, frames_BTHWC: Tensor, state: Any) -> tuple[Posterior, Any]:
        pixels = to_pixels(frames_BTHWC, self._device, self._dtype, self._card.pixel_range)
        return self._backend.encode_chunk(pixels, state)

    def _decode_chunk(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert isinstance(self._backend, StreamingBackend)
        pixels, state = self._backend.decode_chunk(latents.to(self._device, self._dtype), state)
        return to_frames(pixels, self._card.pixel_range), state


class EncodeStream(ChunkedStream[Posterior]):
    """Encodes one batch of clips, pushed as uint8 RGB frames B T H W 3: any T, and the same B, H and W every time.

    `push` and `flush` give a Posterior of the latent frames that are ready, float32 on the CPU, or None.

    Raises:
        GeometryError: `push`: not such frames; `flush`: the clip's frames are not on the grid.
    """

    time_axis = 1

    def __init__(
        self, geometry: Geometry, encode: RunChunk[Posterior], chunk_frames: int, state: StreamState | None
    ) -> None:
        super().__init__(encode, chunk_frames, state)
        self._geometry = geometry

    def _check(self, arrived: Tensor) -> None:
        _check_frames(arrived, self._geometry)

    def _check_end(self, num_frames: int) -> None:
        self._geometry.latent_shape(num_frames, self._geometry.spatial_stride, self._geometry.spatial_stride)

    def _join(self, outcomes: Sequence[Posterior]) -> Posterior:
        mean = torch.cat([outcome.mean for outcome in outcomes], dim=2)
        logvars = [outcome.logvar for outcome in outcomes if outcome.logvar is not None]
        return Posterior(mean.float().cpu(), torch.cat(logvars, dim=2).float().cpu() if logvars else None)

    def _shorten(self, outcome: Posterior, num_frames: int) -> Posterior:
        kept = num_frames // self._geometry.temporal_stride
        return Posterior(outcome.mean[:, :, :kept], None if outcome.logvar is None else outcome.logvar[:, :, :kept])


class DecodeStream(ChunkedStream[torch.Tensor]):
    """Decodes one batch of latents, pushed as unnormalised float B C t h w: any t, and the same B, h and w every time.

    `push` and `flush` give uint8 RGB frames, B T H W 3, on the CPU, or None. Counts in its state are of latent frames.

    Raises:
        GeometryError: `push`: not such latents; `flush`: no latent frame came.
    """

    time_axis = 2

    def __init__(self, geometry: Geometry, decode: RunChunk[Tensor], state: StreamState | None) -> None:
        super().__init__(decode, geometry.default_chunk_frames // geometry.temporal_stride, state)
        self._geometry = geometry

    def _check(self, arrived: Tensor) -> None:
        _check_latents(arrived, self._geometry)

    def _check_end(self, num_frames: int) -> None:
        if not num_frames:
            raise GeometryError("no latent frame to decode: push at least one")

    def _join(self, outcomes: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(outcomes), dim=1)

    def _shorten(self, outcome: Tensor, num_frames: int) -> Tensor:
        return outcome[:, : num_frames * self._geometry.temporal_stride]


def _check_frames(frames: Tensor, geometry: Geometry) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[4] != 3 or not frames.numel():
        raise GeometryError(f"frames are uint8 B T H W 3, got {frames.dtype} {tuple(frames.shape)}")
    geometry.latent_shape(1, *frames.shape[2:4])


def _check_latents(latents: Tensor, geometry: Geometry) -> None:
    if latents.ndim != 5 or latents.shape[1] != geometry.channels or not latents.numel():
        raise GeometryError(f"latents are B {geometry.channels} t h w, got {tuple(latents.shape)}")
