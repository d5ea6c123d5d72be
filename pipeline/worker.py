"""The encode worker: units in, committed Zarr shards out. Plain Python; Ray and the in-process runner only hold one.

In:   units, an encoder, a decode pool, the plan and the store.
Out:  one Future[UnitReport] per submitted unit.
Cost: decoded frames within `window_bytes`, or what one slice and one decode request need where that is more; the rows
      of each unit in flight.
Errors: UnitError or JobError in a unit's future; anything unexpected goes to `on_fatal`, and cancels all units.

Three threads, each with a bounded hand-over: feed (decode requests within the window of bytes), encode (fixed slices,
in row order), write (checksum, Zarr, commit). Frames wait nowhere else. A thread never gives up taking what the one
before hands over: once the worker stops it drops it, so that none of them waits for another that is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from models.spec import VideoEncoder
from pipeline.byte_window import ByteWindow
from pipeline.commit import CommitReport, RowResult, commit
from pipeline.decode.records import DecodeOutcome
from pipeline.decode_requests import Decoders, PendingDecode, next_slice, require_unchanged, to_requests
from pipeline.encode import encode_slice
from pipeline.errors import LatentmillError, SampleError
from pipeline.index import read_fragment
from pipeline.placement import Clip, PlacedShard
from pipeline.plan import Plan, Unit
from pipeline.shards import ShardRef
from pipeline.storage import Storage
from pipeline.store import absent_rows

_FAILURES_TOLD = 20
_STOP_SECONDS = 10.0
_REQUESTS_PER_WINDOW = 4  # One request must leave room in the window for others to be decoded beside it.


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """What one unit cost and what became of it.

    failed: clips by reason. failures: (key, reason, detail) of the first of them. Seconds are wall time of the encode
    thread, `write_seconds` of the write thread; `starved_seconds` it waited for frames, `blocked_seconds` for the write
    thread to take the unit before. won: False when another worker had committed the unit already.
    """

    unit: Unit
    written: int
    failed: dict[str, int]
    failures: tuple[tuple[str, str, str], ...]
    frames: int
    bytes_read: int
    bytes_written: int
    encode_seconds: float
    starved_seconds: float
    blocked_seconds: float
    write_seconds: float
    won: bool


@dataclasses.dataclass
class _Job:
    """A unit on its way through the threads, in the hands of one at a time but for its future.

    The feed thread sets clips and rows; `outcomes` are decoded and not yet encoded.
    """

    unit: Unit
    future: Future[UnitReport]
    clips: list[Clip] = dataclasses.field(default_factory=list)
    rows: np.ndarray = dataclasses.field(init=False)
    outcomes: list[DecodeOutcome] = dataclasses.field(default_factory=list)
    results: list[RowResult] = dataclasses.field(default_factory=list)
    encode_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Decode:
    """One decode request of a job under way, and its bytes in the window."""

    job: _Job
    num_bytes: int
    pending: PendingDecode

    @property
    def future(self) -> Future[UnitReport]:
        return self.job.future


class EncodeWorker:
    """Encodes units one after another, decoding ahead and writing behind.

    `on_fatal` is told of an unexpected exception, in the thread that met it, while the units' futures are still open.
    When it returns, they are cancelled.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        decoders: Decoders,
        storage: Storage,
        plan: Plan,
        window_bytes: int,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._encoder, self._decoders, self._storage, self._plan = encoder, decoders, storage, plan
        self._on_fatal = on_fatal
        self._placed: dict[str, PlacedShard] = {}
        self._window = ByteWindow(window_bytes)
        self._in_flight: set[Future[UnitReport]] = set()
        self._submitted: queue.Queue[_Job | None] = queue.Queue()
        self._decoding: queue.Queue[_Decode | None] = queue.Queue()  # bounded by the window
        self._encoded: queue.Queue[_Job | None] = queue.Queue(maxsize=1)
        self._stopping = threading.Event()
        self._free_since = time.perf_counter()
        self._blocked_seconds = 0.0
        self._threads = [
            self._start("feed", self._feed, self._submitted, self._decoding),
            self._start("encode", self._encode, self._decoding, self._encoded),
            self._start("write", self._write, self._encoded, None),
        ]

    @property
    def peak_window_bytes(self) -> int:
        """The most decoded bytes that were asked for and not yet encoded."""
        return self._window.peak_bytes

    def submit(self, unit: Unit) -> Future[UnitReport]:
        """Queue a unit; its future holds the report, or the error that the unit failed with."""
        future: Future[UnitReport] = Future()
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        self._submitted.put(_Job(unit, future))
        if self._stopping.is_set():
            future.cancel()
        return future

    def close(self, finish: bool = True) -> None:
        """Finish the units in flight, or cancel them; then end the threads.

        Without `finish` a decode, encoder call or commit that has begun is waited for `_STOP_SECONDS` at most.
        """
        if not finish:
            self._stop()
        self._submitted.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(None if finish else max(0.0, deadline - time.monotonic()))
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._window.close()
        for future in list(self._in_flight):
            future.cancel()

    def _start(
        self, name: str, handle: Callable[[Any], None], inbox: queue.Queue[Any], outbox: queue.Queue[Any] | None
    ) -> threading.Thread:
        thread = threading.Thread(
            target=self._run, args=(handle, inbox, outbox), name=f"latentmill-{name}", daemon=True
        )
        thread.start()
        return thread

    def _run(self, handle: Callable[[Any], None], inbox: queue.Queue[Any], outbox: queue.Queue[Any] | None) -> None:
        """One thread: handle, or after a stop drop, what comes in up to the None that ends it."""
        while (item := inbox.get()) is not None:
            try:
                if not self._stopping.is_set():
                    handle(item)
            except LatentmillError as error:
                _settle(item.future, error)
            except BaseException as error:  # noqa: BLE001 (a dead stage must never look alive, whatever killed it)
                self._on_fatal(error)
                self._stop()
            del item  # Or its frames would stay until the next one comes.
        if outbox is not None:
            outbox.put(None)

    def _feed(self, job: _Job) -> None:
        recipe = self._plan.recipe
        job.clips = list(self._plan.clips_of(job.unit, self._placed_shard))
        job.rows = absent_rows(recipe, job.unit.bucket)
        clip_bytes = job.clips[0].decoded_bytes
        requests = to_requests(job.clips, recipe, self._window.limit_bytes // _REQUESTS_PER_WINDOW)
        # A slice that is all there but for one clip must not keep that clip's request out.
        needed_bytes = (recipe.encode.batch_size + max(len(request.windows) for request in requests)) * clip_bytes
        for request in requests:
            num_bytes = len(request.windows) * clip_bytes
            if job.future.done() or not self._window.acquire(num_bytes, needed_bytes):
                return
            try:
                pending = self._decoders.submit(request)
            except LatentmillError:
                self._window.release(num_bytes)
                raise
            self._decoding.put(_Decode(job, num_bytes, pending))

    def _placed_shard(self, shard: ShardRef) -> PlacedShard:
        """The placement of one shard; only the latest is kept, since units follow shard order."""
        require_unchanged(shard)
        if shard.shard_id not in self._placed:
            placed = PlacedShard.of(read_fragment(self._storage, shard.shard_id), self._plan.recipe)
            self._placed = {shard.shard_id: placed}
        return self._placed[shard.shard_id]

    def _encode(self, decode: _Decode) -> None:
        job = decode.job
        clip_bytes = job.clips[0].decoded_bytes
        try:
            outcomes = decode.pending.result()
        except LatentmillError as error:
            self._window.release(decode.num_bytes)
            _settle(job.future, error)
        else:
            assert len(outcomes) * clip_bytes == decode.num_bytes, f"{len(outcomes)} outcomes, not one per window"
            job.outcomes += outcomes
        job.starved_seconds += time.perf_counter() - self._free_since
        if job.future.done():
            self._window.release(len(job.outcomes) * clip_bytes)
            job.outcomes.clear()
        else:
            self._encode_ready(job)
        self._free_since = time.perf_counter()

    def _encode_ready(self, job: _Job) -> None:
        """Encode every slice of the job whose clips are all there, and hand the job on after its last."""
        recipe = self._plan.recipe
        first_row = job.unit.number * recipe.unit_rows(job.unit.bucket)
        while job.outcomes and not self._stopping.is_set():
            clips = next_slice(job.clips, len(job.results), recipe, first_row)
            if len(job.outcomes) < len(clips):
                return
            started = time.perf_counter()
            rows, results = encode_slice(self._encoder, recipe, clips, job.outcomes[: len(clips)])
            job.encode_seconds += time.perf_counter() - started
            del job.outcomes[: len(clips)]
            self._window.release(len(clips) * clips[0].decoded_bytes)
            start = clips[0].row - first_row
            job.rows[start : start + len(clips)] = rows
            job.results += results
        if len(job.results) == len(job.clips):
            self._hand_on(job)

    def _hand_on(self, job: _Job) -> None:
        # The time in `put` goes to the next unit: this one's report may be out before `put` returns.
        job.blocked_seconds = self._blocked_seconds
        started = time.perf_counter()
        self._encoded.put(job)
        self._blocked_seconds = time.perf_counter() - started

    def _write(self, job: _Job) -> None:
        started = time.perf_counter()
        committed = commit(self._storage, self._plan, job.unit, job.clips, job.results, job.rows)
        _settle(job.future, _report(job, committed, time.perf_counter() - started))


def _settle(future: Future[UnitReport], outcome: UnitReport | LatentmillError) -> None:
    """Resolve the future, unless it was cancelled or another thread came first."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, UnitReport):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)


def _report(job: _Job, committed: CommitReport, write_seconds: float) -> UnitReport:
    pairs = list(zip(job.clips, job.results, strict=True))
    failures = [
        (clip.sample.key, error.reason, error.detail) for clip, error in pairs if isinstance(error, SampleError)
    ]
    sizes = {(clip.shard_url, clip.sample.offset): clip.sample.size_bytes for clip in job.clips}
    return UnitReport(
        unit=job.unit,
        written=committed.written,
        failed=committed.failed,
        failures=tuple(failures[:_FAILURES_TOLD]),
        frames=sum(clip.window.num_frames for clip, result in pairs if not isinstance(result, SampleError)),
        bytes_read=sum(sizes.values()),
        bytes_written=committed.bytes_written,
        encode_seconds=job.encode_seconds,
        starved_seconds=job.starved_seconds,
        blocked_seconds=job.blocked_seconds,
        write_seconds=write_seconds,
        won=committed.won,
    )
