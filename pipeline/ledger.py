"""The ledger: what became of every clip, one immutable parquet fragment per unit.

In:   LedgerRows of a unit, or the samples of a shard that have no row.
Out:  `ledger/<bucket>/<unit>.parquet` and `ledger/unplaced/<shard>.parquet`, put if absent: the commit of a unit.
Cost: kilobytes per fragment, a few in memory at a time; a pass over the ledger reads each fragment once, some ahead of
      their use, since an object store takes tens of milliseconds for each.
Errors: StoreError for a fragment that is damaged, missing or of another plan.

No clock times and no host names: the same unit always gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pipeline import parquet
from pipeline.errors import StoreError
from pipeline.placement import PlacedShard, Unplaced
from pipeline.plan import Plan, Unit
from pipeline.recipe import FORMAT_VERSION
from pipeline.shards import ShardRef
from pipeline.storage import Storage

WRITTEN, FILTERED, FAILED = "written", "filtered", "failed"
NO_ROW = -1
_PART_BYTES = 32 << 20
_READ_AHEAD = 16
_FACTS = b"latentmill"


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """What became of one clip, or of a sample that has none (row -1).

    `window_start` counts positions of the sampling grid; `valid_frames` < `num_frames` means that the last frame was
    repeated. `pts_seconds` are the times of the frames taken, from the video's first. `checksum` is blake2b-128 of
    the row's stored bytes. The channel statistics are of the stored row, over time and space.
    """

    key: str
    shard: str
    member: str
    offset: int
    status: str
    row: int = NO_ROW
    reason: str = ""
    detail: str = ""
    window_index: int = 0
    window_start: int = 0
    num_frames: int = 0
    valid_frames: int = 0
    pts_seconds: tuple[float, ...] = ()
    decoder: str = ""
    kind: str = ""
    source_height: int = 0
    source_width: int = 0
    source_fps: float = 0.0
    caption: str = ""
    metadata: str = ""
    checksum: str = ""
    minimum: float = 0.0
    maximum: float = 0.0
    channel_mean: tuple[float, ...] = ()
    channel_variance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in (WRITTEN, FILTERED, FAILED):
            raise ValueError(f"a ledger row is written, filtered or failed, got {self.status!r}")
        if (self.status == WRITTEN) != bool(self.checksum) or (self.status != WRITTEN) != bool(self.reason):
            raise ValueError(f"a written row has a checksum, any other a reason: {self.key=} {self.status=}")


_ARROW: dict[Any, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "tuple[float, ...]": pa.list_(pa.field("element", pa.float64())),
}
SCHEMA = pa.schema([(field.name, _ARROW[field.type]) for field in dataclasses.fields(LedgerRow)])


def unit_name(unit: Unit) -> str:
    """The name of a unit's fragment in the store."""
    return f"ledger/{unit.name}.parquet"


def unplaced_name(shard: ShardRef) -> str:
    """The name of the fragment for a shard's samples that have no row."""
    return f"ledger/unplaced/{shard.shard_id}.parquet"


def to_parquet(rows: Sequence[LedgerRow], plan_fingerprint: str) -> bytes:
    """A fragment; the same rows give the same bytes (with one version of pyarrow)."""
    facts = json.dumps({"format_version": FORMAT_VERSION, "plan": plan_fingerprint}, sort_keys=True)
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMA)
    return parquet.to_bytes(table.replace_schema_metadata({_FACTS: facts}))


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A fragment's columns, and the fingerprint of the plan that it fulfils."""

    table: pa.Table
    plan: str


def read_fragment(storage: Storage, name: str, columns: Sequence[str] | None = None) -> Fragment:
    """A fragment, in one read; None takes all columns.

    Raises:
        StoreError: it is not there or is damaged.
    """
    return _parsed(storage, name, lambda: storage.read(name), columns)


def _parsed(storage: Storage, name: str, read: Callable[[], bytes], columns: Sequence[str] | None) -> Fragment:
    where = f"{storage.url}/{name}"
    is_unit = not name.startswith("ledger/unplaced/")
    remedy = "Delete it and run encode again" if is_unit else "Restore it from a copy, or write to a new --store"
    try:
        schema, table = parquet.from_bytes(read(), columns)
        facts = json.loads(schema.metadata[_FACTS])
        if not schema.equals(SCHEMA):
            raise StoreError(f"{where} has other columns than a ledger of this release: {schema.names}")
        return Fragment(table, facts["plan"])
    except FileNotFoundError as error:
        raise StoreError(f"{where} is missing, and the plan counts on it. {remedy}.") from error
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{where} is damaged: {error}. {remedy}.") from error


def read_rows(storage: Storage, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one fragment as dicts, in row order."""
    rows: list[dict[str, Any]] = read_fragment(storage, name, columns).table.to_pylist()
    return rows


def listed_units(storage: Storage, plan: Plan) -> Iterator[Unit]:
    """The units whose fragments are there, in plan order, by name alone: one listing per bucket and no read."""
    for bucket, units in groupby(plan.units(), key=lambda unit: unit.bucket):
        present = set(storage.list(f"ledger/{bucket.name}/"))
        yield from (unit for unit in units if unit_name(unit) in present)


def done_fragments(
    storage: Storage, plan: Plan, columns: Sequence[str] | None = None
) -> Iterator[tuple[Unit, pa.Table]]:
    """The committed units, in plan order, with columns of their fragments.

    Raises:
        StoreError: a fragment is damaged, fulfils another plan, or has not the unit's number of rows.
    """
    for unit, read in _read_ahead(storage, plan):
        name = unit_name(unit)
        fragment = _parsed(storage, name, read, columns)
        if fragment.plan != plan.generation_of(unit).fingerprint:
            raise StoreError(f"{storage.url}/{name} fulfils another plan than the store's; the store was mixed up")
        if fragment.table.num_rows != plan.num_rows(unit):
            raise StoreError(
                f"{storage.url}/{name} has {fragment.table.num_rows} rows, the plan gives {unit.name} "
                f"{plan.num_rows(unit)}: the books do not balance. Delete it and run encode again."
            )
        yield unit, fragment.table


def _read_ahead(storage: Storage, plan: Plan) -> Iterator[tuple[Unit, Callable[[], bytes]]]:
    """The listed units, each with a function that waits for its fragment's bytes."""
    reads: deque[tuple[Unit, Callable[[], bytes]]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD, "latentmill-ledger") as threads:
        for unit in listed_units(storage, plan):
            if len(reads) == _READ_AHEAD:
                yield reads.popleft()
            reads.append((unit, threads.submit(storage.read, unit_name(unit)).result))
        yield from reads


def done_units(storage: Storage, plan: Plan) -> Iterator[Unit]:
    """The committed units, in plan order, each fragment checked as in `done_fragments`."""
    return (unit for unit, _ in done_fragments(storage, plan, ["status"]))


def write_unplaced(storage: Storage, shard: ShardRef, placed: PlacedShard, recipe_fingerprint: str) -> None:
    """Record the samples of a shard that have no row. Written with the plan, before its generation."""
    if placed.unplaced:
        rows = [_unplaced_row(shard, unplaced) for unplaced in placed.unplaced]
        storage.put(unplaced_name(shard), to_parquet(rows, recipe_fingerprint))


def _unplaced_row(shard: ShardRef, unplaced: Unplaced) -> LedgerRow:
    sample = unplaced.sample
    return LedgerRow(
        key=sample.key,
        shard=shard.url,
        member=sample.member,
        offset=sample.offset,
        status=unplaced.status,
        reason=unplaced.reason,
        detail=unplaced.detail,
        kind=sample.media.kind if sample.media else "",
        caption=sample.caption,
        metadata=sample.metadata,
    )


def compact(storage: Storage, plan: Plan, on_written: Callable[[Unit, pa.Table], None]) -> int:
    """Write all written rows of the committed units as the dataset `samples/`, with their bucket; returns their number.

    A part holds whole units, about `_PART_BYTES` in memory. `on_written` sees each unit's written rows once.
    """
    num_rows = num_parts = 0
    for num_parts, part in enumerate(_parts(storage, plan, on_written), start=1):
        storage.put(_part_name(num_parts - 1), parquet.to_bytes(part))
        num_rows += part.num_rows
    for name in storage.list("samples/"):
        if name >= _part_name(num_parts):
            storage.delete(name)
    return num_rows


def _part_name(number: int) -> str:
    return f"samples/part-{number:06d}.parquet"


def _parts(storage: Storage, plan: Plan, on_written: Callable[[Unit, pa.Table], None]) -> Iterator[pa.Table]:
    tables, num_bytes = [_with_bucket(SCHEMA.empty_table(), "")], 0  # A store without a latent has a part, too.
    for unit, table in done_fragments(storage, plan):
        written = table.filter(pa.compute.equal(table["status"], WRITTEN))
        on_written(unit, written)
        tables.append(_with_bucket(written, unit.bucket.name))
        num_bytes += written.nbytes
        if num_bytes >= _PART_BYTES:
            yield pa.concat_tables(tables)
            tables, num_bytes = [], 0
    if tables:
        yield pa.concat_tables(tables)


def _with_bucket(table: pa.Table, bucket: str) -> pa.Table:
    names = pa.array([bucket] * table.num_rows, pa.string())
    return table.replace_schema_metadata(None).add_column(0, pa.field("bucket", pa.string()), names)
