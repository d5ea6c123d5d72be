"""Videos for benchmarks: moving texture in any codec and size, and long videos that take seconds to make.

In:   codec, height, number of frames; a directory that keeps them.
Out:  paths of mp4 files, made once.
Cost: some milliseconds per encoded frame; a long video repeats the packets of a short one.
Errors: av.FFmpegError when this FFmpeg has no such encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from pipeline.synthetic import keeping_priority

FPS = 25
ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"}),
    "av1": ("libsvtav1", {"preset": "12"}),
    "mpeg4": ("mpeg4", {"bf": "2"}),
}
_LOOP_FRAMES = 250


def texture_video(directory: Path, codec: str, height: int, num_frames: int, *, detail: float = 1.0) -> Path:
    """A 16:9 video of a drifting texture with a key frame every 2 seconds; detail 0 is a plain ramp."""
    path = directory / f"{codec}_{height}p_{num_frames}_{detail}.mp4"
    if not path.exists():
        scratch = path.with_suffix(".part")
        _encode(scratch, codec, height, num_frames, detail)
        scratch.rename(path)
    return path


def long_video(directory: Path, height: int, minutes: float) -> Path:
    """An H.264 video of the wanted length: ten seconds of low detail, over and over."""
    path = directory / f"long_{height}p_{minutes:g}min.mp4"
    if not path.exists():
        loop = texture_video(directory, "h264", height, _LOOP_FRAMES, detail=0.1)
        scratch = path.with_suffix(".part")
        _repeat(loop, scratch, round(minutes * 60 * FPS / _LOOP_FRAMES))
        scratch.rename(path)
    return path


@keeping_priority()
def _encode(path: Path, codec: str, height: int, num_frames: int, detail: float) -> None:
    os.environ.setdefault("SVT_LOG", "0")  # its encoder talks on stderr
    name, options = ENCODERS[codec]
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream(name, rate=FPS, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = _even(height * 16 // 9), height, "yuv420p"
        stream.codec_context.gop_size = 2 * FPS
        stream.codec_context.thread_count = os.cpu_count() or 1
        for picture in _drifting_texture(stream.width, height, num_frames, detail):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray").reformat(format="yuv420p")))
        output.mux(stream.encode(None))


def _even(number: int) -> int:
    return number + number % 2


def _drifting_texture(width: int, height: int, num_frames: int, detail: float) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 60 * detail, (height // 4 + 1, width // 4 + 1)).repeat(4, 0).repeat(4, 1)[:height, :width]
    ramp = np.linspace(60, 180, width)[None]
    picture = np.clip(ramp + noise, 0, 255).astype(np.uint8)
    for number in range(num_frames):
        yield np.roll(picture, (number, 2 * number), (0, 1))


def _repeat(loop: Path, path: Path, times: int) -> None:
    with av.open(str(loop)) as source, av.open(str(path), "w", format="mp4") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        length = len(packets) * (packets[0].duration or 0)
        stamps = [(packet.pts or 0, packet.dts or 0) for packet in packets]
        for turn in range(times):
            for packet, (pts, dts) in zip(packets, stamps, strict=True):
                packet.pts, packet.dts, packet.stream = pts + turn * length, dts + turn * length, copy
                output.mux(packet)
