"""Long windows in pieces: the same frames, in memory that does not grow."""

from __future__ import annotations

import gc
import re
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jobs.bench.videos import FPS, long_video
from pipeline.decode.backend import decode_pieces, decode_windows, pieces_of
from pipeline.decode.frame_memory import FrameMemory
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.errors import DecodeError
from tests.clips import numbered_video, read_number, stored

LIMITS = DecodeLimits()
MISBEHAVING = "tests.pipeline.decode.misbehaving_child"
IMPATIENT = DecodeLimits(timeout_seconds=0.8, seconds_per_frame=0.001)


def request_of(source, start, num_frames, grid=Grid(), side=48):  # noqa: B008 (frozen)
    return DecodeRequest(source, grid, (Window(start, num_frames),), ClipShape(side, side))


@pytest.fixture(scope="module")
def video():
    return numbered_video(90)


@pytest.fixture
def source(video, tmp_path):
    return stored(tmp_path, video)


@pytest.fixture(scope="module")
def process():
    with DecodeProcess(LIMITS) as process:
        yield process


def take(pieces, numbers):
    for piece in pieces:
        numbers += [read_number(frame) for frame in piece.frames]


def test_pieces_cover_a_window():
    pieces = list(pieces_of(Window(5, 10), 4))
    assert [(piece.start, piece.num_frames) for piece in pieces] == [(5, 4), (9, 4), (13, 2)]
    assert list(pieces_of(Window(5, 4), 4)) == [Window(5, 4)]


@pytest.mark.parametrize("piece_frames", [1, 7, 64, 200])
@pytest.mark.parametrize("grid", [Grid(), Grid(frame_step=2), Grid(Fraction(90))])
def test_pieces_together_are_the_window(grid, piece_frames, source, process):
    request = request_of(source, 3, 40, grid)
    (whole,) = decode_windows(request, LIMITS)
    for pieces in (
        list(decode_pieces(request, LIMITS, piece_frames)),
        list(process.stream(request, piece_frames)),
    ):
        assert [len(piece.frames) for piece in pieces] == [p.num_frames for p in pieces_of(Window(0, 40), piece_frames)]
        assert np.array_equal(np.concatenate([piece.frames for piece in pieces]), whole.frames)
        assert np.array_equal(np.concatenate([piece.pts_seconds for piece in pieces]), whole.pts_seconds)


def test_pieces_before_the_end_come_out_and_then_the_error(source, process):
    for pieces in (
        decode_pieces(request_of(source, 70, 40), LIMITS, 8),
        process.stream(request_of(source, 70, 40), 8),
    ):
        numbers = []
        with pytest.raises(DecodeError, match="past_end"):
            take(pieces, numbers)
        assert numbers == list(range(70, 86))


def test_a_stream_shares_its_process_and_can_be_dropped(source, process):
    stream, other = (process.stream(request_of(source, start, 30), 6) for start in (0, 40))
    numbers = [[], []]
    for _ in range(3):
        for taken, pieces in zip(numbers, (stream, other), strict=True):
            taken += [read_number(frame) for frame in next(pieces).frames]
        (clip,) = process.decode(request_of(source, 80, 2))
        assert read_number(clip.frames[0]) == 80
    assert numbers == [list(range(18)), list(range(40, 58))]
    stream.close()
    assert len(list(process.stream(request_of(source, 0, 12), 6))) == 2


def test_a_stream_keeps_no_piece_that_was_taken(source):
    with ProcessPool(1, LIMITS) as pool:
        stream = pool.stream(request_of(source, 0, 24), 8)
        taken = weakref.ref(next(stream).frames)
        assert taken() is None
        stream.close()


def test_one_window_makes_a_stream(source):
    request = DecodeRequest(source, Grid(), (Window(0, 1), Window(5, 1)), ClipShape(32, 32))
    with pytest.raises(ValueError, match="too many"):
        next(decode_pieces(request, LIMITS, 4))


@pytest.mark.parametrize(("behaviour", "reason"), [("crash", "crash"), ("hang", "timeout")])
def test_a_piece_that_kills_ends_the_stream_and_nothing_before_it(behaviour, reason, video, tmp_path):
    source = stored(tmp_path, video, key=f"{behaviour}@20")
    numbers = []
    with DecodeProcess(IMPATIENT, MISBEHAVING) as process, pytest.raises(DecodeError, match=reason):
        take(process.stream(request_of(source, 0, 40), 8), numbers)
    assert numbers == list(range(16))


def test_a_stream_outlives_the_change_of_its_process(source):
    with ProcessPool(1, DecodeLimits(clips_per_process=2)) as pool:
        pieces = list(pool.stream(request_of(source, 0, 40), 8))
    assert [read_number(piece.frames[0]) for piece in pieces] == [0, 8, 16, 24, 32]


def test_frame_memory_is_used_again_when_the_last_view_is_gone():
    memory, shape = FrameMemory(keep_bytes=1 << 20), (4, 64, 64, 3)
    first = memory.empty(shape)
    first[...] = 7
    view = first[1:2, ::2]
    del first
    assert memory.free_bytes == 0
    other = memory.empty(shape)
    other[...] = 8
    assert (view == 7).all()
    del view
    gc.collect()
    assert memory.free_bytes >= other.nbytes
    again = memory.empty(shape)
    again[...] = 9
    assert memory.free_bytes == 0
    assert (other == 8).all()


def test_frame_memory_keeps_no_more_than_told():
    memory = FrameMemory(keep_bytes=100_000)
    clips = [memory.empty((1, 100, 100, 3)) for _ in range(10)]
    del clips
    assert 0 < memory.free_bytes <= 100_000
    large = [memory.empty((1, 400, 100, 3)) for _ in range(2)]
    large.clear()
    assert 120_000 <= memory.free_bytes < 240_000  # one, whatever its size: a stream of such clips needs it again


def peak_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def test_memory_does_not_grow_with_length(tmp_path):
    """Four windows and all in pieces; FFmpeg's index, up to 100 bytes per frame, is what makes the difference."""
    peaks = {1: [], 10: [], 60: []}
    for minutes, peak in peaks.items():
        path = long_video(tmp_path, 96, minutes)
        source, num_frames = MediaSource(str(path), 0, path.stat().st_size, "video"), minutes * 60 * FPS
        windows = tuple(Window(num_frames * k // 4 + 9, 16) for k in range(4))
        with DecodeProcess(LIMITS) as process:
            outcomes = process.decode(DecodeRequest(source, Grid(), windows, ClipShape(64, 64)))
            assert all(isinstance(outcome, DecodedClip) for outcome in outcomes)
            peak.append(peak_mib(process.pid))
        with DecodeProcess(LIMITS) as process:
            assert (
                sum(len(piece.frames) for piece in process.stream(request_of(source, 0, num_frames), 64)) == num_frames
            )
            peak.append(peak_mib(process.pid))
    for short, long, hour in zip(*peaks.values(), strict=True):
        assert long < short * 1.1
        assert hour < short * 1.1 + 60 * 60 * FPS * 100 / 2**20
