"""The clips that an evaluation looks at: those that `encode` would make of the same shards, one at a time.

In:   tars; a recipe.
Out:  IndexedShards; of each clip its frames, or why it has none; samples that have no clip.
Cost: one header read and one probe per sample, one decode per clip; a clip, and the few behind it, in memory.
Errors: UsageError for tars that are not there; bad media is an outcome.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jobs.flags import ClusterFlags, DecodeFlags
from jobs.index import index_shards
from pipeline.decode.records import DecodedClip
from pipeline.decode_requests import Decoders, PendingDecode, to_requests
from pipeline.encode import to_batch
from pipeline.errors import SampleError
from pipeline.index import read_fragment
from pipeline.placement import Clip, PlacedShard, Unplaced
from pipeline.recipe import Recipe
from pipeline.shards import ShardRef
from pipeline.storage import Storage

_CLIPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class IndexedShards:
    """Tars whose samples and videos are known."""

    storage: Storage
    shards: tuple[ShardRef, ...]

    @classmethod
    def index(cls, storage: Storage, patterns: Sequence[str], decode: DecodeFlags) -> IndexedShards:
        """Index tars in this process, to fragments in the storage."""
        flags = ClusterFlags(**vars(decode), local=True)
        return cls(storage, tuple(index_shards(storage, patterns, flags)))

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the tars lie."""
        return tuple(shard.url for shard in self.shards)

    def placed(self, recipe: Recipe) -> Iterator[PlacedShard]:
        """Every tar's samples under the recipe."""
        return (PlacedShard.of(read_fragment(self.storage, shard.shard_id), recipe) for shard in self.shards)

    def unplaced(self, recipe: Recipe) -> Iterator[tuple[str, Unplaced]]:
        """The samples that have no clip, each with its tar's url."""
        return ((shard.shard_url, sample) for shard in self.placed(recipe) for sample in shard.unplaced)

    def count(self, recipe: Recipe) -> int:
        """How many clips there are."""
        return sum(placement.windows.count for shard in self.placed(recipe) for placement in shard.placements)

    def clips(self, recipe: Recipe) -> Iterator[Clip]:
        """All clips, by tar, bucket, sample and window."""
        for shard in self.placed(recipe):
            for bucket, count in shard.rows_per_bucket().items():
                yield from shard.clips(bucket, 0, 0, count)


def spread(count: int, wanted: int) -> frozenset[int]:
    """`wanted` of the numbers 0 to count - 1, evenly from the first to the last; all of them when there are no more."""
    if count <= wanted:
        return frozenset(range(count))
    return frozenset(np.linspace(0, count - 1, wanted).round().astype(int).tolist())


def decode_clips(
    clips: Iterable[Clip], recipe: Recipe, decoders: Decoders
) -> Iterator[tuple[Clip, np.ndarray | SampleError]]:
    """Every clip with its frames, uint8 T H W 3, or why it has none; the next ones are decoded meanwhile.

    A window that is shorter than its bucket is filled up with its last frame, as for encoding.
    """
    pending: collections.deque[tuple[Clip, PendingDecode]] = collections.deque()
    for clip in clips:
        (request,) = to_requests([clip], recipe, clip.decoded_bytes)
        pending.append((clip, decoders.submit(request)))
        if len(pending) > _CLIPS_AHEAD:
            yield _finish(*pending.popleft())
    while pending:
        yield _finish(*pending.popleft())


def _finish(clip: Clip, pending: PendingDecode) -> tuple[Clip, np.ndarray | SampleError]:
    (outcome,) = pending.result()
    return clip, to_batch([clip], [outcome], 1)[0] if isinstance(outcome, DecodedClip) else outcome
