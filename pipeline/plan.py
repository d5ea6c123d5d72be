"""The plan: every clip's row before anything is encoded, as counts per (shard, bucket).

In:   the recipe and the index of the shards.
Out:  generations `plan/000000.parquet`, ... in the store; Plan with its buckets, units and `clips_of(unit)`.
Cost: one pass over the index; a line per (shard, bucket) in memory, not per clip.
Errors: MismatchError for a plan of another recipe or format, or of a release that encodes otherwise; ShardError for a
        shard that changed since it was planned; StoreError for a generation that is damaged or missing.

Rows follow (shard, offset, window). A generation holds the shards that were new when it was made and starts every
bucket at the next unit boundary, so that no unit of an earlier generation changes.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline.buckets import Bucket
from pipeline.errors import MismatchError, ShardError, StoreError
from pipeline.generation import PLANNED, Generation, Line, from_parquet
from pipeline.generation import to_parquet as to_parquet  # noqa: PLC0414 (the planner's import)
from pipeline.index import IndexFragment
from pipeline.placement import Clip, PlacedShard
from pipeline.recipe import Recipe
from pipeline.shards import ShardRef
from pipeline.storage import Storage


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """The number-th run of S rows of a bucket: one Zarr shard, the atom of scheduling, retry and commit."""

    bucket: Bucket
    number: int

    @property
    def name(self) -> str:
        """As in `17x256x256/000003`."""
        return f"{self.bucket.name}/{self.number:06d}"


@dataclasses.dataclass
class BucketPlan:
    """All rows of one bucket, over all generations."""

    bucket: Bucket
    unit_rows: int
    lines: list[Line] = dataclasses.field(default_factory=list)
    generation_of_unit: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (first unit, generation)

    @property
    def end_row(self) -> int:
        """One past the last planned row: the length of the bucket's array."""
        last = self.lines[-1]
        return last.first_row + last.rows

    @property
    def num_clips(self) -> int:
        return sum(line.rows for line in self.lines)

    def lines_between(self, first_row: int, end_row: int) -> Iterator[Line]:
        """The lines that have rows in [first_row, end_row)."""
        position = max(0, bisect_right(self.lines, first_row, key=lambda line: line.first_row) - 1)
        while position < len(self.lines) and (line := self.lines[position]).first_row < end_row:
            if line.first_row + line.rows > first_row:
                yield line
            position += 1


class Plan:
    """All generations of a store's plan."""

    def __init__(self, generations: Sequence[Generation], recipe: Recipe) -> None:
        self.generations = tuple(generations)
        self.recipe = recipe
        self.buckets: dict[Bucket, BucketPlan] = {}
        for number, generation in enumerate(self.generations):
            self._check(number, generation)
            self._add(generation)

    def _check(self, number: int, generation: Generation) -> None:
        if generation.number != number:
            raise StoreError(f"plan/{number:06d}.parquet is missing, {generation.name} is there: restore it")
        if generation.recipe_fingerprint != self.recipe.fingerprint:
            raise MismatchError(f"{generation.name} was made for another recipe; the store is damaged or was mixed up")
        otherwise = "\n  ".join(_encoded_otherwise(generation, self.recipe))
        if otherwise:
            raise MismatchError(
                f"{generation.name} was made by a release that encodes this recipe otherwise:\n  {otherwise}\n"
                "Use the release that made the store, or a new --store."
            )

    def _add(self, generation: Generation) -> None:
        seen: set[Bucket] = set()
        for line in generation.lines:
            if line.bucket is None:
                continue
            plan = self.buckets.setdefault(line.bucket, BucketPlan(line.bucket, generation.unit_rows[line.bucket.name]))
            if line.bucket not in seen:
                seen.add(line.bucket)
                plan.generation_of_unit.append((line.first_row // plan.unit_rows, generation.number))
            plan.lines.append(line)

    @functools.cached_property
    def shards(self) -> dict[str, ShardRef]:
        """Every planned shard by url."""
        return {line.shard.url: line.shard for generation in self.generations for line in generation.lines}

    @property
    def num_clips(self) -> int:
        return sum(plan.num_clips for plan in self.buckets.values())

    def unplaced(self) -> Iterator[Line]:
        """Counts of samples that have no row, by shard and reason."""
        return (line for generation in self.generations for line in generation.lines if line.bucket is None)

    def units(self, buckets: Iterable[Bucket] | None = None) -> Iterator[Unit]:
        """Every unit that has rows: of all buckets, in order, or of these."""
        for bucket in sorted(self.buckets) if buckets is None else buckets:
            plan = self.buckets[bucket]
            for number in range(-(-plan.end_row // plan.unit_rows)):
                if any(True for _ in plan.lines_between(*self._rows(plan, number))):
                    yield Unit(bucket, number)

    @staticmethod
    def _rows(plan: BucketPlan, number: int) -> tuple[int, int]:
        return number * plan.unit_rows, min(plan.end_row, (number + 1) * plan.unit_rows)

    def first_row(self, unit: Unit) -> int:
        """The unit's first row in its bucket."""
        return unit.number * self.buckets[unit.bucket].unit_rows

    def num_rows(self, unit: Unit) -> int:
        """How many clips a unit has."""
        plan = self.buckets[unit.bucket]
        first, end = self._rows(plan, unit.number)
        return sum(
            min(end, line.first_row + line.rows) - max(first, line.first_row) for line in plan.lines_between(first, end)
        )

    def generation_of(self, unit: Unit) -> Generation:
        """The generation that planned a unit."""
        starts = self.buckets[unit.bucket].generation_of_unit
        return self.generations[starts[bisect_right(starts, unit.number, key=lambda pair: pair[0]) - 1][1]]

    def clips_of(self, unit: Unit, placed: Callable[[ShardRef], PlacedShard]) -> Iterator[Clip]:
        """The unit's clips in row order; `placed` looks a shard's placement up."""
        plan = self.buckets[unit.bucket]
        first, end = self._rows(plan, unit.number)
        for line in plan.lines_between(first, end):
            skip = max(0, first - line.first_row)
            count = min(end, line.first_row + line.rows) - (line.first_row + skip)
            yield from placed(line.shard).clips(unit.bucket, line.first_row, skip, count)


def _encoded_otherwise(generation: Generation, recipe: Recipe) -> Iterator[str]:
    """One line per number of a bucket that is not what this release takes from the recipe."""
    numbers: tuple[tuple[str, Mapping[str, int | None], Callable[[Bucket], int | None]], ...] = (
        ("unit_rows", generation.unit_rows, recipe.unit_rows),
        ("batch_size", generation.batch_size, recipe.batch_size),
        ("chunk_frames", generation.chunk_frames, recipe.chunk_frames),
    )
    for field, of_buckets, take in numbers:
        for name, recorded in of_buckets.items():
            present = take(Bucket.parse(name))
            if present != recorded:
                yield f"{field} of bucket {name}: the store has {recorded}, this release takes {present}"


def load_plan(storage: Storage, recipe: Recipe) -> Plan:
    """The plan in a store; empty when there is none yet."""
    names = [name for name in storage.list("plan/") if name.endswith(".parquet")]
    plan = Plan([from_parquet(storage.read(name), name) for name in names], recipe)
    pa.default_memory_pool().release_unused()  # Arrow keeps what reading took, which is more than the lines.
    return plan


def new_shards(plan: Plan, shards: Iterable[ShardRef]) -> list[ShardRef]:
    """The shards that the plan does not hold yet, in order.

    Raises:
        ShardError: a planned shard is no longer the one that was planned.
    """
    known = dict(plan.shards)
    fresh = []
    for shard in sorted(shards, key=lambda shard: shard.url):
        planned = known.get(shard.url)
        if planned is None:
            known[shard.url] = shard
            fresh.append(shard)
        elif planned != shard:
            raise ShardError(
                f"shard {shard.url} changed since it was planned: size {planned.size_bytes} -> {shard.size_bytes}, "
                f"version {planned.version} -> {shard.version}. Restore it, or write to a new --store."
            )
    return fresh


def extend(
    plan: Plan,
    fragments: Iterable[IndexFragment],
    recipe: Recipe,
    on_placed: Callable[[ShardRef, PlacedShard], None],
) -> Generation:
    """The next generation, for shards that are new to the plan; `on_placed` sees each shard's clips once."""
    next_row: dict[Bucket, int] = {}
    lines: list[Line] = []
    for fragment in fragments:
        placed = PlacedShard.of(fragment, recipe)
        on_placed(fragment.shard, placed)
        for bucket, rows in placed.rows_per_bucket().items():
            first_row = next_row.get(bucket, _next_boundary(plan, bucket))
            lines.append(Line(fragment.shard, bucket, PLANNED, "", first_row, rows))
            next_row[bucket] = first_row + rows
        lines += _unplaced_lines(fragment.shard, placed)
    return Generation.of(len(plan.generations), tuple(lines), recipe)


def _unplaced_lines(shard: ShardRef, placed: PlacedShard) -> list[Line]:
    counts = Counter((unplaced.status, unplaced.reason) for unplaced in placed.unplaced)
    if not placed.placements and not counts:
        return [Line(shard, None, "filtered", "empty_shard", 0, 0)]
    return [Line(shard, None, status, reason, 0, rows) for (status, reason), rows in sorted(counts.items())]


def _next_boundary(plan: Plan, bucket: Bucket) -> int:
    known = plan.buckets.get(bucket)
    return -(-known.end_row // known.unit_rows) * known.unit_rows if known else 0
