"""The encode worker: units in, committed Zarr shards out. Plain Python; Ray and the in-process runner only hold one.

In:   units, an encoder, a decode pool, the plan and the store.
Out:  one Future[UnitReport] per submitted unit.
Cost: decoded frames within `window_bytes`, or what one slice and one message need where that is more; the rows of each
      unit in flight; of each long clip under way the encoder's state.
Errors: UnitError or JobError in a unit's future; anything unexpected goes to `on_fatal`, and cancels all units.

Five stages, so that the encoder waits for nothing but frames: feed (decode requests within the window of bytes), batch
(fixed slices, in row order), encode, rows (what is stored of them), write (checksum, Zarr, commit). Frames wait between
the first three only.

Buckets of long clips (`Recipe.streams`) come to the encode stage in pieces, of several clips by turns, as they are
decoded (pipeline.clip_streams). Each clip has an encoder's stream of its own, so the turns change no bit.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from models.spec import Posterior, VideoEncoder
from pipeline.byte_window import ByteWindow
from pipeline.commit import RowResult, commit
from pipeline.decode.records import DecodedClip
from pipeline.decode_requests import Decoders, next_slice
from pipeline.encode import Batch, EncoderTimer, StreamedClip, encode_batch, make_batch, to_rows
from pipeline.errors import DecodeError, LatentmillError
from pipeline.feed import Decoding, Feed, Piece
from pipeline.plan import Plan, Unit
from pipeline.stages import Stages
from pipeline.storage import Storage
from pipeline.unit_job import UnitJob, UnitReport

_STOP_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A batch of a job, and its bytes in the window; `start` is its first row in the unit."""

    job: UnitJob
    num_bytes: int
    start: int
    batch: Batch


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """What the encoder made of a slice."""

    job: UnitJob
    start: int
    batch: Batch
    posterior: Posterior | None


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
        self._encoder, self._storage, self._plan = encoder, storage, plan
        self._on_fatal = on_fatal
        self._window = ByteWindow(window_bytes)
        self._in_flight: set[Future[UnitReport]] = set()
        self._submitted: queue.Queue[UnitJob | None] = queue.Queue()
        self._decoding: queue.Queue[Decoding | Piece | None] = queue.Queue()  # bounded by the window
        self._batched: queue.Queue[_Slice | Piece | None] = queue.Queue(maxsize=1)
        self._encoded: queue.Queue[_Encoded | UnitJob | None] = queue.Queue(maxsize=2)
        self._finished: queue.Queue[UnitJob | None] = queue.Queue(maxsize=1)
        self._free_since = time.perf_counter()
        self._has_begun = False
        self._blocked_seconds = 0.0
        self._timer = EncoderTimer()
        self._stages = Stages(_fail, self._end)
        self._feed = Feed(plan, storage, decoders, self._window, self._decoding, self._end)
        self._stages.start("feed", self._feed.start, self._submitted, self._decoding, at_end=self._feed.wait)
        self._stages.start("batch", self._batch, self._decoding, self._batched)
        self._stages.start("encode", self._encode, self._batched, self._encoded)
        self._stages.start("rows", self._to_rows, self._encoded, self._finished)
        self._stages.start("write", self._write, self._finished)

    @property
    def peak_window_bytes(self) -> int:
        """The most decoded bytes that were asked for and not yet encoded."""
        return self._window.peak_bytes

    def submit(self, unit: Unit) -> Future[UnitReport]:
        """Queue a unit; its future holds the report, or the error that the unit failed with."""
        future: Future[UnitReport] = Future()
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        self._submitted.put(UnitJob(unit, future))
        if self._stages.stopping:
            future.cancel()
        return future

    def close(self, finish: bool = True) -> None:
        """Finish the units in flight, or cancel them; then end the threads.

        Without `finish` a decode, encoder call or commit that has begun is waited for `_STOP_SECONDS` at most.
        """
        if not finish:
            self._stop()
        self._submitted.put(None)
        self._stages.join(None if finish else _STOP_SECONDS)
        self._stop()

    def _stop(self) -> None:
        self._stages.stop()
        self._window.close()
        for future in list(self._in_flight):
            future.cancel()

    def _end(self, error: BaseException) -> None:
        self._on_fatal(error)
        self._stop()

    # batch

    def _batch(self, decoding: Decoding | Piece) -> None:
        if isinstance(decoding, Piece):
            self._batched.put(decoding)
            return
        job = decoding.job
        clip_bytes = job.clips[0].decoded_bytes
        try:
            outcomes = decoding.pending.result()
        except LatentmillError as error:
            self._window.release(decoding.num_bytes)
            job.settle(error)
        else:
            assert len(outcomes) * clip_bytes == decoding.num_bytes, f"{len(outcomes)} outcomes, not one per window"
            job.outcomes += outcomes
            job.count(outcomes)
        if job.future.done():
            self._window.release(len(job.outcomes) * clip_bytes)
            job.outcomes.clear()
        else:
            self._batch_slices(job)

    def _batch_slices(self, job: UnitJob) -> None:
        """Hand on every slice of the job whose clips are all there."""
        recipe, first_row = self._plan.recipe, self._first_row(job)
        while job.outcomes and not self._stages.stopping:
            clips = next_slice(job.clips, job.batched_clips, recipe, first_row)
            if len(job.outcomes) < len(clips):
                return
            began = time.perf_counter()
            batch = make_batch(recipe, clips, job.outcomes[: len(clips)])
            del job.outcomes[: len(clips)]
            job.batched_clips += len(clips)
            job.batch_seconds += time.perf_counter() - began
            num_bytes = len(clips) * clips[0].decoded_bytes
            self._batched.put(_Slice(job, num_bytes, clips[0].row - first_row, batch))
            del batch  # or its frames would stay until there is another one

    # encode

    def _encode(self, item: _Slice | Piece) -> None:
        job = item.job
        self._count_wait(job)
        try:
            if not job.future.done():
                self._hand_on(self._encode_piece(item) if isinstance(item, Piece) else self._encode_slice(item))
        finally:
            self._window.release(item.num_bytes)
            self._free_since = time.perf_counter()

    def _encode_slice(self, item: _Slice) -> _Encoded:
        began = time.perf_counter()
        posterior = encode_batch(self._encoder, self._plan.recipe, item.batch)
        item.job.encode_seconds += time.perf_counter() - began
        return _Encoded(item.job, item.start, dataclasses.replace(item.batch, frames=None), posterior)

    def _encode_piece(self, piece: Piece) -> UnitJob | None:
        """The job when it is complete."""
        job, outcome = piece.job, piece.outcome
        began, encoded = time.perf_counter(), self._timer.seconds
        result: RowResult | None = outcome if isinstance(outcome, DecodeError) else self._push(piece, outcome)
        encode_seconds = self._timer.seconds - encoded
        job.encode_seconds += encode_seconds
        job.copy_seconds += time.perf_counter() - began - encode_seconds
        if result is None:
            return None
        job.streams.pop(piece.place, None)
        job.results[piece.place] = result
        return job if len(job.results) == len(job.clips) else None

    def _push(self, piece: Piece, decoded: DecodedClip) -> RowResult | None:
        job, place = piece.job, piece.place
        job.count([decoded])
        if place not in job.streams:
            clip = job.clips[place]
            row = job.rows[clip.row - self._first_row(job)]
            job.streams[place] = StreamedClip(self._encoder, self._plan.recipe, clip, row, self._timer)
        return job.streams[place].push(decoded)

    def _count_wait(self, job: UnitJob) -> None:
        """Until its first frames a worker starts; after them it starves."""
        job.blocked_seconds += self._blocked_seconds
        self._blocked_seconds = 0.0
        seconds = time.perf_counter() - self._free_since
        if self._has_begun:
            job.starved_seconds += seconds
        else:
            job.start_seconds += seconds
        self._has_begun = True

    def _hand_on(self, done: _Encoded | UnitJob | None) -> None:
        if done is None:
            return
        # The time in `put` goes to whatever comes next: this unit's report may be out before `put` returns.
        began = time.perf_counter()
        self._encoded.put(done)
        self._blocked_seconds = time.perf_counter() - began

    # rows, write

    def _to_rows(self, done: _Encoded | UnitJob) -> None:
        if isinstance(done, UnitJob):
            self._finished.put(done)
            return
        job = done.job
        began = time.perf_counter()
        rows, results = to_rows(self._plan.recipe, done.batch, done.posterior)
        job.rows[done.start : done.start + len(rows)] = rows
        job.results.update(enumerate(results, start=len(job.results)))
        job.rows_seconds += time.perf_counter() - began
        if len(job.results) == len(job.clips):
            self._finished.put(job)

    def _write(self, job: UnitJob) -> None:
        began = time.perf_counter()
        results = [job.results[place] for place in range(len(job.clips))]
        committed = commit(self._storage, self._plan, job.unit, job.clips, results, job.rows)
        job.settle(job.report(committed, time.perf_counter() - began))

    def _first_row(self, job: UnitJob) -> int:
        return job.unit.number * self._plan.recipe.unit_rows(job.unit.bucket)


def _fail(item: Any, error: LatentmillError) -> None:
    (item if isinstance(item, UnitJob) else item.job).settle(error)
