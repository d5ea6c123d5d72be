"""Decode processes: what they hand over, and what happens when they die, hang, or eat memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import gc
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.decode import child as child_program
from pipeline.decode import child_process, frame_memory
from pipeline.decode.backend import decode_windows, probe_media
from pipeline.decode.frame_memory import FrameView, SharedFrameMemory
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.decode.wire import requests_to_json
from pipeline.errors import DecodeError, ShardError, UnitError
from tests.clips import numbered_image, numbered_video, read_number, stored

LIMITS = DecodeLimits()
IMPATIENT = DecodeLimits(timeout_seconds=0.8, seconds_per_frame=0.001)
MISBEHAVING = "tests.pipeline.decode.misbehaving_child"
ROOT = Path(__file__).resolve().parents[3]


def request_of(source, *windows, shape=ClipShape(64, 64), grid=Grid()):  # noqa: B008 (frozen)
    return DecodeRequest(source, grid, tuple(Window(*window) for window in windows), shape)


@pytest.fixture(scope="module")
def video():
    return numbered_video(40)


@pytest.fixture
def source(video, tmp_path):
    return stored(tmp_path, video)


@pytest.fixture(scope="module")
def process():
    with DecodeProcess(LIMITS) as process:
        yield process


def summary(outcomes):
    """First and last number, or the reason, per window."""
    return [
        (read_number(outcome.frames[0]), read_number(outcome.frames[-1]))
        if isinstance(outcome, DecodedClip)
        else outcome.reason
        for outcome in outcomes
    ]


def open_files():
    gc.collect()  # frames in the tracebacks of other tests hold maps
    return len(list(Path("/proc/self/fd").iterdir()))


def gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("grid", [Grid(), Grid(Fraction(30000, 1001))])
def test_the_handover_equals_decoding_in_process(grid, source, process):
    request = request_of(source, (9, 20), (0, 5), (35, 50), (12, 8), grid=grid)
    for here, there in zip(decode_windows(request, LIMITS), process.decode(request), strict=True):
        if isinstance(here, DecodeError):
            assert (type(there), str(there), there.reason) == (DecodeError, str(here), "past_end")
            continue
        assert np.array_equal(here.frames, there.frames)
        assert np.array_equal(here.pts_seconds, there.pts_seconds)
        assert here.decoder == there.decoder


def test_nothing_overwrites_frames_that_are_still_referred_to(source, process):
    (first,) = process.decode(request_of(source, (0, 4)))
    view, before = first.frames[2:, ::2], first.frames[2:, ::2].copy()
    del first
    for start in range(20, 26):
        process.decode(request_of(source, (start, 4)))
    assert view.flags.writeable
    assert np.array_equal(view, before)


def test_requests_of_growing_and_shrinking_size(source, process):
    for side in (32, 256, 64, 512, 32):
        (clip,) = process.decode(request_of(source, (5, 3), shape=ClipShape(side, side)))
        assert [read_number(frame) for frame in clip.frames] == [5, 6, 7]


def test_probes_and_their_errors_cross_the_pipe(source, process, tmp_path):
    assert process.probe(source) == probe_media(source, LIMITS)
    image = stored(tmp_path, numbered_image(), kind="image")
    assert process.probe(image) == probe_media(image, LIMITS)
    broken = stored(tmp_path, b"no video", key="some/key")
    with pytest.raises(DecodeError) as here:
        probe_media(broken, LIMITS)
    with pytest.raises(DecodeError) as there:
        process.probe(broken)
    assert (str(there.value), there.value.reason) == (str(here.value), "not_media")
    assert "some/key" in str(there.value)
    (outcome,) = process.decode(request_of(broken, (0, 1)))
    assert str(outcome) == str(here.value)
    with pytest.raises(ShardError):
        process.decode(request_of(MediaSource(str(tmp_path / "gone"), 0, 1, "video"), (0, 1)))


def test_the_time_allowed_grows_with_the_source_and_the_last_wanted_frame():
    limits = DecodeLimits(timeout_seconds=10, seconds_per_frame=0.5, max_frames=1000)
    source = MediaSource("shard.tar", 0, 20_000_000, "video")
    assert limits.probe_seconds(source) == 12
    windows = ((90, 10), (0, 5))
    assert limits.decode_seconds(request_of(source, *windows)) == 12 + 50
    assert limits.decode_seconds(request_of(source, *windows, grid=Grid(frame_step=4))) == 12 + 200
    # 100 positions at 24 fps are at most 250 frames of a video of 60 fps.
    assert limits.decode_seconds(request_of(source, *windows, grid=Grid(Fraction(24)))) == pytest.approx(12 + 125)
    assert limits.decode_seconds(request_of(source, (10**9, 1))) == 12 + 500
    with pytest.raises(ValueError, match="timeout_seconds"):
        DecodeLimits(timeout_seconds=0)


def test_decoders_do_not_pile_up_in_the_child(tmp_path):
    """PyAV's containers lie in reference cycles."""
    source = stored(tmp_path, numbered_video(12, codec="libsvtav1", size=(640, 384)))
    used = []
    with DecodeProcess(LIMITS) as process:
        for _ in range(20):
            process.decode(request_of(source, (8, 2)))
            used.append(psutil.Process(process.pid).memory_info().rss / 2**20)
    assert max(used[2:]) - used[1] < 8


def test_no_windows_start_no_process(source):
    with DecodeProcess(LIMITS) as process:
        assert process.decode(request_of(source)) == ()
        assert process.pid is None


def test_one_child_serves_many_requests_and_is_replaced_in_time(source):
    with DecodeProcess(dataclasses.replace(LIMITS, clips_per_process=4)) as process:
        pids = []
        for _ in range(4):
            process.probe(source)
            pids.append(process.pid)
            process.decode(request_of(source, (0, 2), (5, 2)))
        assert pids[0] == pids[1] != pids[2] == pids[3]
        assert gone(pids[0], 0.1)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_child_killed_from_outside_costs_a_retry_only(blow, source):
    with DecodeProcess(LIMITS) as process:
        process.probe(source)
        os.kill(process.pid, blow)
        assert summary(process.decode(request_of(source, (0, 5), (10, 5)))) == [(0, 4), (10, 14)]
        os.kill(process.pid, blow)
        assert process.probe(source).num_frames == 40


def test_a_stopped_child_is_killed_at_its_time_limit_and_replaced(source):
    with DecodeProcess(IMPATIENT) as process:
        process.probe(source)
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        assert summary(process.decode(request_of(source, (3, 4)))) == [(3, 6)]
        assert 0.7 < time.monotonic() - began < 10
        assert gone(pid, 0.1)


def test_waiting_for_a_core_is_not_counted_as_time_taken(source):
    """Or a clip would fail for what an encoder on the same cores, or a neighbour, does meanwhile."""
    core = {min(os.sched_getaffinity(0))}
    with DecodeProcess(IMPATIENT) as process, contextlib.ExitStack() as hogs:
        process.probe(source)
        process.let_others_first()
        os.sched_setaffinity(process.pid, core)
        for _ in range(4):
            hog = hogs.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            hogs.callback(hog.kill)
            os.sched_setaffinity(hog.pid, core)
            threading.Timer(2.0, hog.kill).start()
        pid, began = process.pid, time.monotonic()
        assert summary(process.decode(request_of(source, (0, 20), (10, 30)))) == [(0, 19), (10, 39)]
        assert time.monotonic() - began > 2 * IMPATIENT.timeout_seconds
        assert process.pid == pid


def test_a_key_pressed_in_the_terminal_is_for_the_owner_alone(process, source):
    """A terminal signals all of its foreground group."""
    process.decode(request_of(source, (0, 3)))
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


@pytest.mark.parametrize(("behaviour", "reason"), [("crash", "crash"), ("oom", "out_of_memory")])
def test_only_the_window_that_kills_is_blamed(behaviour, reason, video, tmp_path):
    source = stored(tmp_path, video, key=f"{behaviour}@20")
    with DecodeProcess(LIMITS, MISBEHAVING) as process:
        request = request_of(source, (25, 5), (0, 5), (18, 4), (9, 11))
        outcomes = process.decode(request)
        assert summary(outcomes) == [(25, 29), (0, 4), reason, (9, 19)]
        assert str(outcomes[2]) == str(process.decode(request)[2])
        (alone,) = process.decode(request_of(source, (18, 4)))
        assert str(alone) == str(outcomes[2])
        assert f"{behaviour}@20: " in str(alone)
        assert "2 times" in str(alone)


@pytest.mark.parametrize("behaviour", ["hang", "spin"])
def test_a_hang_that_holds_the_gil_fails_its_window_and_none_behind_it(behaviour, video, tmp_path):
    """Windows are asked for together or apart by a flag that no latent may depend on."""
    source = stored(tmp_path, video, key=f"{behaviour}@20")
    with DecodeProcess(IMPATIENT, MISBEHAVING) as process:
        began = time.monotonic()
        outcomes = process.decode(request_of(source, (30, 2), (18, 4), (0, 5), (25, 5)))
        assert summary(outcomes) == [(30, 31), "timeout", (0, 4), (25, 29)]
        # Once together, twice alone.
        assert time.monotonic() - began < 3 * 0.9 + 4
        assert str(outcomes[1]) == f"timeout: {behaviour}@20: not done after 1 seconds, 2 times"


def test_a_video_that_hangs_everywhere_costs_seven_time_limits_however_many_its_windows(source, monkeypatch):
    tries = []

    def hang(self, message, seconds):
        tries.append(message)
        raise child_process.ChildLost("timeout", "not done")

    monkeypatch.setattr(DecodeProcess, "_exchange", hang)
    with DecodeProcess(LIMITS) as process:
        outcomes = process.decode(request_of(source, *((start, 2) for start in range(9))), request_of(source, (0, 5)))
    assert summary(outcomes) == ["timeout"] * 10
    assert len(tries) == 1 + 3 * 2 + 2  # together, three windows twice, the other request's twice


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_reply_that_nobody_waited_for_answers_no_other_request(error, source, monkeypatch):
    wait = child_process._wait

    def interrupted(stdout, stdin, seconds):
        if stdin is None:  # the message is on its way
            raise error
        return wait(stdout, stdin, seconds)

    with DecodeProcess(LIMITS) as process:
        process.probe(source)
        with monkeypatch.context() as patch:
            patch.setattr(child_process, "_wait", interrupted)
            with pytest.raises(error):
                process.decode(request_of(source, (0, 5)))
        (clip,) = process.decode(request_of(source, (20, 5)))
        assert clip.pts_seconds[0] == pytest.approx(20 / 25)


def test_a_child_that_closed_its_pipe_and_lives_on_is_killed(video, tmp_path, monkeypatch):
    monkeypatch.setattr(child_process, "_END_SECONDS", 0.1)
    with DecodeProcess(IMPATIENT, MISBEHAVING) as process:
        (outcome,) = process.decode(request_of(stored(tmp_path, video, key="mute@0"), (0, 5)))
    assert str(outcome) == "crash: mute@0: the decode process ended with SIGKILL, 2 times"


def test_the_child_ends_itself_when_it_hangs_and_its_owner_is_gone(video, tmp_path):
    """The second net: an alarm needs no GIL."""
    memory = SharedFrameMemory()
    request = request_of(stored(tmp_path, video, key="hang@0"), (0, 1))
    _, offset = memory.lend(request.frame_shapes[0])
    with subprocess.Popen(
        [sys.executable, "-P", "-m", MISBEHAVING, str(memory.fd), json.dumps(dataclasses.asdict(LIMITS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(memory.fd,),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as child:
        assert json.loads(child.stdout.readline()) == {"ready": True}
        seconds = 0.5 - child_program._GRACE_SECONDS
        message = {"decode": requests_to_json([request]), "offsets": [offset], "seconds": seconds}
        child.stdin.write(json.dumps(message).encode() + b"\n")
        child.stdin.flush()
        assert child.wait(timeout=10) == -signal.SIGALRM
    memory.close()


def test_an_idle_child_ends_with_its_owner(source):
    program = (
        "import os, sys\n"
        "from pipeline.decode.limits import DecodeLimits\n"
        "from pipeline.decode.process import DecodeProcess\n"
        "from pipeline.decode.records import MediaSource\n"
        "process = DecodeProcess(DecodeLimits())\n"
        f"process.probe(MediaSource({source.path!r}, {source.offset}, {source.size_bytes}, 'video'))\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        stdout=subprocess.PIPE,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_the_child_has_its_limits(source):
    limits = dataclasses.replace(LIMITS, memory_bytes=3 << 30)
    with DecodeProcess(limits) as process:
        process.decode(request_of(source, (0, 8)))
        text = Path(f"/proc/{process.pid}/limits").read_text()
        rows = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
        assert int(rows["Max address space"][0]) == (3 << 30) + (64 << 20)  # and one segment of frames
        assert rows["Max core file size"][:2] == ["0", "0"]
        assert psutil.Process(process.pid).nice() == min(19, psutil.Process().nice() + 5)


def test_a_child_that_lets_others_first_keeps_to_that_and_so_do_its_successors(source):
    with ProcessPool(2, LIMITS) as pool:
        pool.start()
        pool.let_others_first()
        pool.submit(request_of(source, (0, 3))).result()
        assert {os.sched_getscheduler(pid) for pid in pool.pids} == {os.SCHED_IDLE}
        os.kill(pool.pids[0], signal.SIGKILL)
        os.kill(pool.pids[1], signal.SIGKILL)
        for _ in range(2):
            pool.submit(request_of(source, (0, 3))).result()
        assert {os.sched_getscheduler(pid) for pid in pool.pids} == {os.SCHED_IDLE}


def test_a_tighter_limit_of_the_system_stands(source):
    tight = 3 << 30
    with DecodeProcess(LIMITS) as process:
        process.start()
        psutil.Process(process.pid).rlimit(resource.RLIMIT_AS, (tight, tight))
        assert summary(process.decode(request_of(source, (0, 5)))) == [(0, 4)]
        assert psutil.Process(process.pid).rlimit(resource.RLIMIT_AS) == (tight, tight)


def test_a_system_without_room_for_a_child_is_not_the_medias_fault(source, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", fail)
    before = open_files()
    with DecodeProcess(LIMITS) as process:
        for ask in (lambda: process.probe(source), lambda: process.decode(request_of(source, (0, 1)))):
            with pytest.raises(UnitError, match=r"cannot start pipeline\.decode\.child: .*Too many open files"):
                ask()
        assert open_files() == before


def test_a_child_that_cannot_start_is_not_the_medias_fault(source):
    with (
        DecodeProcess(LIMITS, "tests.pipeline.decode.no_such_module") as process,
        pytest.raises(UnitError, match="cannot start"),
    ):
        process.decode(request_of(source, (0, 1)))


def test_lost_children_leave_nothing_open(source):
    at_first = open_files()
    with DecodeProcess(LIMITS) as process:
        process.decode(request_of(source, (0, 2)))
        before = open_files()
        for _ in range(3):
            os.kill(process.pid, signal.SIGKILL)
            process.decode(request_of(source, (0, 2)))
        assert open_files() == before
        pid = process.pid
    assert open_files() == at_first
    assert gone(pid, 0.1)


def test_a_closed_process_serves_no_more(source):
    process = DecodeProcess(LIMITS)
    process.close()
    with pytest.raises(UnitError, match="closed"):
        process.probe(source)


@pytest.fixture(params=["this Python", "a Python built with old headers"])
def any_python(request, monkeypatch):
    if request.param == "this Python":
        return
    for module, name in ((os, "memfd_create"), (os, "MFD_CLOEXEC"), (os, "MFD_ALLOW_SEALING")):
        monkeypatch.delattr(module, name)
    for name in ("F_ADD_SEALS", "F_SEAL_SHRINK"):
        monkeypatch.delattr(fcntl, name)


def test_shared_memory_cannot_be_pulled_away(any_python):
    memory = SharedFrameMemory()
    memory.lend((1, 4, 4, 3))
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    memory.close()


def test_a_system_without_shared_memory_says_so():
    with pytest.raises(OSError, match="Invalid argument"):
        frame_memory._libc_memfd_create("a name of 250 letters" * 12, 1)


def test_both_sides_see_the_same_memory_however_it_grows(any_python):
    memory = SharedFrameMemory()
    view = FrameView(memory.fd)
    shapes = [(2, 8, 8, 3), (1, 4096, 4096, 3), (9, 16, 16, 3), (2, 4096, 4096, 3), (2, 8, 8, 3)]
    lent = [memory.lend(shape) for shape in shapes]
    for number, (_, offset) in enumerate(lent):
        view.array(offset, shapes[number])[...] = number
    for number, (array, _) in enumerate(lent):
        assert array.shape == shapes[number]
        assert (array == number).all()
    memory.close()


@pytest.mark.parametrize("rows", [64, 2048])  # the larger ones do not fit the memory of small neighbours
def test_what_is_lent_for_a_message_is_apart_and_goes_back_with_its_last_part(rows):
    memory = SharedFrameMemory()
    view, shapes = FrameView(memory.fd), [(1, rows, 1024, 3), (2, rows // 2, 1024, 3), (1, 8, 8, 3)]
    arrays, offsets = memory.lend_all(shapes)
    for number, (shape, offset) in enumerate(zip(shapes, offsets, strict=True)):
        view.array(offset, shape)[...] = number
    assert [array.shape for array in arrays] == shapes
    assert [set(array.flat) for array in arrays] == [{0}, {1}, {2}]
    is_together = rows == 64
    for left in (2, 1, 0):
        assert (memory.free_bytes == 0) == (is_together or left == 2)
        arrays.pop(0)
    assert memory.free_bytes >= sum(map(math.prod, shapes))
    memory.close()


def test_shared_memory_that_is_not_kept_gives_its_pages_back_and_its_place_is_used_again():
    memory = SharedFrameMemory(keep_bytes=1 << 20)

    def held_bytes():
        return os.fstat(memory.fd).st_blocks * 512

    clips = [memory.lend((1, 512, 1024, 3))[0] for _ in range(8)]
    for clip in clips:
        clip[...] = 1
    assert held_bytes() == 8 * clips[0].nbytes
    size, nbytes = memory.size_bytes, clips[0].nbytes
    del clip, clips[0]
    assert held_bytes() == 8 * nbytes  # one is kept, whatever its size
    clips.clear()
    assert held_bytes() == nbytes
    clips = [memory.lend((1, 512, 1024, 3)) for _ in range(8)]
    assert len({offset for _, offset in clips}) == 8
    assert memory.size_bytes == size
    memory.close()


def test_clips_of_many_sizes_share_their_place():
    memory, before = SharedFrameMemory(), open_files()
    peak_bytes = 0
    for rows in range(120, 241):
        clips = [memory.lend((17, 2 * rows, 320, 3)) for _ in range(8)]
        peak_bytes = max(peak_bytes, sum(array.nbytes for array, _ in clips))
        del clips
    assert memory.size_bytes < 6 * peak_bytes
    assert open_files() - before < 10
    memory.close()


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 4097, 32769, 100_000, 1 << 20, (1 << 20) + 1, 17 * 480 * 832 * 3])
def test_what_rounding_a_size_up_costs(size_bytes):
    class_bytes = frame_memory._class_bytes(size_bytes)
    assert class_bytes % 4096 == 0
    assert max(1, size_bytes) <= class_bytes <= max(4096 + size_bytes, 1.25 * size_bytes)


def test_memory_whose_pages_the_system_keeps_is_used_again(monkeypatch):
    monkeypatch.setattr(frame_memory.mmap, "MADV_REMOVE", 12345)
    memory = SharedFrameMemory(keep_bytes=0)
    for _ in range(100):
        clips = [memory.lend((1, 1024, 1024, 3)) for _ in range(3)]
        del clips
    assert memory.size_bytes == 64 << 20
    memory.close()


def test_a_message_of_several_windows_needs_one_map():
    memory = SharedFrameMemory()
    view, shapes = FrameView(memory.fd), [(1, 64, 64, 3), (1, 8192, 4096, 3)]
    view.array(memory.lend(shapes[0])[1], shapes[0])
    lent = [memory.lend(shape) for shape in shapes]
    arrays = [view.array(offset, shape) for (_, offset), shape in zip(lent, shapes, strict=True)]
    assert arrays[0].base.base.obj is arrays[1].base.base.obj
    memory.close()


def test_requests_in_one_message_are_those_requests(source, tmp_path, process):
    image = stored(tmp_path, numbered_image(), kind="image")
    requests = [
        request_of(source, (9, 20), (0, 5)),
        request_of(source),
        request_of(image, (0, 1)),
        request_of(stored(tmp_path, b"no video"), (0, 1)),
        request_of(source, (12, 8), grid=Grid(Fraction(30000, 1001)), shape=ClipShape(128, 96)),
    ]
    together = process.decode(*requests)
    apart = [outcome for request in requests for outcome in process.decode(request)]
    reasons = [None if isinstance(outcome, DecodedClip) else outcome.reason for outcome in together]
    assert reasons == [None, None, None, "not_media", None]
    for one, other in zip(together, apart, strict=True):
        assert str(one) == str(other) if isinstance(one, DecodeError) else np.array_equal(one.frames, other.frames)


@pytest.mark.parametrize(("behaviour", "reason"), [("crash", "crash"), ("hang", "timeout"), ("oom", "out_of_memory")])
def test_of_requests_in_one_message_only_the_one_that_kills_is_blamed(behaviour, reason, video, tmp_path):
    bad = stored(tmp_path, video, key=f"{behaviour}@20")
    good = MediaSource(bad.path, bad.offset, bad.size_bytes, "video", key="good@99")
    with DecodeProcess(IMPATIENT, MISBEHAVING) as process:
        requests = [request_of(good, (18, 4)), request_of(bad, (18, 4), (0, 5)), request_of(good, (30, 2), (0, 3))]
        outcomes = process.decode(*requests)
    assert summary(outcomes) == [(18, 21), reason, (0, 4), (30, 31), (0, 2)]


def test_a_pool_decodes_side_by_side_and_leaves_nothing(source, tmp_path):
    broken = stored(tmp_path, b"no video")
    with ProcessPool(2, LIMITS) as pool:
        requests = [request_of(source, (start, 5)) for start in range(12)]
        futures = [pool.submit(request) for request in requests]
        assert [summary(future.result(60)) for future in futures] == [[(start, start + 4)] for start in range(12)]
        assert pool.probe(source).result(60).num_frames == 40
        assert isinstance(pool.probe(broken).exception(60), DecodeError)
        assert summary(pool.submit(request_of(broken, (0, 1))).result(60)) == ["not_media"]
        pids = pool.pids
        assert len(set(pids)) == 2
    assert all(gone(pid, 0.1) for pid in pids)
    with pytest.raises(RuntimeError):
        pool.submit(requests[0])


def test_closing_a_pool_breaks_off_a_hang(video, tmp_path):
    source = stored(tmp_path, video, key="hang@0")
    pool = ProcessPool(1, LIMITS, MISBEHAVING)
    running, waiting = (pool.submit(request_of(source, (0, 1))) for _ in range(2))
    deadline = time.monotonic() + 20
    while not pool.pids and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = pool.pids
    closing = threading.Thread(target=pool.close)
    closing.start()
    closing.join(3)
    assert not closing.is_alive()
    assert isinstance(running.exception(0), UnitError)
    assert waiting.cancelled()
    assert all(gone(pid, 0.1) for pid in pids)


def test_a_child_that_was_started_ahead_serves_the_first_request(source):
    with DecodeProcess(LIMITS) as process:
        assert process.pid is None
        process.start()
        pid = process.pid
        assert pid is not None
        process.start()
        (clip,) = process.decode(request_of(source, (2, 1)))
        assert read_number(clip.frames[0]) == 2
        assert process.pid == pid
    process.start()
    assert process.pid is None


def test_outcomes_carry_what_decoding_them_cost(source, process):
    request = request_of(source, (0, 5), (20, 10))
    began = time.perf_counter()
    clips = process.decode(request)
    seconds = time.perf_counter() - began
    assert 0 < clips[0].cpu_seconds == clips[1].cpu_seconds
    assert 0 < sum(clip.cpu_seconds + clip.wait_seconds for clip in clips) <= seconds


def test_a_decode_process_keeps_its_memory_unless_the_user_says_otherwise(source, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with DecodeProcess(LIMITS) as process:
        process.decode(request_of(source, (0, 1)))
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
    assert "MALLOC_TRIM_THRESHOLD_=1000000" in environment
    assert f"MALLOC_MMAP_THRESHOLD_={16 << 20}" in environment
