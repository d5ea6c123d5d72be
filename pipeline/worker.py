"""The encode worker: units in, committed Zarr shards out. Plain Python; Ray and the in-process runner only hold one.

In:   units, an encoder, a decode pool, the plan and the store.
Out:  one Future[UnitReport] per submitted unit.
Cost: decoded frames within `window_bytes`, or what one slice and one decode request need where that is more; the rows
      of each unit in flight; of each long clip under way the encoder's state.
Errors: UnitError or JobError in a unit's future; anything unexpected goes to `on_fatal`, and cancels all units.

Three threads, each with a bounded hand-over: feed (decode requests within the window of bytes), encode (fixed slices,
in row order), write (checksum, Zarr, commit). Frames wait nowhere else. A thread never gives up taking what the one
before hands over: once the worker stops it drops it, so that none of them waits for another that is gone.

Buckets of long clips (`Recipe.streams`) come to the encode thread in pieces, of several clips by turns, as they are
decoded (pipeline.clip_streams). Each clip has an encoder's stream of its own, so the turns change no bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from models.spec import VideoEncoder
from models.streamed import default_chunk_frames
from pipeline.buckets import Bucket
from pipeline.byte_window import ByteWindow
from pipeline.clip_streams import ClipStreams, StreamPlan
from pipeline.commit import RowResult, commit
from pipeline.decode.records import DecodedClip, DecodeOutcome
from pipeline.decode_requests import Decoders, PendingDecode, next_slice, require_unchanged, to_messages, to_requests
from pipeline.encode import EncoderTimer, StreamedClip, encode_slice
from pipeline.errors import DecodeError, LatentmillError
from pipeline.index import read_fragment
from pipeline.placement import PlacedShard
from pipeline.plan import Plan, Unit
from pipeline.shards import ShardRef
from pipeline.storage import Storage
from pipeline.store import absent_rows
from pipeline.unit_job import UnitJob, UnitReport

_STOP_SECONDS = 10.0
_MESSAGES_PER_WINDOW = 4  # One message must leave room in the window for others to be decoded beside it.


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Decode requests of a job under way, asked for together, and their bytes in the window."""

    job: UnitJob
    num_bytes: int
    pending: PendingDecode


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The next frames of a job's long clip, or the error that ended it, and their bytes in the window."""

    job: UnitJob
    num_bytes: int
    place: int
    outcome: DecodeOutcome


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
        self._submitted: queue.Queue[UnitJob | None] = queue.Queue()
        self._decoding: queue.Queue[_Decode | _Piece | None] = queue.Queue()  # bounded by the window
        self._encoded: queue.Queue[UnitJob | None] = queue.Queue(maxsize=1)
        self._stopping = threading.Event()
        self._free_since = time.perf_counter()
        self._has_begun = False
        self._blocked_seconds = 0.0
        self._timer = EncoderTimer()
        self._streams = ClipStreams(decoders, self._window, self._end)
        self._streamed: Bucket | None = None  # whose clips are under way
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
        self._submitted.put(UnitJob(unit, future))
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
                (item if isinstance(item, UnitJob) else item.job).settle(error)
            except BaseException as error:  # noqa: BLE001 (a dead stage must never look alive, whatever killed it)
                self._end(error)
            del item  # Or its frames would stay until the next one comes.
        if inbox is self._submitted:
            self._streams.wait()
        if outbox is not None:
            outbox.put(None)

    def _end(self, error: BaseException) -> None:
        self._on_fatal(error)
        self._stop()

    def _feed(self, job: UnitJob) -> None:
        recipe = self._plan.recipe
        job.clips = list(self._plan.clips_of(job.unit, self._placed_shard))
        job.rows = absent_rows(recipe, job.unit.bucket)
        if recipe.streams(job.unit.bucket):
            self._feed_pieces(job)
        else:
            self._feed_windows(job)

    def _feed_pieces(self, job: UnitJob) -> None:
        if self._streamed != job.unit.bucket:  # pieces of one plan fit beside each other, those of two need not
            self._streams.wait()
            self._streamed = job.unit.bucket
        if not self._streams.active:
            self._window.wait_until_empty()
        recipe = self._plan.recipe
        frame_bytes = job.clips[0].decoded_bytes // job.unit.bucket.num_frames
        chunk_frames = recipe.encode.chunk_frames or default_chunk_frames(recipe.encoder.geometry)
        plan = StreamPlan.of(self._window.limit_bytes, frame_bytes, chunk_frames)
        for place, request in enumerate(to_requests(job.clips, recipe, group_bytes=1)):
            if not job.future.done():
                self._streams.start(request, plan, functools.partial(self._take_piece, job, place))

    def _take_piece(self, job: UnitJob, place: int, outcome: DecodeOutcome | LatentmillError, num_bytes: int) -> bool:
        """In a clip's own thread: queue what came for the encoder. Whether more is wanted."""
        if not isinstance(outcome, DecodedClip | DecodeError):
            job.settle(outcome)
            return False
        self._decoding.put(_Piece(job, num_bytes, place, outcome))
        return isinstance(outcome, DecodedClip) and not job.future.done()

    def _feed_windows(self, job: UnitJob) -> None:
        self._streams.wait()
        recipe = self._plan.recipe
        clip_bytes = job.clips[0].decoded_bytes
        messages = to_messages(job.clips, recipe, self._window.limit_bytes // _MESSAGES_PER_WINDOW)
        num_clips = [sum(len(request.windows) for request in requests) for requests in messages]
        # A slice that is all there but for one clip must not keep that clip's message out.
        needed_bytes = (recipe.batch_size(job.unit.bucket) + max(num_clips)) * clip_bytes
        for requests, num_windows in zip(messages, num_clips, strict=True):
            num_bytes = num_windows * clip_bytes
            if job.future.done() or not self._window.acquire(num_bytes, needed_bytes):
                return
            try:
                pending = self._decoders.submit(*requests)
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

    def _encode(self, decode: _Decode | _Piece) -> None:
        if isinstance(decode, _Piece):
            self._encode_piece(decode)
        else:
            self._encode_window(decode)
        self._free_since = time.perf_counter()

    def _encode_window(self, decode: _Decode) -> None:
        job = decode.job
        clip_bytes = job.clips[0].decoded_bytes
        try:
            outcomes = decode.pending.result()
        except LatentmillError as error:
            self._window.release(decode.num_bytes)
            job.settle(error)
        else:
            assert len(outcomes) * clip_bytes == decode.num_bytes, f"{len(outcomes)} outcomes, not one per window"
            job.outcomes += outcomes
            job.count(outcomes)
        self._count_wait(job)
        if job.future.done():
            self._window.release(len(job.outcomes) * clip_bytes)
            job.outcomes.clear()
        else:
            self._encode_ready(job)

    def _encode_ready(self, job: UnitJob) -> None:
        """Encode every slice of the job whose clips are all there, and hand the job on after its last."""
        recipe = self._plan.recipe
        first_row = self._first_row(job)
        while job.outcomes and not self._stopping.is_set():
            clips = next_slice(job.clips, len(job.results), recipe, first_row)
            if len(job.outcomes) < len(clips):
                return
            with self._timed(job):
                rows, results = encode_slice(self._encoder, recipe, clips, job.outcomes[: len(clips)], self._timer)
            del job.outcomes[: len(clips)]
            self._window.release(len(clips) * clips[0].decoded_bytes)
            start = clips[0].row - first_row
            job.rows[start : start + len(clips)] = rows
            job.results.update(enumerate(results, start=len(job.results)))
        self._hand_on_if_complete(job)

    def _encode_piece(self, piece: _Piece) -> None:
        job, outcome = piece.job, piece.outcome
        self._count_wait(job)
        try:
            if job.future.done():
                return
            with self._timed(job):
                result: RowResult | None = outcome if isinstance(outcome, DecodeError) else self._push(piece, outcome)
        finally:
            self._window.release(piece.num_bytes)
        if result is not None:
            job.streams.pop(piece.place, None)
            job.results[piece.place] = result
            self._hand_on_if_complete(job)

    def _push(self, piece: _Piece, decoded: DecodedClip) -> RowResult | None:
        job, place = piece.job, piece.place
        job.count([decoded])
        if place not in job.streams:
            clip = job.clips[place]
            row = job.rows[clip.row - self._first_row(job)]
            job.streams[place] = StreamedClip(self._encoder, self._plan.recipe, clip, row, self._timer)
        return job.streams[place].push(decoded)

    def _count_wait(self, job: UnitJob) -> None:
        """Until its first frames a worker starts; after them it starves."""
        seconds = time.perf_counter() - self._free_since
        if self._has_begun:
            job.starved_seconds += seconds
        else:
            job.start_seconds += seconds
        self._has_begun = True

    @contextlib.contextmanager
    def _timed(self, job: UnitJob) -> Iterator[None]:
        """Count the seconds inside as the encoder's, and the rest as copying."""
        started, encoded = time.perf_counter(), self._timer.seconds
        yield
        encode_seconds = self._timer.seconds - encoded
        job.encode_seconds += encode_seconds
        job.copy_seconds += time.perf_counter() - started - encode_seconds

    def _first_row(self, job: UnitJob) -> int:
        return job.unit.number * self._plan.recipe.unit_rows(job.unit.bucket)

    def _hand_on_if_complete(self, job: UnitJob) -> None:
        if len(job.results) < len(job.clips):
            return
        # The time in `put` goes to the next unit: this one's report may be out before `put` returns.
        job.blocked_seconds = self._blocked_seconds
        started = time.perf_counter()
        self._encoded.put(job)
        self._blocked_seconds = time.perf_counter() - started

    def _write(self, job: UnitJob) -> None:
        started = time.perf_counter()
        results = [job.results[place] for place in range(len(job.clips))]
        committed = commit(self._storage, self._plan, job.unit, job.clips, results, job.rows)
        job.settle(job.report(committed, time.perf_counter() - started))
