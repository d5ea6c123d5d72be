"""The encode stage: how many calls at a time, on how many threads, and what its seconds say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.spec import Posterior
from pipeline import worker as worker_module
from pipeline.decode.records import DecodeRequest
from pipeline.decode_requests import Decoders
from pipeline.encode_stage import num_callers
from pipeline.errors import UnitError
from pipeline.plan import Plan
from pipeline.storage import LocalStorage
from pipeline.unit_job import UnitReport
from pipeline.worker import EncodeWorker
from tests.fakes import FakeDecoders, FakeEncoder, planned_store
from tests.pipeline.test_worker import CLIP_BYTES, film_recipe, recipe_of

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
    ) -> tuple[EncodeWorker, Plan]:
        storage, plan = planned_store(tmp_path, VIDEOS, recipe_of(windows, 2, 4))
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
