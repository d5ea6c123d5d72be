"""A video's container, opened so that FFmpeg can do no more than read it.

In:   a byte range that holds a video.
Out:  an OpenVideo: the container, the stream to show, what is known of the file's outline.
Cost: the headers; FFmpeg decodes a frame or more while it opens, unless an mp4's header is all that is wanted.
Errors: DecodeError `not_media`, `no_video_stream`, `too_large`, `unsupported_alpha`, `decode_error`; ShardError and
    UnitError from the storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from pipeline.decode.backend import damage
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.mp4 import is_indexed
from pipeline.decode.records import MediaSource
from pipeline.decode.source import open_source
from pipeline.decode.transport_stream import CheckedTransportStream, is_transport_stream

# FFmpeg's demuxers that may see the data, and what they are called in MediaInfo. No playlist, no text, no device: such
# formats name other files, which FFmpeg would open and show.
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
CONTAINERS = {
    _MP4: "mp4",
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
# Else FFmpeg decodes a frame or more while it opens the file, to learn what the decoder will tell anyway.
_HEADER_ONLY = {"codec_whitelist": "none", "probesize": "32"}


@dataclasses.dataclass(frozen=True)
class OpenVideo:
    """An open container, its chosen stream and where it came from. is_indexed: an mp4's header names all frames."""

    source: MediaSource
    file: IO[bytes]
    container: InputContainer
    stream: VideoStream
    num_video_streams: int
    is_indexed: bool
    transport_stream: CheckedTransportStream | None

    @property
    def container_name(self) -> str:
        """One of CONTAINERS' values."""
        return CONTAINERS[self.container.format.name]

    @functools.cached_property
    def tick_seconds(self) -> Fraction:
        """The unit of the stream's timestamps."""
        return self.stream.time_base or Fraction(1, 1_000_000)

    def packets(self) -> Iterator[av.Packet[VideoStream]]:
        """The stream's packets in the file's order, and the empty one that ends it."""
        # PyAV 18.1 may fail so after the last one, where FFmpeg met streams that the file did not begin with.
        with contextlib.suppress(IndexError):
            yield from self.container.demux(self.stream)

    @property
    def pixel_aspect(self) -> Fraction:
        """Width over height of a pixel; 1 when not told. After `header_only`, true once a frame is decoded."""
        aspect = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


@contextlib.contextmanager
def open_video(source: MediaSource, limits: DecodeLimits, *, header_only: bool = False) -> Iterator[OpenVideo]:
    """The container and FFmpeg's best video stream; FFmpeg's errors inside the block become DecodeError.

    header_only: where an mp4's header suffices to choose the stream, no more is read, and nothing decoded.

    Raises:
        DecodeError: not media, no video stream, too large, or whatever FFmpeg reports inside the block.
        ShardError, UnitError: as `open_source`.
    """
    with open_source(source) as file, _decode_errors(source, "decode_error"):
        indexed = is_indexed(file)
        checked = CheckedTransportStream(file) if is_transport_stream(file) else None
        with _decode_errors(source, "not_media"):
            container = _open_container(checked or file, header_only=header_only and indexed)
        with container:
            stream, count = _select(source, container, limits)
            yield OpenVideo(source, file, container, stream, count, indexed and container.format.name == _MP4, checked)


def _open_container(file: IO[bytes] | CheckedTransportStream, *, header_only: bool) -> InputContainer:
    if header_only:
        options = _OPTIONS | _HEADER_ONLY
        container = av.open(file, "r", format=_MP4, container_options=options, metadata_errors="replace")
        if len(shown := _shown_streams(container)) == 1 and _is_described(shown[0]):
            return container
        container.close()
        file.seek(0)
    return av.open(file, "r", container_options=_OPTIONS, metadata_errors="replace")


def _is_described(stream: VideoStream) -> bool:
    return stream.codec_context is not None and min(stream.width, stream.height) > 0


def _shown_streams(container: InputContainer) -> list[VideoStream]:
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


@contextlib.contextmanager
def _decode_errors(source: MediaSource, reason: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise  # FFmpeg's ENOMEM is both; it is this process's trouble
    except av.FFmpegError as error:
        raise damage(source, reason, error.strerror or type(error).__name__) from error


def _select(source: MediaSource, container: InputContainer, limits: DecodeLimits) -> tuple[VideoStream, int]:
    """The stream, and how many there are."""
    shown = _shown_streams(container)
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
    return stream, len(shown)
