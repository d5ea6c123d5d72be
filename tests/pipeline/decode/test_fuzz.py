"""Mutated files: no hang, no lost process, and no frame count or time stamps that cannot be.

FFmpeg conceals some damage without a word: a bit flipped inside a slice that still parses, a hole that takes the header
of a fragment away, a splice that makes another valid file. Frames that read as another number than their own, or as
none, are counted, printed and bounded.
"""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest

from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, Window
from tests.clips import numbered_image, numbered_video, read_number, stored

LIMITS = DecodeLimits(timeout_seconds=10, seconds_per_frame=0.05, max_pixels=2048 * 2048, memory_bytes=1 << 30)
NUM_FRAMES = 60
WINDOWS = ((2, 5), (20, 4), (50, 6))
FAST_START = {"movflags": "faststart"}

FORMATS = {
    "h264 mp4": lambda: numbered_video(NUM_FRAMES, container_options=FAST_START),
    "h264 fragmented": lambda: numbered_video(NUM_FRAMES, container_options={"movflags": "frag_keyframe"}),
    "hevc mp4": lambda: numbered_video(NUM_FRAMES, codec="libx265"),
    "vp9 webm": lambda: numbered_video(NUM_FRAMES, codec="libvpx-vp9", container="webm"),
    "vp8 webm": lambda: numbered_video(NUM_FRAMES, codec="libvpx", container="webm"),
    "av1 mkv": lambda: numbered_video(NUM_FRAMES, codec="libsvtav1", container="matroska"),
    "h264 mpegts": lambda: numbered_video(NUM_FRAMES, container="mpegts"),
    "mpeg4 avi": lambda: numbered_video(NUM_FRAMES, codec="mpeg4", container="avi"),
    "gif": lambda: numbered_video(NUM_FRAMES, codec="gif", container="gif", pixel_format="rgb8"),
    "png": numbered_image,
    "jpeg": lambda: numbered_image(format="jpeg"),
    "webp": lambda: numbered_image(format="webp"),
}


def flip_bits(data, rng):
    for position in rng.integers(0, len(data), rng.integers(1, 9)):
        data[position] ^= 1 << rng.integers(8)


def zero_a_hole(data, rng):
    start, size = rng.integers(len(data)), rng.integers(1, 400)
    data[start : start + size] = bytes(len(data[start : start + size]))


def cut_a_hole(data, rng):
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 400)]


def truncate(data, rng):
    del data[rng.integers(1, len(data)) :]


def splice(data, rng):
    start, other, size = rng.integers(len(data)), rng.integers(len(data)), rng.integers(1, 1000)
    data[start:start] = data[other : other + size]


def extreme_field(data, rng):
    """A 2 or 4 byte field of the first or last kilobyte, where headers are, becomes extreme."""
    start = int(rng.integers(min(1024, len(data))))
    start = start if rng.integers(2) else len(data) - start - 4
    extreme = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00", b"\xff\xff"]
    value = extreme[rng.integers(len(extreme))]
    data[max(0, start) : max(0, start) + len(value)] = value


MUTATIONS = (flip_bits, zero_a_hole, cut_a_hole, truncate, splice, extreme_field)


def fuzz(num_files, tmp_path, seed):
    """Decode mutated files in one warm process. Returns tallies and the slowest time."""
    rng = np.random.default_rng(seed)
    originals = {name: make() for name, make in FORMATS.items()}
    outcomes_seen, frames_seen, wrong = collections.Counter(), collections.Counter(), collections.Counter()
    path = tmp_path / "fuzz"
    path.mkdir()
    slowest = 0.0
    with DecodeProcess(LIMITS) as process:
        for number in range(num_files):
            name = list(FORMATS)[number % len(FORMATS)]
            mutation = MUTATIONS[number // len(FORMATS) % len(MUTATIONS)]
            data = bytearray(originals[name])
            mutation(data, rng)
            is_image = name in ("png", "jpeg", "webp")
            source = stored(path, bytes(data), "image" if is_image else "video", f"{name} {mutation.__name__} {number}")
            windows = tuple(Window(*window) for window in (((0, 1),) if is_image else WINDOWS))
            began = time.monotonic()
            outcomes = process.decode(DecodeRequest(source, Grid(), windows, ClipShape(96, 96), "pyav"))
            slowest = max(slowest, time.monotonic() - began)
            assert len(outcomes) == len(windows)
            for window, outcome in zip(windows, outcomes, strict=True):
                if not isinstance(outcome, DecodedClip):
                    outcomes_seen[outcome.reason] += 1
                    continue
                outcomes_seen["decoded"] += 1
                assert outcome.frames.shape == (window.num_frames, 96, 96, 3)
                assert (np.diff(outcome.pts_seconds) >= 0).all()
                for place, frame in enumerate(outcome.frames):
                    expected = 5 if is_image else window.start + place
                    try:
                        verdict = "right" if read_number(frame) == expected else "wrong"
                    except ValueError:
                        verdict = "unreadable"
                    frames_seen[verdict] += 1
                    wrong[name, mutation.__name__] += verdict == "wrong"
            (path / "0.bin").unlink()
    print(  # noqa: T201 (with -s, what the bounds are made from)
        f"{num_files} files, slowest {slowest:.1f} s", dict(outcomes_seen), dict(frames_seen), wrong.most_common(20)
    )
    return outcomes_seen, frames_seen, wrong, slowest


def check(num_files, tmp_path, seed):
    outcomes, frames, wrong, slowest = fuzz(num_files, tmp_path, seed)
    assert slowest < 2 * 30
    assert outcomes["decoded"] > num_files / 2
    assert outcomes["crash"] + outcomes["timeout"] <= num_files / 100
    total = sum(frames.values())
    assert sum(wrong.values()) < 0.02 * total
    assert frames["unreadable"] < 0.04 * total


def test_mutated_files(tmp_path):
    check(300, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_mutated_files(tmp_path):
    check(5000, tmp_path, 1)
