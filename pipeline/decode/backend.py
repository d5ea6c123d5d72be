"""What a decoder is, and the one place where frames meet windows.

In:   a Backend's frames in presentation order, a DecodeRequest.
Out:  one DecodeOutcome per window; each wanted frame is converted once, however many windows and positions share it.
Cost: one sequential pass from the first frame to the last wanted one, or to what a back end that seeks finds before
    each window; besides the outcomes, two frames of memory.
Errors: damage before a window is complete is that window's DecodeError; windows completed before it succeed. Damage
    counts even when it lies between windows, in frames that are decoded: later ones may be predicted from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

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
from pipeline.decode.source import fetched
from pipeline.errors import DecodeError

# What a back end does not report unless it saw it.
_SEEN_DAMAGE = ("corrupt_frame", "lost_frame", "lost_packets", "short_video")


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
        """What the media is. Raises DecodeError, or ShardError and UnitError as `open_source`."""
        ...

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        """All shown frames in presentation order. Raises DecodeError at the first damage."""
        ...


@runtime_checkable
class SeekingBackend(Backend, Protocol):
    """A back end that can leave out what lies between the wanted positions."""

    def wanted_frames(
        self, source: MediaSource, shape: ClipShape, limits: DecodeLimits, grid: Grid, positions: Sequence[range]
    ) -> Iterator[TimedFrame]:
        """As `frames`, less whatever shows at none of the positions (ranges, ascending and apart).

        A frame that is on screen at a wanted position is followed by its successor, so that its end is known.
        """
        ...


def damage(source: MediaSource, reason: str, text: str) -> DecodeError:
    """A DecodeError that names its source: by key, else by path and byte range."""
    where = source.key or f"{source.path}[{source.offset}:{source.offset + source.size_bytes}]"
    return DecodeError(reason, f"{where}: {text}")


def choose_backend(source: MediaSource, decoder: str) -> Backend:
    """Pillow for images, whatever `decoder` says; for videos the back end of that name, PyAV for "auto"."""
    if source.kind == "image":
        from pipeline.decode.image import PillowBackend

        return PillowBackend()
    if decoder == "pillow":
        from pipeline.decode.animation import AnimationBackend

        return AnimationBackend()
    if decoder == "decord":
        from pipeline.decode.decord_backend import DecordBackend

        return DecordBackend()
    if decoder == "torchcodec":
        from pipeline.decode.torchcodec_backend import TorchcodecBackend

        return TorchcodecBackend()
    from pipeline.decode.pyav import PyAVBackend

    return PyAVBackend()


def probe_media(source: MediaSource, limits: DecodeLimits) -> MediaInfo:
    """Probe in this process. Raises DecodeError, ShardError or UnitError."""
    from pipeline.decode.animation import is_webp

    try:
        return choose_backend(source, "auto").probe(source, limits)
    except DecodeError as error:
        if error.reason == "not_media" and source.kind == "video" and is_webp(source):
            return choose_backend(source, "pillow").probe(source, limits)
        raise


def new_frames(request: DecodeRequest) -> list[np.ndarray]:
    """Memory for a request's frames: per window uint8 T H W 3, not initialised."""
    shape = request.shape
    return [np.empty((window.num_frames, shape.height, shape.width, 3), np.uint8) for window in request.windows]


def decode_windows(
    request: DecodeRequest, limits: DecodeLimits, out: Sequence[np.ndarray] | None = None
) -> tuple[DecodeOutcome, ...]:
    """Decode in this process, into `out` (per window uint8 T H W 3) when given.

    With the decoder "auto", what one back end cannot decode is given to the next one that is proven for such videos;
    the first one's error stands where none can, and where it tells of the file itself: another one may not notice.

    Raises:
        ShardError: the source is not there.
        UnitError: it cannot be read at the moment.
        MemoryError: this process has too little, or a damaged header asks for too much.
    """
    from pipeline.decode.choice import backend_names

    out = out or new_frames(request)
    request = dataclasses.replace(request, source=fetched(request.source))
    names = backend_names(request.source, request.decoder, limits)
    outcomes = list(decode_with(choose_backend(request.source, next(names)), request, limits, out))
    while (left := [i for i, outcome in enumerate(outcomes) if _is_open(outcome)]) and (name := next(names, None)):
        part = dataclasses.replace(request, windows=tuple(request.windows[i] for i in left))
        again = decode_with(choose_backend(request.source, name), part, limits, [out[i] for i in left])
        for i, outcome in zip(left, again, strict=True):
            outcomes[i] = outcomes[i] if _is_damage(outcome) else outcome
    return tuple(outcomes)


def decode_with(
    backend: Backend, request: DecodeRequest, limits: DecodeLimits, out: Sequence[np.ndarray] | None = None
) -> tuple[DecodeOutcome, ...]:
    """`decode_windows` with one back end.

    A back end that seeks decodes the windows which damage kept from completion once more, each by itself: so a window
    fails by what is decoded between its own seek point and its end, whichever windows it shares a request with.
    """
    out = out or new_frames(request)
    outcomes = _decode_together(backend, request, limits, out)
    if len(request.windows) < 2 or not isinstance(backend, SeekingBackend):
        return outcomes
    singles = [dataclasses.replace(request, windows=(window,)) for window in request.windows]
    return tuple(
        _decode_together(backend, single, limits, (frames,))[0] if _is_damage(outcome) else outcome
        for outcome, single, frames in zip(outcomes, singles, out, strict=True)
    )


def decode_pieces(
    request: DecodeRequest, limits: DecodeLimits, piece_frames: int, out: np.ndarray | None = None
) -> Iterator[DecodedClip]:
    """The one window of a request as consecutive clips of `piece_frames` frames (the last one may be shorter).

    Together they are what `decode_windows` gives. Each is decoded when it is asked for, into `out` (uint8 T H W 3, at
    least a piece) when given, which the next piece then overwrites. "auto" goes by the file alone: the first back end
    in its order, or the one that opens an animated WebP.

    Raises:
        DecodeError: the rest of the window cannot be decoded; pieces that came before are good.
        ValueError: the request has not exactly one window.
        ShardError, UnitError, MemoryError: as `decode_windows`.
    """
    (window,) = request.windows
    request = dataclasses.replace(request, source=fetched(request.source))
    backend = _backend_of_pieces(request, limits)
    pieces = iter(pieces_of(window, piece_frames))
    filling = _piece(request, next(pieces), out)
    for frame, start, stop in _spans(request, backend, limits):
        pixels = frame.pixels() if filling.shows(start, stop) else None
        # One frame may fill the rest of a piece and the beginning of the next one.
        while pixels is not None and filling.show(pixels, frame.pts_seconds, start, stop):
            yield DecodedClip(filling.frames, filling.pts_seconds, backend.name)
            following = next(pieces, None)
            if following is None:
                return
            filling = _piece(request, following, out)
    raise _past_end(request, window)


def _backend_of_pieces(request: DecodeRequest, limits: DecodeLimits) -> Backend:
    """No second one is tried: a stream that is taken up again in its middle must come from the same one."""
    from pipeline.decode.animation import is_webp
    from pipeline.decode.choice import FOR_WEBP, backend_names

    source = request.source
    if request.decoder == "auto" and source.kind == "video" and is_webp(source):
        return choose_backend(source, FOR_WEBP)
    return choose_backend(source, next(backend_names(source, request.decoder, limits)))


def pieces_of(window: Window, piece_frames: int) -> Iterator[Window]:
    """The window, cut into windows of `piece_frames` positions; the last one may be shorter."""
    stop = window.start + window.num_frames
    for start in range(window.start, stop, piece_frames):
        yield Window(start, min(piece_frames, stop - start))


def _piece(request: DecodeRequest, window: Window, out: np.ndarray | None) -> _Filling:
    if out is None:
        (out,) = new_frames(dataclasses.replace(request, windows=(window,)))
    return _Filling(window, out[: window.num_frames])


def _is_damage(outcome: DecodeOutcome) -> bool:
    return isinstance(outcome, DecodeError) and outcome.reason != "past_end"


def _is_open(outcome: DecodeOutcome) -> bool:
    """Whether another back end may do better."""
    return isinstance(outcome, DecodeError) and outcome.reason not in ("past_end", *_SEEN_DAMAGE)


def _decode_together(
    backend: Backend, request: DecodeRequest, limits: DecodeLimits, out: Sequence[np.ndarray]
) -> tuple[DecodeOutcome, ...]:
    fillings = [_Filling(window, frames) for window, frames in zip(request.windows, out, strict=True)]
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

    def shows(self, start: int, stop: int) -> bool:
        """Whether any of the positions [start, stop) lie in the window."""
        return max(start, self.window.start) < min(stop, self.window.start + self.window.num_frames)

    def show(self, pixels: np.ndarray, pts_seconds: Fraction, start: int, stop: int) -> bool:
        """Put a frame at positions [start, stop), as far as they lie in the window. Whether it is full now."""
        first, last = max(start - self.window.start, 0), min(stop - self.window.start, self.window.num_frames)
        if first >= last:
            return False
        self.frames[first:last] = pixels
        self.pts_seconds[first:last] = float(pts_seconds)
        self.missing -= last - first
        return self.missing == 0


_Span = tuple[TimedFrame, int, int]


def _fill(fillings: Sequence[_Filling], spans: Iterator[_Span]) -> None:
    if not fillings:
        return
    for frame, start, stop in spans:
        showing = [filling for filling in fillings if filling.shows(start, stop)]
        if not showing:
            continue
        pixels = frame.pixels()
        for filling in showing:
            filling.show(pixels, frame.pts_seconds, start, stop)
        if not any(filling.missing for filling in fillings):
            return


def _spans(request: DecodeRequest, backend: Backend, limits: DecodeLimits) -> Iterator[_Span]:
    """Every frame with the grid positions [start, stop) at which it is on screen.

    On an fps grid a frame is known to be over when the next one begins; the last one stays to the video's end.
    """
    grid, count = request.grid, 0
    held: TimedFrame | None = None
    start = 0
    for frame in _frames(request, backend, limits):
        follows, count = frame.index == count, frame.index + 1
        position = _position(frame, grid)
        if grid.fps is None:
            yield frame, position, frame.index // grid.frame_step + 1
            continue
        if held is not None and follows:
            yield held, start, max(start, position)
        held, start = frame, max(start, position)
    length = _checked_length(request, backend.probe(request.source, limits), count)
    if held is not None:
        yield held, start, length


def _frames(request: DecodeRequest, backend: Backend, limits: DecodeLimits) -> Iterator[TimedFrame]:
    if isinstance(backend, SeekingBackend):
        positions = merged_positions(request.windows)
        return backend.wanted_frames(request.source, request.shape, limits, request.grid, positions)
    return backend.frames(request.source, request.shape, limits)


def merged_positions(windows: Sequence[Window]) -> list[range]:
    """The positions that lie in any window, as ascending ranges with gaps between them."""
    merged: list[range] = []
    for window in sorted(windows, key=lambda window: window.start):
        stop = window.start + window.num_frames
        if merged and window.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(range(window.start, stop))
    return merged


def _position(frame: TimedFrame, grid: Grid) -> int:
    """The first grid position that shows this frame or a later one."""
    if grid.fps is None:
        return -(-frame.index // grid.frame_step)
    return max(0, math.ceil((frame.pts_seconds - rounding(frame)) * grid.fps))


def rounding(frame: TimedFrame) -> Fraction:
    """How far, in seconds, a frame's time may be off by being a whole number of ticks.

    At most half a millisecond: coarser ticks are a frame rate's own, or GIF's, and say what they mean.
    """
    return min(frame.tick_seconds, Fraction(1, 1000)) / 2


def _checked_length(request: DecodeRequest, info: MediaInfo, num_decoded: int) -> int:
    if num_decoded < info.num_frames:
        raise damage(request.source, "short_video", f"decoded {num_decoded} of {info.num_frames} frames")
    return request.grid.length(info.num_frames, info.duration_seconds)


def _past_end(request: DecodeRequest, window: Window) -> DecodeError:
    stop = window.start + window.num_frames
    return damage(request.source, "past_end", f"positions {window.start} to {stop - 1} reach past the video's end")
