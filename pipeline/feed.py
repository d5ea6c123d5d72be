"""The first stage of an encode worker: units in, decode requests out, within a window of bytes.

In:   UnitJobs; the plan and its index; decoders.
Out:  in row order, the messages under way of units of short clips (Decoding), or the pieces of long clips by turns
      (Piece).
Cost: decoded frames within `window`, or what one slice and one message need where that is more; one shard's placement.
Errors: ShardError for a shard that changed or is gone, UnitError when nobody can tell at the moment, or an object store
        does not give its index; StoreError for an index fragment that is damaged, missing, or cannot be read from a
        file system. Whatever breaks decoding comes with its outcome.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pipeline.buckets import Bucket
from pipeline.byte_window import LEAST_WINDOW_MB, ByteWindow
from pipeline.clip_streams import ClipStreams, StreamPlan
from pipeline.decode.records import DecodedClip, DecodeOutcome
from pipeline.decode_requests import Decoders, PendingDecode, require_unchanged, to_messages, to_requests
from pipeline.errors import DecodeError, LatentmillError
from pipeline.index import read_fragment
from pipeline.placement import PlacedShard
from pipeline.plan import Plan
from pipeline.shards import ShardRef
from pipeline.storage import Storage
from pipeline.store import absent_rows
from pipeline.unit_job import UnitJob

_MESSAGES_PER_WINDOW = 4  # One message must leave room in the window for others to be decoded beside it.
_CLIPS_PER_PROCESS = 2  # of the window: one under way, one asked for
_BATCHES = 4  # of the window: one in each stage that has frames, and one that fills
_NOTHING: Future[tuple[DecodeOutcome, ...]] = Future()
_NOTHING.set_result(())


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decode requests of a job under way, asked for together, and their bytes in the window."""

    job: UnitJob
    num_bytes: int
    pending: PendingDecode


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next frames of a job's long clip, or the error that ended it, and their bytes in the window."""

    job: UnitJob
    num_bytes: int
    place: int
    outcome: DecodeOutcome


def default_window_bytes(plan: Plan, decode_processes: int) -> int:
    """A window that leaves neither the decode processes nor the encoder idle. Pure."""
    recipe = plan.recipe
    wanted = (
        (_CLIPS_PER_PROCESS * decode_processes + _BATCHES * recipe.batch_size(bucket)) * bucket.decoded_bytes
        for bucket in plan.buckets
        if not recipe.streams(bucket)
    )
    return max(LEAST_WINDOW_MB << 20, *wanted, 0)


class Feed:
    """Asks for units' frames in the order in which they will be encoded."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        decoders: Decoders,
        window: ByteWindow,
        outbox: queue.Queue[Any],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._plan, self._storage, self._decoders, self._window, self._outbox = plan, storage, decoders, window, outbox
        self._placed: dict[str, PlacedShard] = {}
        self._streams = ClipStreams(decoders, window, on_fatal)
        self._streamed: Bucket | None = None  # whose clips are under way

    def start(self, job: UnitJob) -> None:
        """Ask for all frames of a unit; returns when the last of them is asked for."""
        recipe = self._plan.recipe
        job.clips = list(self._plan.clips_of(job.unit, self._placed_shard))
        job.rows = absent_rows(recipe, job.unit.bucket)
        if recipe.streams(job.unit.bucket):
            self._start_pieces(job)
        else:
            self._start_windows(job)

    @property
    def active(self) -> int:
        """How many long clips are not decoded to their end."""
        return self._streams.active

    def wait(self) -> None:
        """Wait until there are none."""
        self._streams.wait()

    def _start_pieces(self, job: UnitJob) -> None:
        if self._streamed != job.unit.bucket:  # pieces of one plan fit beside each other, those of two need not
            self._streams.wait()
            self._streamed = job.unit.bucket
        if not self._streams.active:
            self._window.wait_until_empty()
        recipe = self._plan.recipe
        frame_bytes = job.clips[0].decoded_bytes // job.unit.bucket.num_frames
        chunk_frames = recipe.encode.chunk_frames or recipe.encoder.geometry.default_chunk_frames
        plan = StreamPlan.of(self._window.limit_bytes, frame_bytes, chunk_frames)
        for place, request in enumerate(to_requests(job.clips, recipe, group_bytes=1)):
            if not job.future.done():
                self._streams.start(request, plan, functools.partial(self._take_piece, job, place))

    def _take_piece(self, job: UnitJob, place: int, outcome: DecodeOutcome | LatentmillError, num_bytes: int) -> bool:
        """In a clip's own thread: queue what came for the encoder. Whether more is wanted."""
        if not isinstance(outcome, DecodedClip | DecodeError):
            job.settle(outcome)
            return False
        self._outbox.put(Piece(job, num_bytes, place, outcome))
        return isinstance(outcome, DecodedClip) and not job.future.done()

    def _start_windows(self, job: UnitJob) -> None:
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
                # The batch stage gives back what is decoded and in no batch, when it sees that the job is over: here.
                self._outbox.put(Decoding(job, 0, _NOTHING))
                return
            self._outbox.put(Decoding(job, num_bytes, self._decoders.submit(*requests)))

    def _placed_shard(self, shard: ShardRef) -> PlacedShard:
        """The placement of one shard; only the latest is kept, since units follow shard order."""
        require_unchanged(shard)
        if shard.shard_id not in self._placed:
            placed = PlacedShard.of(read_fragment(self._storage, shard.shard_id), self._plan.recipe)
            self._placed = {shard.shard_id: placed}
        return self._placed[shard.shard_id]
