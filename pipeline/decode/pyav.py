"""The PyAV back end: FFmpeg's demuxers and decoders, sequential, one thread.

In:   a byte range that holds a video.
Out:  MediaInfo; frames in presentation order.
Cost: `probe` of an mp4 or mov reads headers and one frame; of anything else all packets, of which it decodes one frame.
    Decoding holds the decoder's reference frames; FFmpeg's index of an mp4 takes up to 100 bytes per frame, 9 MB for
    an hour at 25 fps.
Errors: DecodeError `not_media`, `no_video_stream`, `too_large`, `unsupported_alpha`, `unsupported_rotation`,
    `decode_error`, `corrupt_frame`, `size_change`, `no_timestamps`; ShardError and UnitError from the storage.

Packets are counted as frames, except VP8's hidden ones. Two containers' habits are beyond that and make the count too
high: interlaced H.264 with one field per packet, and MPEG-4 in AVI with packed B-frames. There the last windows end as
`short_video`; no window gets a wrong frame. A stream that starts between key frames (cut MPEG-TS) does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import IO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.fit import FrameFitter, Orientation, display_size
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.mp4 import is_fragmented
from pipeline.decode.records import ClipShape, Grid, MediaInfo, MediaSource
from pipeline.decode.seek import Target, targets
from pipeline.decode.seek_pyav import SEEKABLE_CONTAINERS, NotExactError, SeekingWalk, codec_of, is_shown
from pipeline.errors import UnitError
from pipeline.storage import open_range

# FFmpeg's demuxers that may see the data, and what they are called in MediaInfo. No playlist, no text, no device: such
# formats name other files, which FFmpeg would open and show.
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "mp4",
    "matroska,webm": "mkv",
    "mpegts": "mpegts",
    "avi": "avi",
    "gif": "gif",
    "apng": "apng",
    "flv": "flv",
    "asf": "asf",
    "mpeg": "mpeg",
    "ogg": "ogg",
}
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}


class PyAVBackend:
    """See the module's docstring."""

    name = "pyav"

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        with open_video(source, limits) as video:
            return _probe(video, limits)

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        with open_video(source, limits) as video:
            yield from _timed(video, enumerate(checked_frames(video)), shape, limits)

    def wanted_frames(
        self, source: MediaSource, shape: ClipShape, limits: DecodeLimits, grid: Grid, positions: Sequence[range]
    ) -> Iterator[TimedFrame]:
        done = -1
        try:
            for frame in self._proven_frames(source, shape, limits, grid, positions):
                done = frame.index
                yield frame
        except NotExactError:
            yield from (frame for frame in self.frames(source, shape, limits) if frame.index > done)

    def _proven_frames(
        self, source: MediaSource, shape: ClipShape, limits: DecodeLimits, grid: Grid, positions: Sequence[range]
    ) -> Iterator[TimedFrame]:
        last = Target.at(grid, positions[-1][-1])
        with open_video(source, limits) as video:
            if video.container_name not in SEEKABLE_CONTAINERS:
                raise NotExactError
            walk = SeekingWalk(video, last, lambda: open_video(source, limits))
            frames = _timed(video, _checked(video, walk), shape, limits)
            yield from _up_to_each(targets(grid, positions), frames, walk.approach)
            yield from frames


def _up_to_each(
    wanted: Iterable[Target], frames: Iterator[TimedFrame], approach: Callable[[Target], None]
) -> Iterator[TimedFrame]:
    """The frames of a walk, which is brought near each target in turn."""
    frame = next(frames, None)
    if frame is None:
        return
    yield frame
    for target in wanted:
        if not target.is_done(frame):
            approach(target)
        while not target.is_done(frame):
            frame = next(frames, None)
            if frame is None:
                return
            yield frame


@dataclasses.dataclass(frozen=True)
class OpenVideo:
    """An open container, its chosen stream and where it came from."""

    source: MediaSource
    file: IO[bytes]
    container: InputContainer
    stream: VideoStream
    num_video_streams: int

    @property
    def container_name(self) -> str:
        """One of CONTAINERS' values."""
        return CONTAINERS[self.container.format.name]

    @property
    def tick_seconds(self) -> Fraction:
        """The unit of the stream's timestamps."""
        return self.stream.time_base or Fraction(1, 1_000_000)

    @property
    def pixel_aspect(self) -> Fraction:
        """Width over height of a pixel; 1 when not told."""
        aspect = self.stream.sample_aspect_ratio
        return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """A frame's conversion, put off until it is known to be wanted."""

    frame: av.VideoFrame
    fitter: FrameFitter

    def __call__(self) -> np.ndarray:
        return self.fitter(self.frame)


@contextlib.contextmanager
def open_video(source: MediaSource, limits: DecodeLimits) -> Iterator[OpenVideo]:
    """The container and FFmpeg's best video stream; FFmpeg's errors inside the block become DecodeError.

    Raises:
        DecodeError: not media, no video stream, too large, or whatever FFmpeg reports inside the block.
        ShardError: the file cannot be opened.
        UnitError: reading it broke off.
    """
    with open_range(source.path, source.offset, source.size_bytes) as file, _decode_errors(source, "decode_error"):
        with _decode_errors(source, "not_media"):
            container = av.open(file, mode="r", container_options=_OPTIONS, metadata_errors="replace")
        with container:
            yield _select(source, file, container, limits)


@contextlib.contextmanager
def _decode_errors(source: MediaSource, reason: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise  # FFmpeg's ENOMEM is both; it is this process's trouble
    except av.FFmpegError as error:
        raise damage(source, reason, error.strerror or type(error).__name__) from error
    except OSError as error:  # not FFmpeg's: our file's
        raise UnitError(f"cannot read {source.path}: {error.strerror}") from error


def _select(source: MediaSource, file: IO[bytes], container: InputContainer, limits: DecodeLimits) -> OpenVideo:
    shown = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if not shown:
        raise damage(source, "no_video_stream", f"{len(container.streams)} streams, none of them video")
    stream = next((stream for stream in shown if stream is best), shown[0])
    if stream.codec_context is None:
        raise damage(source, "decode_error", "there is no decoder for the video stream")
    if stream.metadata.get("alpha_mode") == "1":  # VP8 and VP9; FFmpeg's decoder would show what lies under it
        raise damage(source, "unsupported_alpha", "the picture has an alpha channel in a stream beside it")
    if stream.width * stream.height > limits.max_pixels:
        raise damage(
            source, "too_large", f"frames of {stream.width}x{stream.height}, the limit is {limits.max_pixels} pixels"
        )
    stream.codec_context.thread_count = 1
    return OpenVideo(source, file, container, stream, len(shown))


def checked_frames(video: OpenVideo) -> Iterator[av.VideoFrame]:
    """All shown frames. Raises DecodeError for one that is damaged or has another size than the first."""
    for _, frame in _checked(video, enumerate(video.container.decode(video.stream))):
        yield frame


def _checked(video: OpenVideo, frames: Iterable[tuple[int, av.VideoFrame]]) -> Iterator[tuple[int, av.VideoFrame]]:
    size = None
    for index, frame in frames:
        size = size or (frame.width, frame.height)
        if frame.is_corrupt:
            raise damage(video.source, "corrupt_frame", f"frame {index} is damaged")
        if size != (frame.width, frame.height):
            text = f"frame {index} is {frame.width}x{frame.height}, those before are {size[0]}x{size[1]}"
            raise damage(video.source, "size_change", text)
        yield index, frame


def _timed(
    video: OpenVideo, frames: Iterable[tuple[int, av.VideoFrame]], shape: ClipShape, limits: DecodeLimits
) -> Iterator[TimedFrame]:
    first, fitter, before = None, None, None
    for index, frame in frames:
        # AVI has no presentation times, only a rate; what FFmpeg guesses is out of order with B-frames.
        pts = index if video.container_name == "avi" else frame.pts
        if pts is None:
            raise damage(video.source, "no_timestamps", f"frame {index} has no presentation time")
        if before is not None and pts < before:
            raise damage(video.source, "unordered_timestamps", f"frame {index} is dated before the frame before it")
        before = pts
        if first is None or fitter is None:
            first, fitter = pts, _fitter(video, frame, shape, limits)
        tick = video.tick_seconds
        yield TimedFrame(index, (pts - first) * tick, tick, _Pixels(frame, fitter))


def orientation_of(video: OpenVideo, frame: av.VideoFrame) -> Orientation:
    """How a frame has to be turned. Raises DecodeError for a slant."""
    try:
        return Orientation.of(frame)
    except ValueError as error:
        raise damage(video.source, "unsupported_rotation", str(error)) from error


def _fitter(video: OpenVideo, frame: av.VideoFrame, shape: ClipShape, limits: DecodeLimits) -> FrameFitter:
    orientation = orientation_of(video, frame)
    try:
        return FrameFitter(shape, frame.width, frame.height, video.pixel_aspect, orientation, limits.max_pixels)
    except ValueError as error:
        raise damage(video.source, "too_large", str(error)) from error


def _probe(video: OpenVideo, limits: DecodeLimits) -> MediaInfo:
    indexed = video.container_name == "mp4" and not is_fragmented(video.file)
    tally = _Tally(video)
    frame = None
    for packet in video.container.demux(video.stream):
        if frame is None:
            frame = next(iter(packet.decode()), None)
        if indexed and frame is not None:
            break
        tally.add(packet)
        if tally.num_frames > limits.max_frames:
            raise damage(video.source, "too_large", f"more than {limits.max_frames} frames")
    if frame is None:
        raise damage(video.source, "decode_error", "no frame can be decoded")
    if indexed:
        tally.num_frames = sum(not entry.is_discard for entry in video.stream.index_entries)
        return _media_info(video, frame, tally.num_frames, float((video.stream.duration or 0) * video.tick_seconds))
    return _media_info(video, frame, tally.num_frames, tally.seconds)


class _Tally:
    """Counts shown frames and their time span, packet by packet."""

    def __init__(self, video: OpenVideo) -> None:
        self.num_frames = 0
        self._video = video
        self._codec = codec_of(video)
        self._first: int | None = None
        self._last, self._last_duration = 0, 0

    def add(self, packet: av.Packet[VideoStream]) -> None:
        if not is_shown(packet, self._codec):
            return
        self.num_frames += 1
        if packet.pts is None:
            return
        self._first = packet.pts if self._first is None else min(self._first, packet.pts)
        if packet.pts >= self._last or self.num_frames == 1:
            self._last, self._last_duration = packet.pts, packet.duration or 0

    @property
    def seconds(self) -> float:
        """From the first frame's time to the end of the last one."""
        rate = self._video.stream.average_rate
        last = self._last_duration * self._video.tick_seconds or (1 / Fraction(rate) if rate else Fraction(0))
        return float((self._last - (self._first or 0)) * self._video.tick_seconds + last)


def _media_info(video: OpenVideo, frame: av.VideoFrame, num_frames: int, seconds: float) -> MediaInfo:
    orientation = orientation_of(video, frame)
    width, height = display_size(frame.width, frame.height, video.pixel_aspect, orientation)
    rate = video.stream.average_rate
    return MediaInfo(
        kind="video",
        container=video.container_name,
        codec=codec_of(video),
        width=width,
        height=height,
        rotation_degrees=orientation.clockwise_degrees,
        fps=float(rate) if rate else num_frames / seconds if seconds else 0.0,
        num_frames=num_frames,
        duration_seconds=seconds,
        pixel_format=frame.format.name,
        num_video_streams=video.num_video_streams,
        interlaced=bool(frame.interlaced_frame),
    )
