"""Every kind of damaged or foreign input that a back end is asked about.

In:   nothing; sound files are generated, then cut, scarred or patched.
Out:  BROKEN: inputs that are to end as errors, or as exact frames, but never as anything else.
Cost: 5 to 50 ms per case.
Errors: whatever an encoder that this FFmpeg lacks raises.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.decode.records import MediaKind
from tests.clips import audio_only, numbered_image, numbered_video

NUM_FRAMES = 30
_MKV, _MOV, _WEBM, _TS = ({"container": name} for name in ("matroska", "mov", "webm", "mpegts"))


@dataclasses.dataclass(frozen=True)
class BrokenCase:
    """Damaged or foreign inputs of one sort; whatever they still show is numbered from 0 as in a sound file."""

    container: str
    codec: str
    feature: str
    make: Callable[[], list[bytes]]
    kind: MediaKind = "video"

    @property
    def name(self) -> str:
        """Unique among cases."""
        return f"{self.container} {self.codec} {self.feature}"


def _cuts(video: bytes, count: int = 12) -> list[bytes]:
    """The file ended at `count` places, the first after its first bytes, the last shortly before its end."""
    return [video[: len(video) * (i + 1) // (count + 1)] for i in range(count)]


def _scars(video: bytes, count: int = 12) -> list[bytes]:
    """The file with one to 40 bytes replaced at `count` places."""
    rng, scarred = np.random.default_rng(len(video)), []
    for i in range(count):
        start, length = len(video) * (2 * i + 1) // (2 * count), int(rng.integers(1, 41))
        scarred.append(video[:start] + rng.bytes(length) + video[start + length :])
    return scarred


def patched(video: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """The file with `value` at `offset` bytes behind the first appearance of `box`."""
    start = video.index(box) + len(box) + offset
    return video[:start] + value + video[start + len(value) :]


def _absurd() -> list[bytes]:
    mp4, mkv = numbered_video(NUM_FRAMES), numbered_video(NUM_FRAMES, container="matroska")
    huge = b"\xff\xff\xff\xf0"
    return [
        patched(mp4, b"avc1", 24, b"\xff\xff\xff\xff"),  # width and height of the sample entry
        patched(mp4, b"mdhd", 16, huge),  # duration of the media
        patched(mp4, b"mvhd", 16, huge),
        patched(mp4, b"mdhd", 12, b"\x00\x00\x00\x00"),  # time scale
        patched(mp4, b"stts", 12, b"\x7f\xff\xff\xff"),  # duration of a frame
        patched(mp4, b"stts", 8, b"\x7f\xff\xff\xff"),  # number of frames
        patched(mp4, b"stsz", 8, huge),
        patched(mkv, b"\x44\x89", 1, b"\x7f\xef\xff\xff\xff\xff\xff\xff"),  # Duration
        patched(mkv, b"\xb0\x81", 0, b"\x00"),  # PixelWidth
    ]


_DAMAGED: dict[tuple[str, str], dict[str, Any]] = {
    ("mp4", "h264"): {"container_options": {"movflags": "faststart"}},
    ("mkv", "h264"): _MKV,
    ("mpegts", "h264"): _TS,
    ("avi", "h264"): {"container": "avi"},
    ("flv", "h264"): {"container": "flv"},
    ("mp4", "hevc"): {"codec": "libx265", "container_options": {"movflags": "faststart"}},
    ("mkv", "hevc"): {"codec": "libx265"} | _MKV,
    ("mp4", "vp9"): {"codec": "libvpx-vp9"},
    ("mkv", "vp9"): {"codec": "libvpx-vp9"} | _WEBM,
    ("mkv", "vp8"): {"codec": "libvpx"} | _WEBM,
    ("mp4", "av1"): {"codec": "libsvtav1"},
    ("mkv", "av1"): {"codec": "libsvtav1"} | _MKV,
    ("mp4", "mpeg4"): {"codec": "mpeg4"},
    ("mp4", "mjpeg"): {"codec": "mjpeg", "pixel_format": "yuvj420p"} | _MOV,
    ("avi", "mpeg4"): {"codec": "mpeg4", "container": "avi"},
    ("webp", "webp"): {"codec": "libwebp_anim", "container": "webp", "pixel_format": "bgra"},
    ("gif", "gif"): {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}


def _damaged() -> list[BrokenCase]:
    def make(how: dict[str, Any], break_up: Callable[[bytes], list[bytes]]) -> list[bytes]:
        return break_up(numbered_video(NUM_FRAMES, **how))

    return [
        BrokenCase(container, codec, feature, functools.partial(make, how, break_up))
        for (container, codec), how in _DAMAGED.items()
        for feature, break_up in (("cut at 12 places", _cuts), ("bytes replaced at 12 places", _scars))
    ]


def _foreign() -> list[BrokenCase]:
    kinds: dict[str, Callable[[], list[bytes]]] = {
        "empty": lambda: [b""],
        "random bytes": lambda: [np.random.default_rng(seed).bytes(20_000) for seed in range(3)],
        "text": lambda: [b"a caption, by mistake\n" * 50, b"<!doctype html><html><body>404</body></html>"],
        "header only": lambda: [numbered_video(5)[:40], numbered_video(5, container="matroska")[:300]],
        "sound only": lambda: [audio_only()],
        "a picture by a video's name": lambda: [numbered_image(format="png"), numbered_image(format="jpeg")],
        "absurd sizes and durations": _absurd,
    }
    videos = [BrokenCase("any", "any", feature, make) for feature, make in kinds.items()]
    images: dict[str, Callable[[], list[bytes]]] = {
        "empty": lambda: [b""],
        "random bytes": lambda: [np.random.default_rng(0).bytes(20_000)],
        "a video by a picture's name": lambda: [numbered_video(3)],
        "HEIC": lambda: [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)],
        "cut at 12 places": lambda: [cut for name in ("png", "jpeg", "webp") for cut in _cuts(_still(name))],
        "bytes replaced at 12 places": lambda: [cut for name in ("png", "webp") for cut in _scars(_still(name))],
    }
    return videos + [BrokenCase("image", "any", feature, make, "image") for feature, make in images.items()]


def _still(format_name: str) -> bytes:
    return numbered_image(0, format=format_name)


BROKEN: Sequence[BrokenCase] = (*_damaged(), *_foreign())
