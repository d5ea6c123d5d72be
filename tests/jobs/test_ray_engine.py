"""What the Ray engine adds to the engine that every other test uses. (Whole jobs on Ray: tests/end_to_end.)"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from jobs.__main__ import main
from jobs.flags import EngineFlags
from pipeline.buckets import Bucket
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.engine import Event, UnitDone, WorkerLost, WorkerReady
from pipeline.errors import DecodeError, ShardError
from pipeline.heap import HEAP_ENVIRONMENT
from pipeline.plan import Unit
from pipeline.unit_job import UnitReport
from tests.clips import numbered_video, read_number, stored
from tests.fakes import write_numbered_shards
from tests.pipeline.test_controller import BUCKET, report

if TYPE_CHECKING:
    from jobs.ray_engine import RayEngine

pytestmark = pytest.mark.ray


def request(source: MediaSource, *windows: Window) -> DecodeRequest:
    return DecodeRequest(source, Grid(), windows, ClipShape(96, 96))


def test_a_decode_task_gives_frames_and_errors_as_a_process_does(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    decoders = RayDecoders(DecodeLimits())
    video = stored(tmp_path, numbered_video(num_frames=20))
    pending = decoders.submit(request(video, Window(11, 2), Window(3, 1), Window(19, 4)))
    late, early, beyond = pending.result()
    assert isinstance(late, DecodedClip)
    assert isinstance(early, DecodedClip)
    assert [read_number(frame) for frame in (*late.frames, *early.frames)] == [11, 12, 3]
    assert isinstance(beyond, DecodeError)
    assert (beyond.reason, beyond.detail) == ("past_end", "clip: positions 19 to 22 reach past the video's end")
    together = decoders.submit(request(video, Window(2, 1)), request(video, Window(5, 1), Window(4, 1))).result()
    assert [read_number(clip.frames[0]) for clip in together if isinstance(clip, DecodedClip)] == [2, 5, 4]


def test_errors_of_the_input_cross_the_cluster_as_themselves(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    missing = MediaSource(str(tmp_path / "gone.tar"), 0, 100, "video", "key")
    with pytest.raises(ShardError, match=r"cannot read shard .*gone\.tar") as caught:
        RayDecoders(DecodeLimits()).submit(request(missing, Window(0, 1))).result()
    assert type(caught.value) is ShardError


def test_a_long_clip_comes_in_pieces_as_from_a_process(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    decoders = RayDecoders(DecodeLimits())
    video = stored(tmp_path, numbered_video(num_frames=60))
    pieces = list(decoders.stream(request(video, Window(3, 50)), 8))
    assert [read_number(frame) for piece in pieces for frame in piece.frames] == list(range(3, 53))
    assert [len(piece.frames) for piece in pieces] == [8] * 6 + [2]
    numbers, left = [], decoders.stream(request(video, Window(52, 10)), 4)
    numbers += [read_number(frame) for _ in range(2) for frame in next(left).frames]
    with pytest.raises(DecodeError, match="past_end: clip: positions 52 to 61 reach past the video's end"):
        next(left)
    assert numbers == [52, 53, 54, 55, 56, 57, 58, 59]


def test_a_stream_keeps_no_piece_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import ray_decode

    def next_piece(stream: object, start: int) -> DecodedClip:
        return DecodedClip(np.zeros((8, 2, 2, 3), np.uint8), np.zeros(8), "pyav")

    monkeypatch.setattr(ray_decode._RayStream, "_next", next_piece)
    video = MediaSource("shard.tar", 0, 100, "video")
    pieces = ray_decode._RayStream(request(video, Window(0, 16)), 8, None).pieces()
    for _ in range(2):
        taken = weakref.ref(next(pieces).frames)
        assert taken() is None
    pieces.close()


def test_a_stream_that_is_dropped_gives_its_cpu_back(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    from jobs.ray_decode import RayDecoders

    def free_cpus() -> float:
        return float(ray.available_resources()["CPU"])  # type: ignore[no-untyped-call]

    pieces = RayDecoders(DecodeLimits()).stream(request(stored(tmp_path, numbered_video(60)), Window(0, 60)), 4)
    assert read_number(next(pieces).frames[0]) == 0
    deadline = time.monotonic() + 20
    while free_cpus() > 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_cpus() == 5  # it waits for its pieces to be taken
    pieces.close()
    while free_cpus() < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_cpus() == 6


@pytest.mark.parametrize("deaths", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_whose_worker_dies_goes_on_from_the_piece_that_is_wanted(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    import ray

    from jobs import ray_decode

    def stream(request: DecodeRequest, piece_frames: int, limits: DecodeLimits):  # type: ignore[no-untyped-def]
        for piece in ray_decode._stream(request, piece_frames, limits):
            marks = [Path(request.source.path).parent / f"death-{number}" for number in range(deaths)]
            left = [mark for mark in marks if not mark.exists()]
            if left and isinstance(piece, DecodedClip) and read_number(piece.frames[0]) == 24:
                left[0].touch()
                os._exit(1)
            yield piece

    monkeypatch.setattr(ray_decode, "_stream_task", ray.remote(num_cpus=1, max_retries=0)(stream))
    video = stored(tmp_path, numbered_video(num_frames=60))
    pieces = ray_decode.RayDecoders(DecodeLimits()).stream(request(video, Window(0, 60)), 8)
    numbers = [read_number(frame) for _ in range(3) for frame in next(pieces).frames]
    assert numbers == list(range(24))
    if deaths == 1:
        assert [read_number(frame) for piece in pieces for frame in piece.frames] == list(range(24, 60))
    else:
        with pytest.raises(DecodeError, match="crash: the decoder's process died 2 times"):
            next(pieces)


class Sleeper:
    """An encode actor whose units take as many seconds as their number says."""

    def __init__(self, spec: object) -> None:
        pass

    def node(self) -> str:
        return "a node that is no more"

    def setup(self) -> dict[str, object]:
        return {"pid": os.getpid(), "node": "here", "heap": {name: os.environ.get(name) for name in HEAP_ENVIRONMENT}}

    def encode(self, unit: Unit) -> UnitReport:
        time.sleep(unit.number)
        return report(unit)


def collect(engine: RayEngine, count: int) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + 60
    while len(events) < count and time.monotonic() < deadline:
        events += engine.wait(1.0)
    return events


def test_the_engine_tells_of_all_that_is_done_and_once_of_a_worker_that_died(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import ray_engine

    monkeypatch.setattr(ray_engine, "EncodeActor", Sleeper)
    spec: Any = SimpleNamespace(device="cpu", share=SimpleNamespace(cpus=0, decode_processes=1))
    engine = ray_engine.RayEngine(spec, EngineFlags(units_in_flight=3))
    first, second = engine.start_worker(), engine.start_worker()
    assert set(collect(engine, 2)) == {WorkerReady(first), WorkerReady(second)}
    assert engine.wait(0.01) == []
    assert engine.places[first]["heap"] == HEAP_ENVIRONMENT  # the encoder's, on a CPU
    quick, slow = Unit(BUCKET, 0), [Unit(BUCKET, 600 + number) for number in range(3)]
    for unit in slow:
        engine.submit(first, unit)
    engine.submit(second, quick)
    assert collect(engine, 1) == [UnitDone(second, report(quick))]
    began = time.monotonic()
    assert engine.wait(0.2) == []
    assert time.monotonic() - began < 5
    engine.kill_worker(first)
    (lost,) = collect(engine, 1)
    assert isinstance(lost, WorkerLost)
    assert (lost.worker, lost.infrastructure) == (first, True)  # so its node was learned, and is not alive
    assert engine.wait(0.2) == []  # the worker's other units are no news
    engine.submit(second, quick)
    assert collect(engine, 1) == [UnitDone(second, report(quick))]
    several = [Unit(Bucket(1, 32 + number, 32), 0) for number in range(3)]
    for unit in several:
        engine.submit(second, unit)
    deadline = time.monotonic() + 60
    while engine._completed.qsize() < len(several) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {event.report.unit for event in engine.wait(5) if isinstance(event, UnitDone)} == set(several)
    engine.close()


SPREAD_PROGRAM = """
import logging, sys, time
from types import SimpleNamespace
import ray
from ray.cluster_utils import Cluster
from jobs import ray_engine
from jobs.flags import EngineFlags

class Idle:
    def __init__(self, spec): pass
    def node(self): return ray.get_runtime_context().get_node_id()
    def setup(self): return {"node": ray.get_runtime_context().get_node_id()}

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 80 << 20})
cluster.add_node(num_cpus=4, object_store_memory=80 << 20)
ray.init(address=cluster.address, logging_level=logging.ERROR)
ray_engine.EncodeActor = Idle
spec = SimpleNamespace(device="cpu", share=SimpleNamespace(cpus=1, decode_processes=1))
engine = ray_engine.RayEngine(spec, EngineFlags())
for _ in range(2):
    engine.start_worker()
deadline = time.monotonic() + 30
while len(engine.places) < 2 and time.monotonic() < deadline:
    engine.wait(1.0)
print("NODES", len(engine.places), len({place["node"] for place in engine.places.values()}))
engine.close()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_encode_workers_are_spread_over_the_nodes() -> None:
    """Two nodes on this machine, either of which has room for both workers; in a process of its own."""
    program = [sys.executable, "-c", SPREAD_PROGRAM]
    told = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert "NODES 2 2" in told.stdout, told.stderr


def test_decode_processes_do_not_inherit_the_encode_workers_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.ray_engine import EncodeActor

    for name, value in HEAP_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    EncodeActor(SimpleNamespace())  # type: ignore[arg-type]
    assert not HEAP_ENVIRONMENT.keys() & os.environ.keys()


def test_long_clips_make_the_same_store_as_without_ray(ray_cluster: None, tmp_path: Path) -> None:
    (shard,) = write_numbered_shards(tmp_path / "shards", 1, 4, broken={"broken": b"no video"})
    stores = []
    for name, more in (("local", ["--local"]), ("ray", ["--decode-placement", "cluster"])):
        store = tmp_path / name
        recipe = ["--encoder", "rehearsal:4x8x8x16@1000", "--frames", "9", "--sizes", "96x96", "--windows", "chunks"]
        engine = ["--stream-mb", "0.1", "--window-mb", "1", "--decode-workers", "2", *more]
        assert main(["encode", str(shard), "--store", str(store), *recipe, *engine]) == 0
        names = [path.relative_to(store) for path in sorted(store.rglob("*")) if path.is_file()]
        stores.append({path: (store / path).read_bytes() for path in names if path.parts[0] != "runs"})
    assert stores[0] == stores[1]
    assert len(stores[0]) > 6
