"""The torchcodec back end, for the containers and codecs where torchcodec is right.

In:   a byte range that holds a video; the extra `torchcodec`, and FFmpeg's shared libraries (4 to 8) on the system.
Out:  MediaInfo (PyAV's); frames in presentation order, at the stored size, then fitted as everywhere else.
Cost: 2 s and 300 MB for the import; a pass over the packets for their times; wanted frames are converted at their
    stored size, those between are only decoded.
Errors: UsageError without the extra or without FFmpeg's libraries, before anything is decoded. DecodeError
    `unsupported_by_torchcodec` where torchcodec is known to be wrong or counts other frames than PyAV;
    `decode_error`; and what PyAV's probe finds.

Each frame's time is compared with the packets', so that a frame taken from elsewhere is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.container import OpenVideo, open_video
from pipeline.decode.fit import FrameFitter, Orientation, fitter_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pyav import PyAVBackend, checked_frames, orientation_of
from pipeline.decode.records import ClipShape, MediaInfo, MediaSource
from pipeline.decode.source import open_source
from pipeline.errors import UsageError

_CLAIMED_CONTAINERS = ("mp4", "mkv", "flv")
_CLAIMED_CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mjpeg")


class TorchcodecBackend:
    """See the module's docstring."""

    name = "torchcodec"

    def __init__(self) -> None:
        self._decoder_class = video_decoder_class()

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        return PyAVBackend().probe(source, limits)

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        info = self.probe(source, limits)
        _check_claimed(source, info, limits)
        with open_video(source, limits) as video:
            tick, aspect = video.tick_seconds, video.pixel_aspect
            times = _shown_times(video)
        with open_source(source) as file:
            reader = _Reader(self._decoder_class, source, file.read(), [time * tick for time in times])
        if info.rotation_degrees % 180:
            aspect = 1 / aspect
        fitter: FrameFitter | None = None

        def pixels(index: int) -> np.ndarray:
            nonlocal fitter
            picture = reader.read(index)
            if fitter is None:
                height, width = picture.shape[:2]
                fitter = fitter_of(source, shape, (width, height), aspect, Orientation(), limits)
            return fitter(av.VideoFrame.from_ndarray(picture, format="rgb24"))

        for index, time in enumerate(times):
            yield TimedFrame(index, (time - times[0]) * tick, tick, lambda index=index: pixels(index))  # type: ignore[misc]


def video_decoder_class() -> Any:
    """The class torchcodec.decoders.VideoDecoder.

    Raises:
        UsageError: it is not installed, or finds no FFmpeg.
    """
    try:
        return importlib.import_module("torchcodec.decoders").VideoDecoder
    except ImportError as error:
        raise UsageError("--decoder torchcodec needs the extra: pip install 'latentmill[torchcodec]'") from error
    except (OSError, RuntimeError) as error:
        raise UsageError(
            "torchcodec finds no FFmpeg, which it takes from the system; on Debian and Ubuntu: "
            "apt-get install libavdevice59 (or the number of your release), which brings the others along"
        ) from error


def _check_claimed(source: MediaSource, info: MediaInfo, limits: DecodeLimits) -> None:
    if info.container not in _CLAIMED_CONTAINERS or info.codec not in _CLAIMED_CODECS:
        text = f"torchcodec is not trusted with {info.codec} in {info.container}; use pyav"
        raise damage(source, "unsupported_by_torchcodec", text)
    with open_video(source, limits) as video:
        frame = next(checked_frames(video))
        orientation = orientation_of(video, frame)
    if orientation.mirrored:
        raise damage(source, "unsupported_by_torchcodec", "torchcodec does not mirror; use pyav")
    if frame.color_range == ColorRange.JPEG and frame.format.components[0].bits > 8:
        raise damage(source, "unsupported_by_torchcodec", "torchcodec takes 10 bits for limited range; use pyav")


def _shown_times(video: OpenVideo) -> list[int]:
    """The presentation times of all packets, in ticks, ascending: the decoder's own count must be the same."""
    times = []
    for packet in video.packets():
        if packet.is_discard:
            text = "torchcodec may start elsewhere than the edit list says; use pyav"
            raise damage(video.source, "unsupported_by_torchcodec", text)
        if packet.size and packet.pts is not None:
            times.append(packet.pts)
    return sorted(times)


class _Reader:
    """torchcodec's exact mode, checked against the packets' times."""

    def __init__(self, decoder_class: Any, source: MediaSource, data: bytes, seconds: list[Fraction]) -> None:
        self._source, self._seconds = source, seconds
        self._decoder = self._guarded(
            lambda: decoder_class(data, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", seek_mode="exact")
        )
        if len(self._decoder) != len(seconds):
            text = f"torchcodec counts {len(self._decoder)} frames, PyAV {len(seconds)}; use pyav"
            raise damage(source, "unsupported_by_torchcodec", text)

    def read(self, index: int) -> np.ndarray:
        """Frame `index`: uint8 H W 3 at the stored size, upright."""
        frame = self._guarded(lambda: self._decoder.get_frame_at(index))
        if abs(frame.pts_seconds - float(self._seconds[index])) > 1e-4:
            text = f"torchcodec shows frame {index} at {frame.pts_seconds} s, not at {float(self._seconds[index])} s"
            raise damage(self._source, "decode_error", text)
        return np.ascontiguousarray(frame.data.numpy())

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError, IndexError) as error:
            raise damage(self._source, "decode_error", f"torchcodec: {type(error).__name__}") from error
