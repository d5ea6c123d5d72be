"""The rehearsal encoder: takes a GPU's time and no CPU, so that a job can be tried before a GPU is paid for.

In:   a source `rehearsal:TxHxWxC@MEGAPIXELS`: strides, latent channels, megapixels (of frames) encoded per second.
Out:  an EncoderCard, or a VideoEncoder that sleeps as long as such an encoder would take; its latents are thumbnails.
Cost: the sleep; about a thousandth of a decode.
Errors: UsageError for a source that cannot be read.

Reading, decoding, writing and committing are those of the real job, so the report at its end says how many decode cores
an encoder of that speed needs.
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING, Any

from models.spec import EncoderCard, Geometry, GeometryError, Normaliser, Posterior
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import torch

    from models.chunks import StreamState
    from models.streamed import EncodeStream

PREFIX = "rehearsal:"
_SOURCE = re.compile(r"rehearsal:([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)@(\d+(?:\.\d+)?)")


def is_rehearsal(source: str) -> bool:
    """Whether a source means this encoder."""
    return source.startswith(PREFIX)


def describe_rehearsal(source: str) -> EncoderCard:
    """The card of such an encoder.

    Raises:
        UsageError: the source does not say strides, channels and speed.
    """
    geometry, _ = _parse(source)
    return EncoderCard(
        name=source,
        kind="rehearsal",
        geometry=geometry,
        normaliser=Normaliser((0.0,) * geometry.channels, (1.0,) * geometry.channels, "identity"),
        fingerprint=hashlib.sha256(source.encode()).hexdigest(),
        posterior=False,
    )


def _parse(source: str) -> tuple[Geometry, float]:
    found = _SOURCE.fullmatch(source)
    if found is None or found[2] != found[3] or not float(found[5]) > 0:
        raise UsageError(f"--encoder {source} is not rehearsal:TxHxWxC@MEGAPIXELS, as in rehearsal:4x8x8x16@50")
    return Geometry(int(found[1]), int(found[2]), int(found[4])), float(found[5])


class RehearsalEncoder:
    """A VideoEncoder that sleeps, as one GPU would. Keeps nothing between calls."""

    one_at_a_time = True

    def __init__(self, source: str) -> None:
        self._card = describe_rehearsal(source)
        self._megapixels_per_second = _parse(source)[1]

    @property
    def card(self) -> EncoderCard:
        return self._card

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self._card.geometry.latent_shape(*frames_BTHWC.shape[1:4])
        return self.encode_stream(chunk_frames).run(frames_BTHWC)

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        from models.streamed import EncodeStream

        geometry = self._card.geometry
        chunk_frames = chunk_frames or geometry.default_chunk_frames
        if chunk_frames % geometry.temporal_stride:
            raise GeometryError(f"chunk_frames {chunk_frames} is not a multiple of {geometry.temporal_stride}")
        return EncodeStream(geometry, self._encode_chunk, chunk_frames, state)

    def _encode_chunk(self, frames_BTHWC: torch.Tensor, state: Any) -> tuple[Posterior, Any]:
        """Sleep for a chunk; its latents are thumbnails of the last frame of every temporal stride."""
        began = time.perf_counter()
        geometry, side = self._card.geometry, self._card.geometry.spatial_stride
        first = 0 if state is None else geometry.temporal_stride - 1
        pixels = frames_BTHWC[:, first :: geometry.temporal_stride, ::side, ::side]
        thumbnails = pixels.float().mul(2 / 255).sub(1).permute(0, 4, 1, 2, 3)
        repeats = -(-geometry.channels // 3)
        mean = thumbnails.repeat(1, repeats, 1, 1, 1)[:, : geometry.channels].contiguous()
        B, T, H, W, _ = frames_BTHWC.shape
        seconds = B * T * H * W / 1e6 / self._megapixels_per_second
        time.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        return Posterior(mean, None), "begun"

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        geometry = self._card.geometry
        side = geometry.spatial_stride
        three = latents[:, :3] if geometry.channels >= 3 else latents.repeat(1, 3, 1, 1, 1)[:, :3]
        colours = three.repeat_interleave(side, dim=3).repeat_interleave(side, dim=4)
        rest = colours[:, :, 1:].repeat_interleave(geometry.temporal_stride, dim=2)
        import torch

        pixels = torch.cat([colours[:, :, :1], rest], dim=2).permute(0, 2, 3, 4, 1)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
