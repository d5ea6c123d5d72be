"""The decord back end, for the containers and codecs where decord is right.

In:   a byte range that holds a video.
Out:  MediaInfo (PyAV's); frames in presentation order, at the stored size, then fitted as everywhere else.
Cost: about 3 times PyAV's time and 6 times its memory; all frames up to the last wanted one are converted at their
    stored size; the source's bytes are held in memory.
Errors: DecodeError `unsupported_by_decord` where decord 0.6 is known to be wrong (MPEG-TS, HEVC, AV1, GIF, edit lists,
    more than 8 bits, mirrored pictures, turned mkv) or counts other frames than PyAV; `decode_error`; and what PyAV's
    probe finds.

It reads every frame in turn: decord's random access is wrong on open GOPs, and so is its `skip_frames`, there and on
fragmented mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.container import OpenVideo, open_video
from pipeline.decode.fit import FrameFitter, Orientation, fitter_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pyav import PyAVBackend, checked_frames, orientation_of
from pipeline.decode.records import ClipShape, MediaInfo, MediaSource
from pipeline.decode.source import open_source

_CLAIMED_CONTAINERS = ("mp4", "mkv")
_CLAIMED_CODECS = ("h264", "vp8", "vp9", "mpeg4", "mjpeg")
_CLAIMED_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray")


class DecordBackend:
    """See the module's docstring."""

    name = "decord"

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        return PyAVBackend().probe(source, limits)

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        info = self.probe(source, limits)
        with open_video(source, limits) as video:
            _check_claimed(video, info)
            tick = video.tick_seconds
            aspect = 1 / video.pixel_aspect if info.rotation_degrees % 180 else video.pixel_aspect
        reader = _Reader(source, info)
        fitter: FrameFitter | None = None

        def pixels(index: int) -> np.ndarray:
            nonlocal fitter
            picture = reader.read(index)
            if fitter is None:
                height, width, channels = picture.shape
                if channels != 3:
                    raise damage(source, "unsupported_by_decord", f"decord makes {picture.shape} of a frame; use pyav")
                fitter = fitter_of(source, shape, (width, height), aspect, Orientation(), limits)
            return fitter(av.VideoFrame.from_ndarray(picture, format="rgb24"))

        for index, seconds in enumerate(reader.start_seconds):
            pts = round(Fraction(float(seconds - reader.start_seconds[0])) / tick) * tick
            yield TimedFrame(index, pts, tick, lambda index=index: pixels(index))  # type: ignore[misc]


def _check_claimed(video: OpenVideo, info: MediaInfo) -> None:
    claimed = (
        info.container in _CLAIMED_CONTAINERS
        and info.codec in _CLAIMED_CODECS
        and info.pixel_format in _CLAIMED_PIXEL_FORMATS
    )
    if not claimed:
        text = f"decord is not trusted with {info.codec} {info.pixel_format} in {info.container}; use pyav"
        raise damage(video.source, "unsupported_by_decord", text)
    orientation = orientation_of(video, next(checked_frames(video)))
    if orientation.mirrored or (orientation.clockwise_degrees and info.container != "mp4"):
        raise damage(video.source, "unsupported_by_decord", "decord shows this display matrix otherwise; use pyav")


class _Reader:
    """decord's VideoReader, read forwards only."""

    def __init__(self, source: MediaSource, info: MediaInfo) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._source = source
        # Any frame that decord made up for one it could not decode is an error.
        with open_source(source) as file:
            self._reader = self._guarded(lambda: decord.VideoReader(file, num_threads=1, fault_tol=1e-9))
        # Above all, decord ignores edit lists.
        if len(self._reader) != info.num_frames:
            text = f"decord counts {len(self._reader)} frames, PyAV {info.num_frames}; use pyav"
            raise damage(source, "unsupported_by_decord", text)
        stamps = self._guarded(lambda: self._reader.get_frame_timestamp(range(info.num_frames)))
        self.start_seconds: list[float] = stamps[:, 0].tolist()
        self._next = 0

    def read(self, index: int) -> np.ndarray:
        """Frame `index`, which must not lie before the last one read: uint8 H W 3 at the stored size, upright."""
        while self._next < index:
            self._next_picture()
        return self._next_picture()

    def _next_picture(self) -> np.ndarray:
        self._next += 1
        return np.asarray(self._guarded(lambda: self._reader.next().asnumpy()))

    def _guarded(self, call: Any) -> Any:
        import decord

        try:
            return call()
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration) as error:
            raise damage(self._source, "decode_error", f"decord: {type(error).__name__}") from error
