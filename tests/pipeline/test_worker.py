"""The encode worker: its bytes depend on nothing but plan and frames; its threads never wait for each other in vain."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from models.spec import Posterior
from pipeline import worker as worker_module
from pipeline.buckets import Bucket, BucketConfig
from pipeline.byte_window import ByteWindow
from pipeline.clip_streams import StreamPlan
from pipeline.decode.records import DecodeRequest, Window
from pipeline.decode_requests import Decoders, next_slice, require_unchanged, to_messages, to_requests
from pipeline.errors import ShardError, StoreError, UnitError
from pipeline.feed import default_window_bytes
from pipeline.ledger import read_rows, unit_name
from pipeline.placement import Clip
from pipeline.plan import Plan, Unit
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.sampling import SamplingConfig
from pipeline.storage import LocalStorage
from pipeline.store import read_unit, shard_name
from pipeline.verify import unit_clips
from pipeline.worker import EncodeWorker
from tests.fakes import (
    DECODE_SECONDS,
    READ_SECONDS,
    FakeDecoders,
    FakeEncoder,
    encode_store,
    fake_recipe,
    planned_store,
)

pytestmark = pytest.mark.timeout(30)

CLIP_BYTES = 9 * 32 * 32 * 3
SHARDS = ({"a": 30, "b": 9, "c": 50}, {"d": 31, "e": 12, "bad": 40})


def recipe_of(windows: int = 2, batch_size: int = 2, unit_rows: int = 4, sizes: tuple[str, ...] = ("32x32",)) -> Recipe:
    return fake_recipe(
        sampling=SamplingConfig((9,), windows="uniform", num_windows=windows),
        buckets=BucketConfig(sizes),
        encode=EncodeConfig(batch_size=batch_size, unit_rows=unit_rows),
    )


def contents(storage: LocalStorage) -> dict[str, bytes]:
    return {name: storage.read(name) for prefix in ("latents.zarr/", "ledger/") for name in storage.list(prefix)}


@dataclasses.dataclass
class Setup:
    """A worker on a planned store, closed at the end of the test."""

    storage: LocalStorage
    plan: Plan
    worker: EncodeWorker
    fatal: list[BaseException]

    @property
    def units(self) -> list[Unit]:
        return list(self.plan.units())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Setup]]:
    setups: list[Setup] = []

    def make_one(
        decoders: Decoders,
        encoder: FakeEncoder | None = None,
        recipe: Recipe | None = None,
        window_bytes: int = 1 << 20,
        storage_type: type[LocalStorage] = LocalStorage,
        videos: Sequence[Mapping[str, int]] = SHARDS,
        encode_threads: int = 1,
    ) -> Setup:
        storage, plan = planned_store(tmp_path, videos, recipe)
        fatal: list[BaseException] = []
        used = storage_type(storage.url)
        encoder = encoder or FakeEncoder()
        worker = EncodeWorker(encoder, decoders, used, plan, window_bytes, fatal.append, encode_threads)
        setups.append(Setup(storage, plan, worker, fatal))
        return setups[-1]

    yield make_one
    for setup in setups:
        setup.worker.close(finish=False)


class UnevenEncoder(FakeEncoder):
    """Every third call takes long, so that of two callers one overtakes the other."""

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        posterior = super().encode(frames_BTHWC, chunk_frames)
        if self.batches % 3 == 0:
            time.sleep(0.003)
        return posterior


# the same bytes, whatever the timing


@pytest.mark.parametrize(
    ("windows", "batch_size", "unit_rows"), [(2, 2, 4), (7, 3, 6), (1, 4, 4), (40, 2, 256), (3, 1, 1)]
)
@pytest.mark.parametrize("window_clips", [0.3, 2.5, 1000])
@pytest.mark.parametrize("encode_threads", [1, 2])
def test_bytes_do_not_depend_on_latency_window_or_callers(
    tmp_path: Path, windows: int, batch_size: int, unit_rows: int, window_clips: float, encode_threads: int
) -> None:
    storage, plan = planned_store(tmp_path, SHARDS, recipe_of(windows, batch_size, unit_rows))
    copy = LocalStorage(shutil.copytree(storage.url, tmp_path / "copy"))
    stores = []
    runs = (
        (storage, FakeDecoders(), 1 << 30, 1),
        (copy, FakeDecoders(0.004, windows), int(window_clips * CLIP_BYTES), encode_threads),
    )
    for target, decoders, window_bytes, threads in runs:
        decoders.bad = {"bad"}
        fatal: list[BaseException] = []
        worker = EncodeWorker(UnevenEncoder(), decoders, target, plan, window_bytes, fatal.append, threads)
        futures = [worker.submit(unit) for unit in plan.units()]
        worker.close()
        assert not fatal
        assert sum(future.result(0).written for future in futures) == plan.num_clips - min(windows, 32)
        largest = max(len(request.windows) for request in decoders.requests)
        assert 0 < worker.peak_window_bytes <= max(window_bytes, (batch_size + largest) * CLIP_BYTES)
        stores.append(contents(target))
    assert stores[0] == stores[1]
    assert len(stores[0]) > 2


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_units_one_by_one_give_the_same_bytes(tmp_path: Path, make: Callable[..., Setup], in_flight: int) -> None:
    setup = make(FakeDecoders(seconds=0.003), recipe=recipe_of(7, 2, 4))
    waiting: list[Future[object]] = []
    for unit in reversed(setup.units):
        if len(waiting) == in_flight:
            waiting.pop(0).result(10)
        waiting.append(setup.worker.submit(unit))  # type: ignore[arg-type]
    for future in waiting:
        future.result(10)
    by_units = contents(setup.storage)
    for unit in setup.units:
        setup.storage.delete(unit_name(unit))
        setup.storage.delete(shard_name(unit))
    encode_store(setup.storage, setup.plan, FakeDecoders())
    again = contents(setup.storage)
    del by_units["latents.zarr/zarr.json"], again["latents.zarr/zarr.json"]  # it has the statistics now
    assert by_units == again


def test_rows_are_what_the_encoder_makes_of_each_slice(make: Callable[..., Setup]) -> None:
    from tests.fakes import ClipShape, fake_frames

    setup = make(FakeDecoders())
    for unit in setup.units:
        setup.worker.submit(unit).result(10)
        rows = read_unit(setup.storage, setup.plan.recipe, unit)
        for clip in unit_clips(setup.storage, setup.plan, unit):
            frames = torch.from_numpy(fake_frames(clip.sample.key, clip.window, ClipShape(32, 32)))
            expected = FakeEncoder().encode(frames[None]).mean[0].numpy().astype(np.float16)
            np.testing.assert_array_equal(rows[clip.row % 4], expected)


def test_the_encoder_sees_full_batches_whatever_failed(make: Callable[..., Setup]) -> None:
    class Recording(FakeEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[tuple[int, ...]] = []

        def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None):  # type: ignore[no-untyped-def]
            self.shapes.append(tuple(frames_BTHWC.shape))
            return super().encode(frames_BTHWC, chunk_frames)

    encoder = Recording()
    setup = make(FakeDecoders(bad=["a", "bad"]), encoder, recipe_of(1, 4, 8))
    report = setup.worker.submit(setup.units[0]).result(10)
    assert encoder.shapes == [(4, 9, 32, 32, 3)] * 2
    assert report.failed == {"bad_media": 2}
    assert report.written == 4


# long clips, in pieces

FILMS = ({"a": 130, "b": 90, "c": 170}, {"d": 41, "e": 120, "bad": 90, "f": 95})
STREAM_MB = 60 * 32 * 32 * 3 / 2**20  # clips of 81 frames stream, those of 41 do not


def film_recipe(stream_mb: float = STREAM_MB, unit_rows: int = 4) -> Recipe:
    return fake_recipe(
        sampling=SamplingConfig((81, 41), short="smaller", windows="uniform", num_windows=2),
        encode=EncodeConfig(batch_size=2, unit_rows=unit_rows, stream_mb=stream_mb),
    )


def rows_of(storage: LocalStorage, plan: Plan) -> dict[str, object]:
    """All that a store holds but the recipe's fingerprint."""
    return {
        unit.name: (read_unit(storage, plan.recipe, unit).tobytes(), read_rows(storage, unit_name(unit)))
        for unit in plan.units()
    }


@pytest.mark.parametrize("window_bytes", [10_000, 200_000, 1 << 30])
@pytest.mark.parametrize("seconds", [0.0, 0.004])
def test_long_clips_make_the_same_rows_in_pieces(tmp_path: Path, window_bytes: int, seconds: float) -> None:
    stores = []
    for name, recipe in (("whole", film_recipe(stream_mb=1000)), ("streamed", film_recipe())):
        (tmp_path / name).mkdir()
        storage, plan = planned_store(tmp_path / name, FILMS, recipe)
        assert [recipe.streams(unit.bucket) for unit in plan.units()] == [False] + [name == "streamed"] * 3
        decoders, fatal = FakeDecoders(seconds, bad=["bad"]), []  # type: ignore[var-annotated]
        worker = EncodeWorker(FakeEncoder(), decoders, storage, plan, window_bytes, fatal.append)
        futures = [worker.submit(unit) for unit in (*plan.units(),)]
        worker.close()
        assert not fatal
        assert sum(future.result(0).written for future in futures) == plan.num_clips - 2
        assert worker._window._used_bytes == 0
        stores.append(rows_of(storage, plan))
        peak = worker.peak_window_bytes
    assert [key.replace(str(tmp_path / "whole"), "") for key in stores[0]] == list(stores[1])
    for (whole, lines), (streamed, lines_again) in zip(stores[0].values(), stores[1].values(), strict=True):  # type: ignore[misc]
        assert streamed == whole
        assert [line | {"shard": ""} for line in lines_again] == [line | {"shard": ""} for line in lines]
    assert peak <= max(window_bytes, 4 * 41 * 32 * 32 * 3)  # no more than the short bucket's slice needs


def test_a_job_that_mixes_long_and_short_clips_ends_in_any_order(make: Callable[..., Setup]) -> None:
    setup = make(FakeDecoders(seconds=0.002), recipe=film_recipe(unit_rows=2), window_bytes=100_000, videos=FILMS)
    short, *long = setup.units
    order = [long[0], short, *long[1:3], short, long[3], short]
    futures = [setup.worker.submit(unit) for unit in order]
    assert [future.result(10).unit for future in futures] == order
    assert [future.result(10).won for future in futures] == [True, True, True, True, False, True, False]


def test_memory_of_a_long_clip_is_bounded_by_the_window(tmp_path: Path) -> None:
    peaks = []
    for num_frames in (161, 1601):
        (tmp_path / str(num_frames)).mkdir()
        sampling = SamplingConfig((num_frames,))
        recipe = dataclasses.replace(film_recipe(), sampling=sampling)
        storage, plan = planned_store(tmp_path / str(num_frames), [{"a": 1601, "b": 1601}], recipe)
        fatal: list[BaseException] = []
        worker = EncodeWorker(FakeEncoder(), FakeDecoders(), storage, plan, 300_000, fatal.append)
        futures = [worker.submit(unit) for unit in plan.units()]
        worker.close()
        assert not fatal
        assert [future.result(0).written for future in futures] == [2]
        report = futures[0].result(0)
        assert report.decode_seconds == 2 * report.read_seconds >= 2 * 2 * DECODE_SECONDS
        assert min(report.encode_seconds, report.copy_seconds, report.write_seconds) > 0
        peaks.append(worker.peak_window_bytes)
    assert peaks[0] <= peaks[1] <= 300_000 < 161 * 32 * 32 * 3


class BreakingStreams(FakeDecoders):
    """Streams of video "b" break off after their first piece."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def stream(self, request: DecodeRequest, piece_frames: int):  # type: ignore[no-untyped-def]
        for number, piece in enumerate(super().stream(request, piece_frames)):
            if number and request.source.key == "b":
                raise self.error
            yield piece


def test_a_unit_error_in_a_stream_fails_its_unit_and_gives_the_window_back(make: Callable[..., Setup]) -> None:
    decoders = BreakingStreams(UnitError("storage broke"))
    setup = make(decoders, recipe=film_recipe(unit_rows=2), window_bytes=100_000, videos=FILMS)
    futures = [setup.worker.submit(unit) for unit in setup.units]
    failed = [str(future.exception(10)) for future in futures]
    assert failed == ["None", "None", "storage broke", *["None"] * (len(failed) - 3)]
    setup.worker.close()
    assert setup.worker._window._used_bytes == 0
    assert not setup.storage.exists(unit_name(setup.units[2]))


def test_streams_of_two_buckets_are_never_under_way_together(make: Callable[..., Setup]) -> None:
    """Pieces of one plan fit the window beside each other; those of another, larger one could wait for ever."""
    under_way: list[int] = []
    together: set[tuple[int, ...]] = set()

    class Watched(FakeDecoders):
        def stream(self, request: DecodeRequest, piece_frames: int):  # type: ignore[no-untyped-def]
            length = request.windows[0].num_frames
            under_way.append(length)
            try:  # the worker closes a stream after its last piece
                for piece in super().stream(request, piece_frames):
                    together.add(tuple(sorted(set(under_way))))
                    time.sleep(0.005)
                    yield piece
            finally:
                under_way.remove(length)

    all_stream = film_recipe(stream_mb=30 * 32 * 32 * 3 / 2**20, unit_rows=2)
    setup = make(Watched(), recipe=all_stream, videos=FILMS)
    futures = [setup.worker.submit(unit) for unit in setup.units]
    assert [future.exception(10) for future in futures] == [None] * len(futures)
    assert together == {(41,), (81,)}


def test_an_unexpected_exception_in_a_stream_is_fatal(make: Callable[..., Setup]) -> None:
    decoders = BreakingStreams(ZeroDivisionError("a bug in decoders"))
    setup = make(decoders, recipe=film_recipe(unit_rows=2), window_bytes=100_000, videos=FILMS)
    futures = [setup.worker.submit(unit) for unit in setup.units]
    assert not_done(futures[2])
    assert [type(error) for error in setup.fatal] == [ZeroDivisionError]
    setup.worker.close()
    assert not any(thread.is_alive() for thread in setup.worker._stages._threads)


@pytest.mark.parametrize("after_seconds", [0.0, 0.02])
def test_close_without_finish_ends_streams(make: Callable[..., Setup], after_seconds: float) -> None:
    class Slow(FakeDecoders):
        def stream(self, request: DecodeRequest, piece_frames: int):  # type: ignore[no-untyped-def]
            for piece in super().stream(request, piece_frames):
                time.sleep(0.05)
                yield piece

    setup = make(Slow(), recipe=film_recipe(unit_rows=2), window_bytes=50_000, videos=FILMS)
    futures = [setup.worker.submit(unit) for unit in setup.units[1:]]
    time.sleep(after_seconds)
    started = time.monotonic()
    setup.worker.close(finish=False)
    assert time.monotonic() - started < 2
    assert all(future.cancelled() for future in futures)
    assert not any(thread.is_alive() for thread in setup.worker._stages._threads)
    assert setup.worker._feed.active == 0


@pytest.mark.parametrize(
    ("window_mb", "frame_bytes", "clips", "piece_frames"),
    [
        (512, 256 * 256 * 3, 8, 80),  # 8 frames are 1.5 MiB
        (512, 720 * 1280 * 3, 3, 16),  # 21 MiB
        (64, 720 * 1280 * 3, 1, 8),
        (1, 720 * 1280 * 3, 1, 8),  # no room for a chunk: one at a time all the same
    ],
)
def test_clips_under_way_follow_from_the_window(
    window_mb: int, frame_bytes: int, clips: int, piece_frames: int
) -> None:
    assert StreamPlan.of(window_mb << 20, frame_bytes, 8) == StreamPlan(clips, piece_frames)


# blame


def test_bad_media_fails_its_clips_only(make: Callable[..., Setup]) -> None:
    setup = make(FakeDecoders(bad=["c"]))
    report = setup.worker.submit(setup.units[0]).result(10)
    statuses = {row["key"]: row["status"] for row in read_rows(setup.storage, unit_name(setup.units[0]))}
    assert statuses == {"a": "written", "b": "written", "c": "failed"}
    assert report.failures == (("c", "bad_media", "on purpose"),)
    assert (report.written, report.frames) == (3, 27)
    assert (report.decode_seconds, report.read_seconds) == (3 * DECODE_SECONDS, 3 * READ_SECONDS)
    assert min(report.encode_seconds, report.batch_seconds, report.rows_seconds, report.write_seconds) > 0


def test_a_unit_of_which_nothing_can_be_decoded_takes_the_encoder_no_time(make: Callable[..., Setup]) -> None:
    """So that the job's advice does not speak of an encoder that never ran."""
    setup = make(FakeDecoders(bad=["a", "b", "c"]))
    report = setup.worker.submit(setup.units[0]).result(10)
    assert (report.written, report.encode_seconds) == (0, 0.0)


def test_sample_bytes_count_samples_at_one_offset_of_two_shards(make: Callable[..., Setup]) -> None:
    setup = make(FakeDecoders(), recipe=recipe_of(1, 2, 8))
    assert setup.worker.submit(setup.units[0]).result(10).sample_bytes == 2 * (101 + 102 + 103)


@pytest.mark.parametrize("window_clips", [1, 4, 100])
def test_a_unit_error_fails_its_unit_and_gives_the_window_back(make: Callable[..., Setup], window_clips: int) -> None:
    decoders = FakeDecoders(seconds=0.002, errors={"b": UnitError("storage broke")})
    setup = make(decoders, recipe=recipe_of(2, 4, 4), window_bytes=window_clips * CLIP_BYTES)
    futures = [setup.worker.submit(unit) for unit in [*setup.units * 3]]
    failed = [future.exception(10) is not None for future in futures]
    assert failed == [True, False, False] * 3
    assert isinstance(futures[0].exception(), UnitError)
    setup.worker.close()
    assert setup.worker._window._used_bytes == 0
    assert not setup.storage.exists(unit_name(setup.units[0]))
    assert setup.storage.exists(unit_name(setup.units[1]))


def test_a_shard_that_changed_is_refused_every_time(make: Callable[..., Setup]) -> None:
    setup = make(FakeDecoders())
    setup.worker.submit(setup.units[0]).result(10)
    shard = Path(next(iter(setup.plan.shards)))
    shard.write_bytes(b"another")
    with pytest.raises(ShardError, match=r"changed since it was planned: size 2048 -> 7"):
        setup.worker.submit(setup.units[0]).result(10)
    shard.unlink()
    with pytest.raises(ShardError, match="cannot read shard"):
        require_unchanged(setup.plan.shards[str(shard)])


def test_a_store_that_cannot_be_written_fails_the_unit(make: Callable[..., Setup]) -> None:
    class Full(LocalStorage):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            raise StoreError(f"cannot write {name}: the disk is full")

    setup = make(FakeDecoders(), storage_type=Full)
    with pytest.raises(StoreError, match="disk is full"):
        setup.worker.submit(setup.units[0]).result(10)
    assert setup.fatal == []


# the unexpected


class BrokenEncoder(FakeEncoder):
    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None):  # type: ignore[no-untyped-def]
        raise MemoryError("no GPU memory")


class BrokenStorage(LocalStorage):
    def put_if_absent(self, name: str, data: bytes) -> bool:
        raise RuntimeError("a bug in storage")


class BrokenDecoders(FakeDecoders):
    def submit(self, *requests: DecodeRequest):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("a bug in decoders")


@pytest.mark.parametrize("encode_threads", [1, 2])
@pytest.mark.parametrize(
    ("decoders", "encoder", "storage_type", "expected"),
    [
        (BrokenDecoders(), FakeEncoder(), LocalStorage, ZeroDivisionError),
        (FakeDecoders(errors={"a": KeyError("a bug in decode")}), FakeEncoder(), LocalStorage, KeyError),
        (FakeDecoders(), BrokenEncoder(), LocalStorage, MemoryError),
        (FakeDecoders(), FakeEncoder(), BrokenStorage, RuntimeError),
    ],
)
def test_an_unexpected_exception_in_each_thread_is_fatal(
    make: Callable[..., Setup],
    decoders: Decoders,
    encoder: FakeEncoder,
    storage_type: type[LocalStorage],
    expected: type,
    encode_threads: int,
) -> None:
    setup = make(decoders, encoder, recipe_of(7, 2, 4), 3 * CLIP_BYTES, storage_type, encode_threads=encode_threads)
    futures = [setup.worker.submit(unit) for unit in setup.units]
    for future in futures:
        assert not_done(future)
    assert [type(error) for error in setup.fatal] == [expected]
    assert setup.fatal[0].__traceback__ is not None  # nobody foresaw it: it is to tell where it came from
    assert setup.worker.submit(setup.units[0]).cancelled()
    started = time.monotonic()
    setup.worker.close()
    assert time.monotonic() - started < 2
    assert not any(thread.is_alive() for thread in setup.worker._stages._threads)


def not_done(future: Future[object]) -> bool:
    """Whether the future is cancelled, within seconds."""
    deadline = time.monotonic() + 10
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    return future.cancelled()


def test_units_are_open_while_on_fatal_runs(tmp_path: Path) -> None:
    """So that a process that ends itself there is a lost worker to its owner, not a cancelled unit."""
    storage, plan = planned_store(tmp_path)
    seen: list[bool] = []
    futures: list[Future[object]] = []
    submitted = threading.Event()

    def on_fatal(_: BaseException) -> None:
        submitted.wait(5)
        seen.extend(future.done() for future in futures)

    worker = EncodeWorker(BrokenEncoder(), FakeDecoders(), storage, plan, 1 << 20, on_fatal)
    futures += [worker.submit(unit) for unit in plan.units()]  # type: ignore[misc]
    submitted.set()
    assert not_done(futures[0])
    assert seen == [False] * 3
    worker.close()


# the end


@pytest.mark.parametrize("encode_threads", [1, 2])
@pytest.mark.parametrize("after_seconds", [0.0, 0.01, 0.05])
def test_close_without_finish_cancels_and_commits_whole_units_only(
    make: Callable[..., Setup], after_seconds: float, encode_threads: int
) -> None:
    setup = make(
        FakeDecoders(seconds=0.02),
        recipe=recipe_of(40, 2, 8),
        window_bytes=4 * CLIP_BYTES,
        encode_threads=encode_threads,
    )
    futures = [setup.worker.submit(unit) for unit in setup.units]
    time.sleep(after_seconds)
    started = time.monotonic()
    setup.worker.close(finish=False)
    assert time.monotonic() - started < 2
    assert all(future.done() for future in futures)
    assert futures[-1].cancelled()
    assert setup.worker.submit(setup.units[0]).cancelled()
    assert not any(thread.is_alive() for thread in setup.worker._stages._threads)
    for unit, future in zip(setup.units, futures, strict=True):
        if not future.cancelled():
            assert setup.storage.exists(unit_name(unit))
    encode_store(setup.storage, setup.plan, FakeDecoders())


def test_close_without_finish_does_not_wait_for_a_hanging_decode(
    make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ends = threading.Event(), threading.Event()

    class Hanging:
        def submit(self, *requests: DecodeRequest) -> Hanging:
            return self

        def result(self) -> None:
            began.set()
            ends.wait(20)
            raise UnitError("the pool was closed")

    monkeypatch.setattr(worker_module, "_STOP_SECONDS", 0.1)
    setup = make(Hanging())
    futures = [setup.worker.submit(unit) for unit in setup.units]
    assert began.wait(10)
    setup.worker.close(finish=False)
    assert all(future.cancelled() for future in futures)
    ends.set()
    for thread in setup.worker._stages._threads:
        thread.join(10)
        assert not thread.is_alive()
    assert setup.fatal == []


def test_a_unit_that_its_owner_cancelled_does_no_harm(make: Callable[..., Setup]) -> None:
    setup = make(FakeDecoders(seconds=0.02))
    first, second = (setup.worker.submit(unit) for unit in setup.units[:2])
    first.cancel()
    assert second.result(10).written == 4
    setup.worker.close()
    assert setup.fatal == []
    assert setup.worker._window._used_bytes == 0


def test_seconds_say_what_the_encoder_waited_for(make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decode_requests._MESSAGE_REQUESTS", 1)

    class Slow(FakeDecoders):
        def submit(self, *requests: DecodeRequest):  # type: ignore[no-untyped-def]
            time.sleep(0.05)  # as a feed that reads an index from far away
            return super().submit(*requests)

    setup = make(Slow())
    report = setup.worker.submit(setup.units[0]).result(10)
    assert report.start_seconds > 0.04  # for the first frames
    assert report.starved_seconds > 0.08  # for those of two more requests
    assert report.encode_seconds < 0.1
    assert 0 < report.batch_seconds < 0.1
    assert 0 < report.rows_seconds < 0.1


# pure


def test_a_window_has_room_for_what_is_under_way_at_a_time(tmp_path: Path) -> None:
    _, plan = planned_store(tmp_path, SHARDS, recipe_of(2, 100, 100, ("512x512",)))
    (tmp_path / "films").mkdir()
    _, films = planned_store(tmp_path / "films", FILMS, film_recipe())
    assert default_window_bytes(films, 2) == 512 << 20
    assert default_window_bytes(plan, 3) == (2 * 3 + 4 * 100) * 9 * 512 * 512 * 3
    assert default_window_bytes(films, 20_000) == (2 * 20_000 + 4 * 2) * 41 * 32 * 32 * 3  # those of 81 frames stream


def clips_in(rows: range, shard: str = "s.tar", per_sample: int = 2) -> list[Clip]:
    from pipeline.decode.records import MediaInfo
    from pipeline.samples import Sample

    media = MediaInfo("video", "mp4", "h264", 64, 48, 0, 25.0, 90, 3.6, "yuv420p", 1)
    bucket = Bucket(9, 32, 32)
    return [
        Clip(
            row,
            shard,
            Sample(f"k{row // per_sample}", 512 * (row // per_sample), 100, "m", media),
            media,
            bucket,
            row % per_sample,
            Window(row, 9),
        )
        for row in rows
    ]


def test_slices_are_fixed_by_rows() -> None:
    recipe = recipe_of(2, 4, 8)
    for rows in (range(8, 16), range(8, 13), range(8, 9), range(8, 12)):
        clips, slices, done = clips_in(rows), [], 0
        while done < len(clips):
            slices.append([clip.row for clip in next_slice(clips, done, recipe, first_row=8)])
            done += len(slices[-1])
        assert slices == [list(part) for part in (rows[:4], rows[4:]) if part]


@pytest.mark.parametrize(
    ("group_clips", "expected"), [(0.5, [1] * 8), (1, [1] * 8), (2.9, [2, 2, 2, 2]), (3, [3, 1, 3, 1]), (9, [4, 4])]
)
def test_requests_group_windows_of_a_sample(group_clips: float, expected: list[int]) -> None:
    clips = clips_in(range(8), per_sample=4)
    requests = to_requests(clips, recipe_of(4), int(group_clips * CLIP_BYTES))
    assert [len(request.windows) for request in requests] == expected
    assert [window for request in requests for window in request.windows] == [clip.window for clip in clips]
    assert {request.source.offset for request in requests} == {0, 512}
    assert (requests[0].shape.height, requests[0].shape.width) == (32, 32)


@pytest.mark.parametrize(
    ("height", "group_clips", "expected"),
    [(64, 1000, [64, 36]), (64, 7, [7] * 14 + [2]), (6400, 1000, [4] * 25), (64000, 1000, [1] * 100)],
)
def test_messages_take_small_neighbours_together(height: int, group_clips: int, expected: list[int]) -> None:
    clips = clips_in(range(100), per_sample=1)
    clips = [dataclasses.replace(clip, media=dataclasses.replace(clip.media, height=height)) for clip in clips]
    messages = to_messages(clips, recipe_of(4), group_clips * CLIP_BYTES)
    assert [len(requests) for requests in messages] == expected
    requests = to_requests(clips, recipe_of(4), group_clips * CLIP_BYTES)
    assert [request for together in messages for request in together] == requests


def test_messages_count_the_windows_of_a_sample() -> None:
    clips = clips_in(range(12), per_sample=3)
    messages = to_messages(clips, recipe_of(4), 7 * CLIP_BYTES)
    assert [[len(request.windows) for request in requests] for requests in messages] == [[3, 3], [3, 3]]


def test_messages_count_the_padding() -> None:
    """As the window does."""
    clips = [dataclasses.replace(clip, window=Window(0, 1)) for clip in clips_in(range(12), per_sample=1)]
    messages = to_messages(clips, recipe_of(4), 4 * CLIP_BYTES)
    assert [len(requests) for requests in messages] == [4, 4, 4]


def test_requests_do_not_mix_shards() -> None:
    clips = clips_in(range(1), "a.tar", 9) + clips_in(range(1, 2), "b.tar", 9)
    assert [request.source.path for request in to_requests(clips, recipe_of(), 1 << 30)] == ["a.tar", "b.tar"]


def test_window_bounds_bytes_and_lets_waiters_go() -> None:
    window = ByteWindow(10)
    assert window.acquire(8)
    outcomes: list[bool] = []
    waiting = [threading.Thread(target=lambda: outcomes.append(window.acquire(4))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.02)
    assert outcomes == []
    window.release(8)
    for thread in waiting:
        thread.join(5)
    assert outcomes == [True, True]
    assert window.acquire(4, at_least_bytes=12)
    assert window.peak_bytes == 12
    late = threading.Thread(target=lambda: outcomes.append(window.acquire(1)))
    late.start()
    window.close()
    late.join(5)
    assert outcomes == [True, True, False]
    assert ByteWindow(10).acquire(11)
