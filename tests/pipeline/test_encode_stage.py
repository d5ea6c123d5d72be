"""The encode stage: how many calls at a time, on how many threads, what its seconds say, and what it lets go of."""

from __future__ import annotations

import dataclasses
import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from models.chunks import StreamState
from models.spec import Posterior
from models.streamed import EncodeStream
from pipeline import worker as worker_module
from pipeline.byte_window import ByteWindow
from pipeline.decode.records import DecodeRequest
from pipeline.decode_requests import Decoders
from pipeline.encode_stage import Caller, num_callers
from pipeline.errors import DecodeError, UnitError
from pipeline.feed import Piece
from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.sampling import SamplingConfig
from pipeline.storage import LocalStorage
from pipeline.unit_job import UnitJob, UnitReport
from pipeline.worker import EncodeWorker
from tests.fakes import FAKE_GEOMETRY, FakeDecoders, FakeEncoder, planned_store
from tests.pipeline.test_worker import CLIP_BYTES, FILMS, BreakingStreams, film_recipe, recipe_of

pytestmark = pytest.mark.timeout(30)

VIDEOS = ({"a": 30, "b": 20, "c": 50}, {"d": 31, "e": 12, "f": 40})
Make = Callable[..., tuple[EncodeWorker, Plan]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A worker on six videos, by default of two windows, in units of four and batches of two; closed at the end."""
    workers: list[EncodeWorker] = []
    fatal: list[BaseException] = []

    def make_one(
        encoder: FakeEncoder,
        threads: int,
        decoders: Decoders | None = None,
        storage_type: type[LocalStorage] = LocalStorage,
        windows: int = 2,
        films: Recipe | None = None,
    ) -> tuple[EncodeWorker, Plan]:
        storage, plan = planned_store(tmp_path, FILMS if films else VIDEOS, films or recipe_of(windows, 2, 4))
        used = storage_type(storage.url)
        worker = EncodeWorker(encoder, decoders or FakeDecoders(), used, plan, 1 << 20, fatal.append, threads)
        workers.append(worker)
        return worker, plan

    yield make_one
    for worker in workers:
        worker.close(finish=False)
    assert fatal == []


def run(worker: EncodeWorker, plan: Plan) -> tuple[list[UnitReport], float]:
    """Every unit's report, and the seconds that all took."""
    began = time.monotonic()
    futures = [worker.submit(unit) for unit in plan.units()]
    return [future.result(10) for future in futures], time.monotonic() - began


class SlowEncoder(FakeEncoder):
    """Sleeps in every call, and remembers its threads."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.threads = seconds, set[int]()

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.threads.add(torch.get_num_threads())
        time.sleep(self.seconds)
        return super().encode(frames_BTHWC, chunk_frames)


class MeetingEncoder(SlowEncoder):
    """Each call waits until another one is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.meeting.wait(timeout=10)
        return super().encode(frames_BTHWC, chunk_frames)


def test_on_several_threads_two_calls_run_at_a_time_on_half_of_them_each(make: Make) -> None:
    encoder = MeetingEncoder()
    worker, plan = make(encoder, 6)
    reports, _ = run(worker, plan)
    assert encoder.threads == {3}
    assert sum(report.written for report in reports) == plan.num_clips


def test_an_odd_thread_is_left_out_so_that_both_calls_make_the_same_bits(make: Make) -> None:
    encoder = MeetingEncoder()
    run(*make(encoder, 7))
    assert encoder.threads == {3}


def test_one_call_has_its_threads_whatever_the_process_has(make: Make) -> None:
    torch.set_num_threads(3)
    encoder = SlowEncoder()
    run(*make(encoder, 1))
    assert encoder.threads == {1}


def test_one_call_at_a_time_where_two_gain_nothing() -> None:
    turns = FakeEncoder()
    turns.one_at_a_time = True
    assert num_callers(FakeEncoder(), recipe_of(), threads=2) == 2
    assert num_callers(FakeEncoder(), recipe_of(), threads=1) == 1
    assert num_callers(turns, recipe_of(), threads=2) == 1


def test_callers_follow_from_the_recipe_so_a_plan_that_grows_changes_no_bit(tmp_path: Path) -> None:
    """Videos of 50 frames give clips that do not stream; those of 90 that may join later do."""
    _, plan = planned_store(tmp_path, [{"a": 50, "b": 45}], film_recipe())
    assert not any(plan.recipe.streams(bucket) for bucket in plan.buckets)
    assert num_callers(FakeEncoder(), plan.recipe, threads=2) == 1
    assert num_callers(FakeEncoder(), film_recipe(stream_mb=128), threads=2) == 2


def test_a_slice_keeps_its_bytes_in_the_window_until_it_is_encoded_and_no_frames_after(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    frames_afterwards: list[object] = []
    to_rows = worker_module.to_rows

    class Looking(FakeEncoder):
        def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
            used.append(worker._window._used_bytes)
            return super().encode(frames_BTHWC, chunk_frames)

    def looking(recipe: Any, batch: Any, posterior: Any) -> Any:
        frames_afterwards.append(batch.frames)
        return to_rows(recipe, batch, posterior)

    monkeypatch.setattr(worker_module, "to_rows", looking)
    worker, plan = make(Looking(), 1)
    run(worker, plan)
    assert min(used) >= 2 * CLIP_BYTES
    assert set(frames_afterwards) == {None}


# seconds


def test_encode_seconds_of_two_callers_are_their_mean(make: Make) -> None:
    encoder = SlowEncoder(0.05)
    reports, seconds = run(*make(encoder, 2))
    assert encoder.batches * 0.05 / 2 <= sum(report.encode_seconds for report in reports) <= seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_that_wait_for_frames_starve_as_long_as_the_job_takes(
    make: Make, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("pipeline.decode_requests._MESSAGE_REQUESTS", 1)

    class Far(FakeDecoders):
        def submit(self, *requests: DecodeRequest):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return super().submit(*requests)

    reports, seconds = run(*make(FakeEncoder(), threads, Far()))
    waited = sum(report.starved_seconds + report.start_seconds for report in reports)
    assert 0.6 * seconds < waited < seconds + 0.1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_slow_store_blocks_the_callers(make: Make, threads: int) -> None:
    class Far(LocalStorage):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            time.sleep(0.02)
            return super().put_if_absent(name, data)

    reports, seconds = run(*make(FakeEncoder(), threads, storage_type=Far, windows=8))
    blocked = sum(report.blocked_seconds for report in reports)
    assert 0.3 * seconds < blocked <= seconds
    assert blocked > sum(report.encode_seconds for report in reports)


# what fails


class FailingEncoder(SlowEncoder):
    """Its first calls raise."""

    def __init__(self, error: Exception, times: int = 1, seconds: float = 0.05) -> None:
        super().__init__(seconds)
        self.error, self.times, self.calls = error, times, 0

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.calls += 1
        posterior = super().encode(frames_BTHWC, chunk_frames)
        if self.calls <= self.times:
            raise self.error
        return posterior


def test_a_call_that_does_not_fit_the_gpu_fails_its_unit_only_and_no_other_call_is_made_for_it(make: Make) -> None:
    encoder = FailingEncoder(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has ..."))
    worker, plan = make(encoder, 1)
    futures = [worker.submit(unit) for unit in plan.units()]
    failure = futures[0].exception(10)
    assert isinstance(failure, UnitError)
    assert str(failure) == (
        "the GPU has no memory for 2 clips of 9x32x32 at a time: lower --batch-size, or --chunk-frames "
        "(CUDA out of memory. Tried to allocate 9 GiB.)"
    )
    assert failure.__context__ is None  # whose traceback would keep the memory
    assert [future.result(10).written for future in futures[1:]] == [4, 4]
    assert encoder.calls == 1 + 2 + 2


def test_a_unit_that_fails_while_its_last_slice_is_not_whole_gives_all_of_the_window_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clip of the second slice is decoded, the other not asked for, and none ever will be."""
    monkeypatch.setattr("pipeline.decode_requests._MESSAGE_REQUESTS", 1)
    monkeypatch.setattr("pipeline.feed._MESSAGES_PER_WINDOW", 1 << 20)  # so each window is a message of its own
    worker, plan = make(FailingEncoder(UnitError("on purpose")), 1)
    put = worker._decoding.put
    asked: list[object] = []

    def waiting_put(item: Any) -> None:
        put(item)
        asked.append(item)
        if len(asked) == 3:
            item.job.future.exception(10)

    monkeypatch.setattr(worker._decoding, "put", waiting_put)
    first, second, third = (worker.submit(unit) for unit in plan.units())
    assert isinstance(first.exception(10), UnitError)
    assert [second.result(10).written, third.result(10).written] == [4, 4]
    worker.close()
    assert worker._window._used_bytes == 0


FILM_RECIPE = dataclasses.replace(film_recipe(), sampling=SamplingConfig((85,)))  # ends with 4 frames of a chunk of 8


class StreamingEncoder(FakeEncoder):
    """Remembers its streams weakly; `fails` tells by the number of a push, or of a flush, whether it fits."""

    def __init__(self, fails: Callable[[str, int], bool]) -> None:
        super().__init__()
        self.fails, self.calls = fails, {"push": 0, "flush": 0}
        self.streams: list[weakref.ref[EncodeStream]] = []

    @property
    def num_alive(self) -> int:
        return sum(stream() is not None for stream in self.streams)

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        encoder = self

        class Counting(EncodeStream):
            def push(self, arrived: torch.Tensor) -> Posterior | None:
                encoder.count("push")
                return super().push(arrived)

            def flush(self) -> Posterior | None:
                encoder.count("flush")
                return super().flush()

        stream = Counting(FAKE_GEOMETRY, self._encode_chunk, chunk_frames or 8, state)
        self.streams.append(weakref.ref(stream))
        return stream

    def count(self, call: str) -> None:
        self.calls[call] += 1
        if self.fails(call, self.calls[call]):
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is in a cycle stays, as for long after gc.freeze()."""
    gc.disable()
    yield
    gc.enable()


def test_waiting_frames_that_do_not_fit_at_a_clips_end_fail_their_unit_only(make: Make) -> None:
    encoder = StreamingEncoder(lambda call, number: (call, number) == ("flush", 1))
    worker, plan = make(encoder, 1, films=FILM_RECIPE)
    futures = [worker.submit(unit) for unit in plan.units()]
    failure = futures[0].exception(10)
    assert isinstance(failure, UnitError)
    assert str(failure).startswith("the GPU has no memory for long clips of 85x32x32: lower --window-mb")
    assert failure.__context__ is None
    assert [future.exception(10) for future in futures[1:]] == [None] * (len(futures) - 1)
    worker.close()
    assert worker._window._used_bytes == 0


def test_a_unit_that_fails_leaves_nothing_of_its_clips_with_the_encoder(make: Make, no_collection: None) -> None:
    """Not even until the next collection: its retry comes at once, and needs the memory of the GPU."""
    alive: list[int] = []
    encoder = StreamingEncoder(lambda call, number: (call, number) == ("push", 8))
    worker, plan = make(encoder, 1, films=film_recipe())
    future = worker.submit(list(plan.units())[1])
    future.add_done_callback(lambda _: alive.append(encoder.num_alive))
    failure = future.exception(10)
    assert isinstance(failure, UnitError)
    assert len(encoder.streams) > 1
    assert alive == [0]


class Refusing(LocalStorage):
    """As an object store that fails: with a cause, whose traceback has frames of its own."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        try:
            Path(self.url, "nothing").read_bytes()
        except OSError as error:
            raise UnitError(f"cannot write {name}") from error


@pytest.mark.parametrize(
    ("decoders", "storage_type", "told"),
    [
        (BreakingStreams(UnitError("decoding broke")), LocalStorage, "decoding broke"),
        (BreakingStreams(DecodeError("bad_media", "its clip's fault")), LocalStorage, "None"),
        (FakeDecoders(), Refusing, "cannot write"),
    ],
)
def test_a_job_is_gone_with_its_unit_whatever_failed(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    no_collection: None,
    decoders: Decoders,
    storage_type: type[LocalStorage],
    told: str,
) -> None:
    worker, plan = make(FakeEncoder(), 1, decoders, storage_type, films=film_recipe(unit_rows=2))
    jobs: list[weakref.ref[UnitJob]] = []
    put = worker._submitted.put

    def remembering(job: UnitJob) -> None:
        jobs.append(weakref.ref(job))
        put(job)

    with monkeypatch.context() as patch:
        patch.setattr(worker._submitted, "put", remembering)
        future = worker.submit(list(plan.units())[2])
    assert told in str(future.exception(10))
    worker.close()
    assert [job() for job in jobs] == [None]


def test_a_piece_of_a_unit_that_is_over_ends_its_other_clips(tmp_path: Path) -> None:
    _, plan = planned_store(tmp_path, FILMS, film_recipe())
    window, outbox = ByteWindow(100), queue.Queue[Any]()
    job = UnitJob(next(plan.units()), Future())
    job.streams[0] = object()  # type: ignore[assignment]
    job.future.cancel()
    window.acquire(7)
    piece = Piece(job, 7, 1, DecodeError("bad_media", "on purpose"))
    Caller(FakeEncoder(), plan, window, outbox, share=1.0, threads=1).handle(piece)
    assert job.streams == {}
    assert outbox.empty()
    assert window._used_bytes == 0
