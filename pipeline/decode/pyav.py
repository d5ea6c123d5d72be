"""The PyAV back end: FFmpeg's demuxers and decoders, one thread; all frames in sequence, or those near what is wanted.

In:   a byte range that holds a video.
Out:  MediaInfo; frames in presentation order.
Cost: `probe` of an mp4 or mov reads headers and one frame; of anything else all packets, of which it decodes one frame.
    Decoding holds the decoder's reference frames; FFmpeg's index of an mp4 takes up to 100 bytes per frame, 9 MB for
    an hour at 25 fps.
Errors: DecodeError `not_media`, `no_video_stream`, `too_large`, `unsupported_alpha`, `unsupported_rotation`,
    `decode_error`, `corrupt_frame`, `lost_frame`, `lost_packets`, `size_change`, `no_timestamps`,
    `unordered_timestamps`; ShardError and UnitError from the storage.

Packets are counted as frames, except VP8's hidden ones. Two containers' habits are beyond that and make the count too
high: interlaced H.264 with one field per packet, and MPEG-4 in AVI with packed B-frames. There the last windows end as
`short_video`; no window gets a wrong frame. A stream that starts between key frames (cut MPEG-TS) does the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.container import OpenVideo, open_video
from pipeline.decode.fit import FrameFitter, Orientation, display_size, fitter_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.packets import demuxed, frames_of
from pipeline.decode.proof import MissingPictureError, NotExactError, codec_of, is_shown
from pipeline.decode.records import ClipShape, Grid, MediaInfo, MediaSource
from pipeline.decode.seek import Target, targets
from pipeline.decode.seek_pyav import SEEKABLE_CONTAINERS, SeekingWalk


class PyAVBackend:
    """See the module's docstring."""

    name = "pyav"

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        with open_video(source, limits, header_only=True) as video:
            if not video.is_indexed:
                return _probe(video, limits)
            if frame := _first_decoded(video):
                return _indexed_info(video, frame)
        with open_video(source, limits) as video:
            return _probe(video, limits)

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        with open_video(source, limits) as video:
            yield from _timed(video, enumerate(checked_frames(video)), shape, limits)

    def wanted_frames(
        self, source: MediaSource, shape: ClipShape, limits: DecodeLimits, grid: Grid, positions: Sequence[range]
    ) -> Iterator[TimedFrame]:
        done = -1
        proven = functools.partial(self._proven_frames, source, shape, limits, grid, positions)
        attempts = [proven(leaves_out=True), proven(leaves_out=False), self.frames(source, shape, limits)]
        while attempts:
            try:
                for frame in attempts.pop(0):
                    if frame.index > done:
                        done = frame.index
                        yield frame
                attempts.clear()
            except MissingPictureError:
                continue
            except NotExactError:
                del attempts[:-1]

    def _proven_frames(
        self,
        source: MediaSource,
        shape: ClipShape,
        limits: DecodeLimits,
        grid: Grid,
        positions: Sequence[range],
        *,
        leaves_out: bool,
    ) -> Iterator[TimedFrame]:
        last = Target.at(grid, positions[-1][-1])
        with open_video(source, limits, header_only=True) as video:
            if video.container_name not in SEEKABLE_CONTAINERS:
                raise NotExactError
            walk = SeekingWalk(video, last, lambda: open_video(source, limits), leaves_out=leaves_out)
            frames = _timed(video, _checked(video, walk), shape, limits, walk.first_pts)
            yield from _up_to_each(targets(grid, positions), frames, walk)
            yield from frames


def _up_to_each(wanted: Iterable[Target], frames: Iterator[TimedFrame], walk: SeekingWalk) -> Iterator[TimedFrame]:
    """The frames of a walk, which is brought near each target in turn."""
    frame = None
    if walk.first_pts is None:
        frame = next(frames, None)
        if frame is None:
            return
        yield frame
    for target in wanted:
        if frame is None or not target.is_done(frame):
            walk.approach(target)
        while frame is None or not target.is_done(frame):
            frame = next(frames, None)
            if frame is None:
                return
            yield frame


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """A frame's conversion, put off until it is known to be wanted."""

    frame: av.VideoFrame
    fitter: FrameFitter

    def __call__(self) -> np.ndarray:
        return self.fitter(self.frame)


def checked_frames(video: OpenVideo) -> Iterator[av.VideoFrame]:
    """All shown frames. Raises DecodeError for one that is damaged or has another size than the first."""
    for _, frame in _checked(video, enumerate(_all_frames(video))):
        yield frame


def _all_frames(video: OpenVideo) -> Iterator[av.VideoFrame]:
    began = False
    for packet in demuxed(video):
        for frame in frames_of(video, packet, began=began):
            began = True
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
    video: OpenVideo,
    frames: Iterable[tuple[int, av.VideoFrame]],
    shape: ClipShape,
    limits: DecodeLimits,
    first_pts: int | None = None,
) -> Iterator[TimedFrame]:
    """With their times since `first_pts`; by default since the first of them, which then is the video's first."""
    first, fitter, before = first_pts, None, None
    for index, frame in frames:
        # AVI has no presentation times, only a rate; what FFmpeg guesses is out of order with B-frames.
        pts = index if video.container_name == "avi" else frame.pts
        if pts is None:
            raise damage(video.source, "no_timestamps", f"frame {index} has no presentation time")
        if before is not None and pts < before:
            raise damage(video.source, "unordered_timestamps", f"frame {index} is dated before the frame before it")
        before = pts
        first = pts if first is None else first
        fitter = fitter or _fitter(video, frame, shape, limits)
        tick = video.tick_seconds
        yield TimedFrame(index, (pts - first) * tick, tick, _Pixels(frame, fitter))


def orientation_of(video: OpenVideo, frame: av.VideoFrame) -> Orientation:
    """How a frame has to be turned. Raises DecodeError for a slant."""
    try:
        return Orientation.of(frame)
    except ValueError as error:
        raise damage(video.source, "unsupported_rotation", str(error)) from error


def _fitter(video: OpenVideo, frame: av.VideoFrame, shape: ClipShape, limits: DecodeLimits) -> FrameFitter:
    size, orientation = (frame.width, frame.height), orientation_of(video, frame)
    return fitter_of(video.source, shape, size, video.pixel_aspect, orientation, limits)


def _first_decoded(video: OpenVideo) -> av.VideoFrame | None:
    """What the first packet shows, if the decoder needs no other: it is not waited for frames to be put before it."""
    decoder = video.stream.codec_context
    decoder.options = {"skip_loop_filter": "all"}  # its pixels do not matter
    packet = next(video.packets())
    frames = packet.decode() or (decoder.decode(None) if packet.size else [])
    return frames[0] if frames else None


def _indexed_info(video: OpenVideo, frame: av.VideoFrame) -> MediaInfo:
    num_frames = sum(not entry.is_discard for entry in video.stream.index_entries)
    return _media_info(video, frame, num_frames, float((video.stream.duration or 0) * video.tick_seconds))


def _probe(video: OpenVideo, limits: DecodeLimits) -> MediaInfo:
    tally = _Tally(video)
    frame = None
    for packet in video.packets():
        if frame is None:
            frame = next(iter(packet.decode()), None)
        if video.is_indexed and frame is not None:
            break
        tally.add(packet)
        if tally.num_frames > limits.max_frames:
            raise damage(video.source, "too_large", f"more than {limits.max_frames} frames")
    if frame is None:
        raise damage(video.source, "decode_error", "no frame can be decoded")
    if video.is_indexed:
        return _indexed_info(video, frame)
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
