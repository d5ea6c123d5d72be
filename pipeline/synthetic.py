"""WebDataset shards of synthetic videos and images, for demos, for training small autoencoders, and for tests.

In:   a directory, how many shards and samples, a seed, the share of samples that are broken on purpose.
Out:  shard-00000.tar, ...: real files of many codecs, containers, sizes, lengths and frame rates, each with a caption
      (.txt) and metadata (.json); and a SyntheticSet that names the broken samples. The same arguments give the same
      bytes on one machine and one version of PyAV.
Cost: about 40 ms and 60 kB a sample on one core; memory for one sample.
Errors: ValueError for counts or shares that cannot be; OSError when the directory cannot be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from pipeline.synthetic_scenes import SCENE_KINDS, Scene, make_scene

LENGTHS = (9, 17, 25, 33, 49, 65, 90)
BROKEN_KINDS = ("truncated", "random_bytes", "no_media", "audio_only", "header_only")

# cpu-independent: without it x264 picks other bits from run to run, even with one thread.
_H264 = {"preset": "veryfast", "crf": "18", "bf": "2", "g": "24", "x264-params": "cpu-independent=1"}
_HEVC = {"preset": "ultrafast", "crf": "20", "g": "24", "x265-params": "log-level=none:pools=none:frame-threads=1"}
_VP9 = {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "8"}
_QUANTISER_3 = {"flags": "+qscale", "global_quality": "354"}  # in FFmpeg's lambda units: 3 x 118
_AV1 = {"preset": "11", "crf": "28", "svtav1-params": "lp=1"}


@dataclasses.dataclass(frozen=True)
class MediaFormat:
    """How one sample is stored. Height and width are as shown, after `rotation_degrees` clockwise.

    `codec` is a PyAV encoder, or for an image a Pillow format. `tick_steps` is the time between frames, repeated in
    turn, in ticks of 1 / fps: (1,) is a constant rate. A format without fps is a still image.
    """

    extension: str
    codec: str
    height: int
    width: int
    fps: int = 0
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    pixel_format: str = "yuv420p"
    rotation_degrees: int = 0
    tick_steps: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.rotation_degrees % 90 or min(self.tick_steps) < 1:
            raise ValueError(
                "a format has a rotation in quarter turns and frames after each other, "
                f"got {self.rotation_degrees=} {self.tick_steps=}"
            )


FORMATS = (
    MediaFormat("mp4", "libx264", 144, 256, 24, _H264),
    MediaFormat("mkv", "libx264", 120, 160, 25, _H264),
    MediaFormat("mp4", "libx265", 108, 192, 24, _HEVC),
    MediaFormat("jpg", "jpeg", 128, 192),
    MediaFormat("webm", "libvpx-vp9", 97, 161, 30, _VP9),
    MediaFormat("avi", "mpeg4", 120, 160, 12, _QUANTISER_3),
    MediaFormat("mp4", "libx264", 160, 96, 30, _H264),
    MediaFormat("mov", "mjpeg", 96, 128, 25, _QUANTISER_3, "yuvj420p"),
    MediaFormat("mp4", "libx264", 108, 192, 24, _H264, "yuv420p10le"),
    MediaFormat("png", "png", 101, 151),
    MediaFormat("mp4", "libsvtav1", 144, 256, 24, _AV1),
    MediaFormat("mp4", "libx264", 192, 108, 25, _H264, rotation_degrees=90),
    MediaFormat("mp4", "libx264", 128, 128, 30, _H264, tick_steps=(1, 1, 2, 1, 3)),
    MediaFormat("webp", "webp", 96, 128),
    MediaFormat("webm", "libvpx-vp9", 128, 128, 24, _VP9),
)


@dataclasses.dataclass(frozen=True)
class SyntheticSet:
    """The shards that were written; `broken` maps a sample's key to one of BROKEN_KINDS."""

    paths: tuple[Path, ...]
    num_samples: int
    broken: dict[str, str]


def write_shards(
    directory: Path, num_shards: int, samples_per_shard: int, seed: int = 0, broken_share: float = 0.06
) -> SyntheticSet:
    """Write `num_shards` tars of `samples_per_shard` samples into `directory`, which is made when it is not there.

    Broken samples lie at even distances and take turns in BROKEN_KINDS.

    Raises:
        ValueError: a count below 1 or a share outside [0, 1].
        OSError: the directory cannot be written.
    """
    if num_shards < 1 or samples_per_shard < 1 or not 0 <= broken_share <= 1:
        raise ValueError(
            "synthetic shards need at least one shard and sample, and a broken share in [0, 1], "
            f"got {num_shards=} {samples_per_shard=} {broken_share=}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    num_samples = num_shards * samples_per_shard
    broken_at = _broken_positions(num_samples, broken_share)
    broken: dict[str, str] = {}
    paths = []
    for shard in range(num_shards):
        paths.append(directory / f"shard-{shard:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * samples_per_shard, (shard + 1) * samples_per_shard):
                key, members = make_sample(index, seed, broken_at.get(index))
                if index in broken_at:
                    broken[key] = broken_at[index]
                for extension, content in members.items():
                    _add_member(tar, f"{key}.{extension}", content)
    return SyntheticSet(tuple(paths), num_samples, broken)


def make_sample(index: int, seed: int, broken_kind: str | None = None) -> tuple[str, dict[str, bytes]]:
    """Sample `index` of a seed: its key and its members, extension -> bytes."""
    rng = np.random.default_rng([seed, index])
    # One step further every round: every format meets every scene, and even spacing of the broken hides none.
    media = FORMATS[(index + index // len(FORMATS)) % len(FORMATS)] if broken_kind is None else FORMATS[0]
    scene_kind = SCENE_KINDS[index % len(SCENE_KINDS)]
    scene = make_scene(scene_kind, int(rng.integers(2**31)), media.height, media.width)
    num_frames = _choose_length(rng, media) if broken_kind is None else max(LENGTHS)
    metadata = _describe(scene, media, num_frames) | {"aesthetic": round(float(rng.uniform(3, 8)), 2)}
    members = {"json": json.dumps(metadata).encode(), "txt": scene.caption.encode()}
    if broken_kind is None:
        content: bytes | None = encode_media(scene, media, num_frames)
    else:
        content = _broken_media(broken_kind, encode_media(scene, media, num_frames), rng)
    if content is not None:
        members = {media.extension: content} | members
    return f"{index:06d}_{scene_kind}", members


def _broken_positions(num_samples: int, broken_share: float) -> dict[int, str]:
    count = round(num_samples * broken_share)
    return {int((i + 0.5) * num_samples / count): BROKEN_KINDS[i % len(BROKEN_KINDS)] for i in range(count)}


def _choose_length(rng: np.random.Generator, media: MediaFormat) -> int:
    return int(rng.choice(LENGTHS)) if media.fps else 1


def _describe(scene: Scene, media: MediaFormat, num_frames: int) -> dict[str, Any]:
    return {
        "scene": scene.kind,
        "codec": media.codec,
        "width": media.width,
        "height": media.height,
        "num_frames": num_frames,
        "fps": media.fps,
        "variable_frame_rate": len(set(media.tick_steps)) > 1,
        "rotation_degrees": media.rotation_degrees,
    }


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encode_media(scene: Scene, media: MediaFormat, num_frames: int) -> bytes:
    """The scene's first `num_frames` frames as a file of that format; an image shows it after one second."""
    if media.fps:
        return _encode_video(scene, media, num_frames)
    buffer = io.BytesIO()
    Image.fromarray(scene.paint(1.0)).save(buffer, media.codec, quality=92)
    return buffer.getvalue()


@contextlib.contextmanager
def keeping_priority() -> Iterator[None]:
    """Round an encoder of videos: as root, SVT-AV1 gives the thread that calls it real time, and all that it starts."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@keeping_priority()
def _encode_video(scene: Scene, media: MediaFormat, num_frames: int) -> bytes:
    if media.codec == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # errors only; the library has no other switch for its banner
    buffer = io.BytesIO()
    # Room for the index at the front, as files made for the web have it; a cut file then still opens.
    index_room = {"moov_size": str(4000 + 100 * num_frames)} if media.extension == "mp4" else {}
    container_name = {"mkv": "matroska"}.get(media.extension, media.extension)
    quarter_turns = media.rotation_degrees // 90
    with av.open(buffer, "w", format=container_name, options={"fflags": "+bitexact"} | index_room) as container:
        stream = cast(VideoStream, container.add_stream(media.codec, rate=media.fps, options=dict(media.options)))
        shown = (media.height, media.width)
        stream.height, stream.width = reversed(shown) if quarter_turns % 2 else shown
        stream.pix_fmt = media.pixel_format
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, media.fps)
        if quarter_turns:
            stream.set_display_rotation(-media.rotation_degrees)
        for tick in _ticks(media, num_frames):
            pixels = np.rot90(scene.paint(tick / media.fps), quarter_turns)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = tick, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _ticks(media: MediaFormat, num_frames: int) -> list[int]:
    steps = np.resize(media.tick_steps, num_frames)
    return [int(tick) for tick in np.cumsum(steps) - steps]


def _broken_media(kind: str, whole: bytes, rng: np.random.Generator) -> bytes | None:
    """What is left of a whole mp4; None when the sample is to have no media at all."""
    if kind == "random_bytes":
        return rng.bytes(5000)
    if kind == "no_media":
        return None
    if kind == "audio_only":
        return _encode_tone()
    frames_at = whole.index(b"mdat") + len(b"mdat")
    return whole[:frames_at] if kind == "header_only" else whole[: (frames_at + len(whole)) // 2]


def _encode_tone() -> bytes:
    """One second of 440 Hz as an mp4 with sound and no picture."""
    samples = 0.3 * np.sin(2 * np.pi * 440 / 16000 * np.arange(16000))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
