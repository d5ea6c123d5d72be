"""The books of a store: in = written + filtered + failed (+ left), by reason; and what closes a finished one.

In:   the plan and the ledger.
Out:  Account; on `close_books`, the dataset `samples/` and the per-channel statistics in the header.
Cost: one pass over the ledger's fragments, those read ahead (16) in memory; closing takes one more, opening one put.
Errors: StoreError when the books do not balance or a fragment is damaged.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline import ledger, store
from pipeline.buckets import Bucket
from pipeline.errors import StoreError
from pipeline.ledger import FAILED, FILTERED, WRITTEN
from pipeline.plan import Plan, Unit
from pipeline.recipe import Recipe
from pipeline.storage import Storage

_COUNTED = ["status", "reason"]
_PLAN = "plan"  # of the header's statistics: the generations that they and `samples/` are of
_TOLD = ["key", "shard", "status", "reason", "detail"]


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of everything that the plan knows: clips, and samples that have none."""

    clips: int
    samples_without_clip: int
    written: int
    filtered: dict[str, int]
    failed: dict[str, int]
    clips_failed: dict[str, int]
    """Those of the failed that are clips; the others are samples without one."""
    units: int
    units_done: int
    clips_left: int
    failures: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        total = self.written + sum(self.filtered.values()) + sum(self.failed.values()) + self.clips_left
        if total != self.clips + self.samples_without_clip:
            raise StoreError(
                f"the books do not balance: {self.clips} clips + {self.samples_without_clip} samples without one "
                f"against {total} written, filtered, failed or left"
            )

    @property
    def is_complete(self) -> bool:
        return self.units_done == self.units

    @property
    def clips_done(self) -> int:
        return self.clips - self.clips_left

    def lines(self) -> list[str]:
        """The books for people."""
        filtered, failed = sum(self.filtered.values()), sum(self.failed.values())
        left = f" + {self.clips_left} left" if self.clips_left else ""
        books = f"{self.written} written + {filtered} filtered + {failed} failed{left}"
        rows = [
            f"in {self.clips + self.samples_without_clip} = {books}",
            *(f"  filtered {reason}: {count}" for reason, count in self.filtered.items()),
            *(f"  failed {reason}: {count}" for reason, count in self.failed.items()),
            f"units: {self.units_done} of {self.units} done",
        ]
        return rows + [f"  {line}{f' (x{count})' if count > 1 else ''}" for line, count in self._told().items()]

    def _told(self) -> Counter[str]:
        """The failures as sentences; windows of one video that failed alike are one."""
        told: Counter[str] = Counter()
        for row in self.failures:
            detail = row["detail"].removeprefix(f"{row['key']}: ")
            told[f"{row['key'] or row['shard']}: {row['reason']}" + (f": {detail}" if detail else "")] += 1
        return told


def take_account(storage: Storage, plan: Plan, max_failures: int = 0) -> Account:
    """Count the ledger against the plan; up to `max_failures` failed rows are kept whole.

    Raises:
        StoreError: a fragment is damaged or missing, or its rows are not those that the plan counts.
    """
    tally, columns = _Tally(max_failures), _TOLD if max_failures else _COUNTED
    unplaced = 0
    for shard, lines in groupby(plan.unplaced(), key=lambda line: line.shard):
        num_samples = sum(line.rows for line in lines)
        unplaced += num_samples
        if num_samples:
            tally.add(ledger.read_fragment(storage, ledger.unplaced_name(shard), columns).table)
    failed_samples = Counter(tally.by_reason(FAILED))
    units_done = clips_done = 0
    for _, table in ledger.done_fragments(storage, plan, columns):
        tally.add(table)
        units_done += 1
        clips_done += table.num_rows
    failed = tally.by_reason(FAILED)
    return Account(
        clips=plan.num_clips,
        samples_without_clip=unplaced,
        written=tally.counts.pop((WRITTEN, ""), 0),
        filtered=tally.by_reason(FILTERED),
        failed=failed,
        clips_failed=dict(Counter(failed) - failed_samples),
        units=sum(1 for _ in plan.units()),
        units_done=units_done,
        clips_left=plan.num_clips - clips_done,
        failures=tuple(tally.failures),
    )


@dataclasses.dataclass
class _Tally:
    """Ledger rows by (status, reason), and the first failed ones."""

    max_failures: int
    counts: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        statuses = table["status"].to_pylist()
        self.counts.update(zip(statuses, table["reason"].to_pylist(), strict=True))
        if (room := self.max_failures - len(self.failures)) > 0 and FAILED in statuses:
            failed = table.filter(pa.compute.equal(table["status"], FAILED))
            self.failures += failed.slice(0, room).to_pylist()

    def by_reason(self, wanted: str) -> dict[str, int]:
        return {reason: count for (status, reason), count in sorted(self.counts.items()) if status == wanted}


def units_left(storage: Storage, plan: Plan) -> Iterator[Unit]:
    """The units that are not committed, by name, those that take longest first; `take_account` has read the fragments.

    So a job's last units are short ones, and its workers end at nearly the same time.
    """

    def unit_pixels(bucket: Bucket) -> int:
        return plan.recipe.unit_rows(bucket) * bucket.num_frames * bucket.height * bucket.width

    for bucket in sorted(plan.buckets, key=unit_pixels, reverse=True):
        yield from (Unit(bucket, number) for number in _numbers_left(storage, plan, bucket))


def _numbers_left(storage: Storage, plan: Plan, bucket: Bucket) -> array[int]:
    """In eight bytes each: a job holds them to its end, as it would the names of all that is done."""
    present = set(storage.list(f"ledger/{bucket.name}/"))
    return array("q", (unit.number for unit in plan.units([bucket]) if ledger.unit_name(unit) not in present))


def open_books(storage: Storage) -> None:
    """To be called before a unit is encoded: `close_books` will then write anew what was up to date.

    A plan alone does not tell that: a unit that was deleted may come back with other rows. Until then readers keep
    what they have.
    """
    header = store.open_header(storage)
    if _PLAN in header.statistics:
        kept = {name: value for name, value in header.statistics.items() if name != _PLAN}
        store.write_header(storage, dataclasses.replace(header, statistics=kept))


def close_books(storage: Storage, plan: Plan) -> bool:
    """Write `samples/` and the statistics of a complete store; False when they were up to date.

    Raises:
        StoreError: a unit is not committed.
    """
    header = store.open_header(storage)
    fingerprints = [generation.fingerprint for generation in plan.generations]
    if header.statistics.get(_PLAN) == fingerprints:
        return False
    left = next(units_left(storage, plan), None)
    if left is not None:
        raise StoreError(f"{storage.url} is not complete: {left.name} is not encoded yet. Run encode again.")
    statistics = _Statistics(plan.recipe)
    ledger.compact(storage, plan, statistics.add)
    summary = {**statistics.summary(), _PLAN: fingerprints}
    store.write_header(storage, dataclasses.replace(header, statistics=summary))
    return True


class _Statistics:
    """Per-channel mean and std over written rows, and their extremes; rows weigh by their size.

    Combines the rows' own means and variances (Chan, Golub, LeVeque 1979), unit by unit.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._rows = self._total = 0
        self._mean = self._squares = np.zeros(())
        self._minimum, self._maximum = np.inf, -np.inf

    def add(self, unit: Unit, written: pa.Table) -> None:
        """Take in a unit's written rows."""
        if not written.num_rows:
            return
        size = math.prod(self._recipe.row_shape(unit.bucket)[1:])
        means, variances = _matrix(written["channel_mean"]), _matrix(written["channel_variance"])
        mean, added = means.mean(axis=0), written.num_rows * size
        squares = (variances + (means - mean) ** 2).sum(axis=0) * size
        delta, share = mean - self._mean, added / (self._total + added)
        self._squares = self._squares + squares + delta**2 * self._total * share
        self._mean = self._mean + delta * share
        self._total += added
        self._rows += written.num_rows
        self._minimum = min(self._minimum, pa.compute.min(written["minimum"]).as_py())
        self._maximum = max(self._maximum, pa.compute.max(written["maximum"]).as_py())

    def summary(self) -> dict[str, Any]:
        """For the header."""
        if not self._rows:
            return {"rows": 0}
        return {
            "rows": self._rows,
            "channel_mean": self._mean.tolist(),
            "channel_std": np.sqrt(self._squares / self._total).tolist(),
            "minimum": self._minimum,
            "maximum": self._maximum,
        }


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.combine_chunks().flatten()).reshape(len(column), -1)
