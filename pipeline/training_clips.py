"""Clips for training, from the same index, sizes and decoders that encode uses.

In:   a Curriculum (pipeline.curriculum), decoders, this rank and the number of ranks, a LoaderState to go on from.
Out:  ClipBatch after ClipBatch, until the curriculum ends: this rank's part of each global batch, uint8 B T H W 3.
Cost: decoding; at most `ahead_batches` and `ahead_bytes` decoded or asked for ahead of the trainer; always one batch.
      A global batch without one good clip reads up to an epoch's index, and decodes MAX_SUBSTITUTES clips or fewer for
      each of its own.
Errors: FailureLimitError when neither a global batch's clips nor their substitutes can be decoded; UnitError and
        ShardError from decoding itself; UsageError for a batch size that the ranks do not divide.

A video that cannot be decoded costs its clip and no more: the next clip of the global batch that can be decoded stands
in for it, or where the batch has none, the next draw of its shape in the epoch's order. Which one that is depends on
order and videos alone, so neither ranks, timing nor a restart change a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from pipeline.curriculum import Curriculum
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest
from pipeline.decode_requests import Decoders, PendingDecode
from pipeline.epoch import Draw, GlobalBatch, LoaderState
from pipeline.errors import DecodeError, FailureLimitError, UsageError

MAX_SUBSTITUTES = 64
"""Draws from outside a global batch that are tried before training stops."""


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """One rank's part of a global batch.

    frames: uint8, B T H W 3. draws: what was drawn, in order; a failed one is shown by another clip in its place.
    state: what the batch after this one follows from. failed: reasons of this rank's failed draws. stage: of the
    curriculum that the batch belongs to; after a stage's last batch, `state` is of the next.
    """

    step: int
    frames: np.ndarray
    draws: tuple[Draw, ...]
    state: LoaderState
    failed: tuple[str, ...] = ()
    stage: int = 0


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A batch whose decoding has begun."""

    batch: GlobalBatch
    state: LoaderState
    pending: tuple[PendingDecode, ...]
    num_bytes: int


@dataclasses.dataclass
class TrainingClips:
    """The batches of one rank, from a state on. `failed` counts this rank's failed draws by reason."""

    order: Curriculum
    decoders: Decoders
    rank: int = 0
    num_ranks: int = 1
    state: LoaderState = LoaderState()
    ahead_batches: int = 4
    ahead_bytes: int = 512 << 20
    failed: Counter[str] = dataclasses.field(default_factory=Counter)

    def __post_init__(self) -> None:
        for stage in self.order.stages:
            if stage.draw.batch_size % self.num_ranks:
                raise UsageError(f"batch_size {stage.draw.batch_size} must be a multiple of the {self.num_ranks} ranks")

    def __iter__(self) -> Iterator[ClipBatch]:
        """Batches in order; `state` follows what was handed out, not what was decoded ahead."""
        ahead: deque[_Ahead] = deque()
        for batch, state in self.order.batches(self.state):
            ahead.append(self._start(batch, state))
            # The oldest goes out once the newest is too much beside it.
            while len(ahead) > self.ahead_batches or sum(item.num_bytes for item in ahead) > self.ahead_bytes:
                yield self._finish(ahead.popleft())
        while ahead:
            yield self._finish(ahead.popleft())

    def _start(self, batch: GlobalBatch, state: LoaderState) -> _Ahead:
        requests = [self._request(batch, draw) for draw in self._mine(batch)]
        pending = tuple(self.decoders.submit(request) for request in requests)
        return _Ahead(batch, state, pending, sum(request.decoded_bytes for request in requests))

    def _mine(self, batch: GlobalBatch) -> tuple[Draw, ...]:
        share = len(batch.draws) // self.num_ranks
        return batch.draws[self.rank * share : (self.rank + 1) * share]

    def _finish(self, item: _Ahead) -> ClipBatch:
        draws, failed = self._mine(item.batch), []
        frames = np.empty((len(draws), *_shape(item.batch)), np.uint8)
        for place, pending in enumerate(item.pending):
            (outcome,) = pending.result()
            if isinstance(outcome, DecodeError):
                failed.append(outcome.reason)
                outcome = self._stand_in(item.batch, self.rank * len(draws) + place)
            frames[place] = outcome.frames
        self.failed.update(failed)
        self.state = item.state
        return ClipBatch(item.batch.step, frames, draws, item.state, tuple(failed), item.batch.stage)

    def _stand_in(self, batch: GlobalBatch, place: int) -> DecodedClip:
        """The next clip of the global batch after that place, around its end, that can be decoded, or a substitute."""
        others = (*batch.draws[place + 1 :], *batch.draws[:place])
        for draw in itertools.chain(others, itertools.islice(self._substitutes(batch), MAX_SUBSTITUTES)):
            (outcome,) = self.decoders.submit(self._request(batch, draw)).result()
            if isinstance(outcome, DecodedClip):
                return outcome
        keys = ", ".join(draw.source.key for draw in batch.draws[:4])
        raise FailureLimitError(
            f"none of the {len(batch.draws)} clips of training step {batch.step} can be decoded ({keys} ...), nor "
            f"the {MAX_SUBSTITUTES} next ones of their shape or the rest of their epoch: "
            "`latentmill index` and `latentmill encode` name the reasons"
        )

    def _substitutes(self, batch: GlobalBatch) -> Iterator[Draw]:
        """The epoch's other draws of the batch's bucket: those after its last draw, then those from the start on."""
        order, last = self.order.order(batch.stage), batch.draws[-1]
        after = order.draws(last.epoch, last.number + 1)
        before = itertools.takewhile(lambda draw: draw.number < last.number, order.draws(last.epoch))
        for draw in itertools.chain(after, before):
            if draw.bucket == batch.bucket and draw not in batch.draws:
                yield draw

    def _request(self, batch: GlobalBatch, draw: Draw) -> DecodeRequest:
        stage = self.order.stages[batch.stage]
        shape = ClipShape(draw.bucket.height, draw.bucket.width, stage.sizes.fit, stage.sizes.filter)
        return DecodeRequest(draw.source, stage.draw.grid, (draw.window,), shape)


def _shape(batch: GlobalBatch) -> tuple[int, int, int, int]:
    bucket = batch.bucket
    return bucket.num_frames, bucket.height, bucket.width, 3
