"""The encode stage of a worker: batches, or pieces of long clips, through the encoder; one Caller per thread.

In:   Slice and Piece, from one queue.
Out:  Encoded for every slice, and a job whose last piece is encoded.
Cost: encoder calls, as many at a time as there are callers; the encoder's state of each long clip under way, until the
      clip ends or its unit fails.
Errors: the encoder's own.

On a CPU two calls at a time, on half of the threads each, use what one call leaves idle wherever a layer cannot share
its work out among threads: a fifth more clips per second (infra/LOG.md).
"""

from __future__ import annotations

import dataclasses
import queue
import time
from typing import Any

import torch

from models.spec import Posterior, VideoEncoder
from pipeline.buckets import Bucket
from pipeline.byte_window import ByteWindow
from pipeline.commit import RowResult
from pipeline.decode.records import DecodedClip
from pipeline.encode import Batch, EncoderTimer, StreamedClip, encode_batch
from pipeline.errors import DecodeError, LatentmillError
from pipeline.feed import Piece
from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.unit_job import UnitJob


@dataclasses.dataclass(frozen=True)
class Slice:
    """A batch of a job, and its bytes in the window; `place` is its first clip's in the job."""

    job: UnitJob
    num_bytes: int
    place: int
    batch: Batch


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the encoder made of a slice, whose frames are gone."""

    job: UnitJob
    place: int
    batch: Batch
    posterior: Posterior | None


def num_callers(encoder: VideoEncoder, recipe: Recipe, threads: int) -> int:
    """How many encoder calls at a time `threads` CPU threads are best shared by. Pure.

    The pieces of a long clip come one after another, so where the recipe allows such clips there is one caller. Whether
    the plan has any must not matter: it may grow, and the threads of a call change the last bits of a latent.
    """
    buckets = (Bucket(frames, *size) for frames in recipe.sampling.frames for size in recipe.sizes)
    has_pieces = any(map(recipe.streams, buckets))
    return 1 if threads == 1 or has_pieces or encoder.one_at_a_time else 2


class Caller:
    """One thread of the stage, whose calls have `threads` CPU threads. `outbox` takes what is done.

    Its seconds count as `share` of the stage's; not what it waits after its last item.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        plan: Plan,
        window: ByteWindow,
        outbox: queue.Queue[Any],
        share: float,
        threads: int,
    ) -> None:
        self._encoder, self._plan, self._window, self._outbox = encoder, plan, window, outbox
        self._share, self._threads = share, threads
        self._timer = EncoderTimer()
        self._free_since = time.perf_counter()
        self._has_begun = False
        self._blocked_seconds = 0.0

    def handle(self, item: Slice | Piece) -> None:
        """Encode it, hand it on, and give its bytes back."""
        if not self._has_begun:
            torch.set_num_threads(self._threads)  # of this thread, and of those that begin later
            torch.get_num_threads()  # or another thread's setting, made before the first call here, would count
        self._count_wait(item.job)
        try:
            if item.job.future.done():
                item.job.streams.clear()
            else:
                self._hand_on(self._encode_piece(item) if isinstance(item, Piece) else self._encode_slice(item))
        except LatentmillError:
            item.job.streams.clear()  # Before the unit has failed: its retry comes at once and needs their memory.
            raise
        finally:
            self._window.release(item.num_bytes)
            self._free_since = time.perf_counter()

    def _encode_slice(self, item: Slice) -> Encoded:
        began = time.perf_counter()
        posterior = encode_batch(self._encoder, self._plan.recipe, item.batch)
        if posterior is not None:
            item.job.spend(encode=(time.perf_counter() - began) * self._share)
        return Encoded(item.job, item.place, dataclasses.replace(item.batch, frames=None), posterior)

    def _encode_piece(self, piece: Piece) -> UnitJob | None:
        """The job when it is complete."""
        job, outcome = piece.job, piece.outcome
        began, encoded = time.perf_counter(), self._timer.seconds
        result: RowResult | None = outcome if isinstance(outcome, DecodeError) else self._push(piece, outcome)
        encode_seconds = self._timer.seconds - encoded
        job.spend(encode=encode_seconds, copy=time.perf_counter() - began - encode_seconds)
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
            row = job.rows[clip.row - self._plan.first_row(job.unit)]
            job.streams[place] = StreamedClip(self._encoder, self._plan.recipe, clip, row, self._timer)
        return job.streams[place].push(decoded)

    def _count_wait(self, job: UnitJob) -> None:
        """Until its first frames a caller starts; after them it starves."""
        waited = "starved" if self._has_begun else "start"
        seconds = time.perf_counter() - self._free_since
        job.spend(blocked=self._blocked_seconds * self._share, **{waited: seconds * self._share})
        self._blocked_seconds = 0.0
        self._has_begun = True

    def _hand_on(self, done: Encoded | UnitJob | None) -> None:
        if done is None:
            return
        # The time in `put` goes to whatever comes next: this unit's report may be out before `put` returns.
        began = time.perf_counter()
        self._outbox.put(done)
        self._blocked_seconds = time.perf_counter() - began
