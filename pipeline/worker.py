"""The encode worker: units in, committed Zarr shards out. Plain Python; Ray and the in-process runner only hold one.

In:   units, an encoder, a decode pool, the plan and the store.
Out:  one Future[UnitReport] per submitted unit.
Cost: decoded frames within `window_bytes`, or what one slice and one message need where that is more, and those encoded
      frames whose message is not yet done; the rows of each unit in flight; of each long clip under way the encoder's
      state.
Errors: UnitError or JobError in a unit's future; anything unexpected goes to `on_fatal`, and cancels all units.

Five stages, so that the encoder waits for nothing but frames: feed (decode requests within the window of bytes), batch
(fixed slices, in row order), encode (one call at a time, or two), rows (what is stored of them, in any order), write
(checksum, Zarr, commit). Frames wait between the first three only.

Buckets of long clips (`Recipe.streams`) come to the encode stage in pieces, of several clips by turns, as they are
decoded (pipeline.clip_streams). Each clip has an encoder's stream of its own, so the turns change no bit.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from models.spec import VideoEncoder
from pipeline.byte_window import ByteWindow
from pipeline.commit import commit
from pipeline.decode_requests import Decoders, next_slice
from pipeline.encode import make_batch, to_rows
from pipeline.encode_stage import Caller, Encoded, Slice, num_callers
from pipeline.errors import LatentmillError
from pipeline.feed import Decoding, Feed, Piece
from pipeline.plan import Plan, Unit
from pipeline.stages import Stages
from pipeline.storage import Storage
from pipeline.unit_job import UnitJob, UnitReport

_STOP_SECONDS = 10.0


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
        encode_threads: int = 1,
    ) -> None:
        self._storage, self._plan, self._on_fatal = storage, plan, on_fatal
        self._window = ByteWindow(window_bytes)
        self._in_flight: set[Future[UnitReport]] = set()
        self._submitted: queue.Queue[UnitJob | None] = queue.Queue()
        self._decoding: queue.Queue[Decoding | Piece | None] = queue.Queue()  # bounded by the window
        self._batched: queue.Queue[Slice | Piece | None] = queue.Queue(maxsize=1)
        self._encoded: queue.Queue[Encoded | UnitJob | None] = queue.Queue(maxsize=2)
        self._finished: queue.Queue[UnitJob | None] = queue.Queue(maxsize=1)
        callers = self._callers(encoder, encode_threads)
        self._stages = Stages(_fail, self._end)
        self._feed = Feed(plan, storage, decoders, self._window, self._decoding, self._end)
        self._stages.start("feed", self._submitted, self._feed.start, outbox=self._decoding, at_end=self._feed.wait)
        self._stages.start("batch", self._decoding, self._batch, outbox=self._batched)
        self._stages.start("encode", self._batched, *(caller.handle for caller in callers), outbox=self._encoded)
        self._stages.start("rows", self._encoded, self._to_rows, outbox=self._finished)
        self._stages.start("write", self._finished, self._write)

    def _callers(self, encoder: VideoEncoder, threads: int) -> list[Caller]:
        count = num_callers(encoder, self._plan.recipe, threads)
        arguments = (encoder, self._plan, self._window, self._encoded, 1 / count, threads // count)
        return [Caller(*arguments) for _ in range(count)]

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
        recipe, first_row = self._plan.recipe, self._plan.first_row(job.unit)
        while job.outcomes and not self._stages.stopping:
            clips = next_slice(job.clips, job.batched_clips, recipe, first_row)
            if len(job.outcomes) < len(clips):
                return
            began = time.perf_counter()
            batch = make_batch(recipe, clips, job.outcomes[: len(clips)])
            del job.outcomes[: len(clips)]
            place, job.batched_clips = job.batched_clips, job.batched_clips + len(clips)
            job.spend(batch=time.perf_counter() - began)
            num_bytes = len(clips) * clips[0].decoded_bytes
            self._batched.put(Slice(job, num_bytes, place, batch))
            del batch  # or its frames would stay until there is another one

    # rows, write

    def _to_rows(self, done: Encoded | UnitJob) -> None:
        if isinstance(done, UnitJob):
            self._finished.put(done)
            return
        job = done.job
        began = time.perf_counter()
        rows, results = to_rows(self._plan.recipe, done.batch, done.posterior)
        start = done.batch.clips[0].row - self._plan.first_row(job.unit)
        job.rows[start : start + len(rows)] = rows
        job.results.update(enumerate(results, start=done.place))
        job.spend(rows=time.perf_counter() - began)
        if len(job.results) == len(job.clips):
            self._finished.put(job)

    def _write(self, job: UnitJob) -> None:
        began = time.perf_counter()
        results = [job.results[place] for place in range(len(job.clips))]
        committed = commit(self._storage, self._plan, job.unit, job.clips, results, job.rows)
        job.spend(write=time.perf_counter() - began)
        job.settle(job.report(committed))


def _fail(item: Any, error: LatentmillError) -> None:
    (item if isinstance(item, UnitJob) else item.job).settle(error)
