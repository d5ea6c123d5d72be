"""What a decoder is, and the one place where frames meet windows.

In:   a Backend's frames in presentation order, a DecodeRequest.
Out:  one DecodeOutcome per window; each wanted frame is converted once, however many windows and positions share it.
Cost: one sequential pass from the first frame to the last wanted one; besides the outcomes, two frames of memory.
Errors: damage before a window is complete is that window's DecodeError; windows completed before it succeed. Damage
    counts even when it lies between windows: later frames may be predicted from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import (
    ClipShape,
    DecodedClip,
    DecodeOutcome,
    DecodeRequest,
    Grid,
    MediaInfo,
    MediaSource,
    Window,
)
from pipeline.errors import DecodeError


@dataclasses.dataclass(frozen=True)
class TimedFrame:
    """A decoded frame that is not yet converted.

    index: in presentation order, from 0. pts_seconds: since the first frame. tick_seconds: resolution of pts.
    pixels: makes the frame, uint8 H W 3 at the ClipShape; to be called before the next frame but one is taken.
    """

    index: int
    pts_seconds: Fraction
    tick_seconds: Fraction
    pixels: Callable[[], np.ndarray]


class Backend(Protocol):
    """One decoder library."""

    @property
    def name(self) -> str:
        """For DecodedClip.decoder."""
        ...

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        """What the media is. Raises DecodeError, or ShardError when its bytes cannot be read."""
        ...

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        """All shown frames in presentation order. Raises DecodeError at the first damage."""
        ...


def damage(source: MediaSource, reason: str, text: str) -> DecodeError:
    """A DecodeError that names its source: by key, else by path and byte range."""
    where = source.key or f"{source.path}[{source.offset}:{source.offset + source.size_bytes}]"
    return DecodeError(reason, f"{where}: {text}")


def choose_backend(source: MediaSource, decoder: str) -> Backend:
    """Pillow for images, whatever `decoder` says; for videos the decoder of that name, PyAV for "auto"."""
    if source.kind == "image":
        from pipeline.decode.image import PillowBackend

        return PillowBackend()
    if decoder == "decord":
        from pipeline.decode.decord_backend import DecordBackend

        return DecordBackend()
    from pipeline.decode.pyav import PyAVBackend

    return PyAVBackend()


def probe_media(source: MediaSource, limits: DecodeLimits) -> MediaInfo:
    """Probe in this process. Raises DecodeError or ShardError."""
    return choose_backend(source, "auto").probe(source, limits)


def new_frames(request: DecodeRequest) -> list[np.ndarray]:
    """Memory for a request's frames: per window uint8 T H W 3, not initialised."""
    shape = request.shape
    return [np.empty((window.num_frames, shape.height, shape.width, 3), np.uint8) for window in request.windows]


def decode_windows(
    request: DecodeRequest, limits: DecodeLimits, out: Sequence[np.ndarray] | None = None
) -> tuple[DecodeOutcome, ...]:
    """Decode in this process, into `out` (per window uint8 T H W 3) when given.

    Raises:
        ShardError: the source cannot be opened.
        UnitError: reading it broke off.
        MemoryError: this process has too little, or a damaged header asks for too much.
    """
    backend = choose_backend(request.source, request.decoder)
    fillings = [
        _Filling(window, frames) for window, frames in zip(request.windows, out or new_frames(request), strict=True)
    ]
    failure: DecodeError | None = None
    try:
        _fill(fillings, _spans(request, backend, limits))
    except DecodeError as error:
        failure = error
    return tuple(
        DecodedClip(filling.frames, filling.pts_seconds, backend.name)
        if filling.missing == 0
        else failure or _past_end(request, filling.window)
        for filling in fillings
    )


class _Filling:
    """One window's arrays while they fill up."""

    def __init__(self, window: Window, frames: np.ndarray) -> None:
        self.window, self.frames = window, frames
        self.pts_seconds = np.zeros(window.num_frames)
        self.missing = window.num_frames

    def overlap(self, start: int, stop: int) -> slice:
        """The part of the window that lies in positions [start, stop)."""
        first = max(start - self.window.start, 0)
        return slice(first, max(first, min(stop - self.window.start, self.window.num_frames)))


_Span = tuple[TimedFrame, int, int]


def _fill(fillings: Sequence[_Filling], spans: Iterator[_Span]) -> None:
    if not fillings:
        return
    for frame, start, stop in spans:
        pixels = None
        for filling in fillings:
            part = filling.overlap(start, stop)
            if part.start < part.stop:
                pixels = frame.pixels() if pixels is None else pixels
                filling.frames[part] = pixels
                filling.pts_seconds[part] = float(frame.pts_seconds)
                filling.missing -= part.stop - part.start
        if not any(filling.missing for filling in fillings):
            return


def _spans(request: DecodeRequest, backend: Backend, limits: DecodeLimits) -> Iterator[_Span]:
    """Every frame with the grid positions [start, stop) at which it is on screen.

    On an fps grid a frame is known to be over when the next one begins; the last one stays to the video's end.
    """
    grid, count = request.grid, 0
    held: TimedFrame | None = None
    start = 0
    for frame in backend.frames(request.source, request.shape, limits):
        count += 1
        position = _position(frame, grid)
        if grid.fps is None:
            yield frame, position, frame.index // grid.frame_step + 1
            continue
        if held is not None:
            yield held, start, max(start, position)
        held, start = frame, max(start, position)
    length = _checked_length(request, backend.probe(request.source, limits), count)
    if held is not None:
        yield held, start, length


def _position(frame: TimedFrame, grid: Grid) -> int:
    """The first grid position that shows this frame or a later one."""
    if grid.fps is None:
        return -(-frame.index // grid.frame_step)
    return max(0, math.ceil((frame.pts_seconds - frame.tick_seconds / 2) * grid.fps))


def _checked_length(request: DecodeRequest, info: MediaInfo, num_decoded: int) -> int:
    if num_decoded < info.num_frames:
        raise damage(request.source, "short_video", f"decoded {num_decoded} of {info.num_frames} frames")
    return request.grid.length(info.num_frames, info.duration_seconds)


def _past_end(request: DecodeRequest, window: Window) -> DecodeError:
    stop = window.start + window.num_frames
    return damage(request.source, "past_end", f"positions {window.start} to {stop - 1} reach past the video's end")
