"""One generation of the plan, and its file: counts per (shard, bucket), not a line per clip.

In:   lines: which rows of which bucket belong to which shard, and how many samples have none; the recipe.
Out:  `plan/000000.parquet`: the same generation gives the same bytes (with one version of pyarrow).
Cost: about 100 bytes per line.
Errors: MismatchError for another format version; StoreError for a file that is damaged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline import parquet
from pipeline.buckets import Bucket
from pipeline.errors import MismatchError, StoreError
from pipeline.recipe import FORMAT_VERSION, Recipe
from pipeline.shards import ShardRef

_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("url", pa.string()),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
        ("bucket", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
    ]
)
PLANNED = "planned"
_BATCH_LINES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """`rows` rows of one shard in one bucket (status "planned"), or that many samples without a row, and why."""

    shard: ShardRef
    bucket: Bucket | None
    status: str
    reason: str
    first_row: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """One extension of the plan: the shards that came with it, where their rows lie, and how they are encoded.

    unit_rows, batch_size, chunk_frames: by bucket, as the release that planned it took them from the recipe and, where
    that leaves them open, from constants of its own. Rows and bits follow from them.
    """

    number: int
    lines: tuple[Line, ...]
    unit_rows: dict[str, int]
    recipe_fingerprint: str
    batch_size: dict[str, int]
    chunk_frames: dict[str, int | None]

    @classmethod
    def of(cls, number: int, lines: tuple[Line, ...], recipe: Recipe) -> Generation:
        """The generation of these lines, as this release encodes them."""
        buckets = sorted({line.bucket for line in lines if line.bucket})
        return cls(
            number,
            lines,
            unit_rows={bucket.name: recipe.unit_rows(bucket) for bucket in buckets},
            recipe_fingerprint=recipe.fingerprint,
            batch_size={bucket.name: recipe.batch_size(bucket) for bucket in buckets},
            chunk_frames={bucket.name: recipe.chunk_frames(bucket) for bucket in buckets},
        )

    @property
    def name(self) -> str:
        return f"plan/{self.number:06d}.parquet"

    @functools.cached_property
    def fingerprint(self) -> str:
        """What a ledger fragment carries to prove which plan it fulfils."""
        # As recipe.fingerprint of [number, lines, *rest], without all lines as JSON in memory.
        rest = (self.unit_rows, self.batch_size, self.chunk_frames, self.recipe_fingerprint)
        digest = hashlib.sha256(f"[{self.number},[".encode())
        for number, line in enumerate(self.lines):
            digest.update(b"," * (number > 0) + _json(_record(line)))
        digest.update(b"]," + b",".join(map(_json, rest)) + b"]")
        return digest.hexdigest()


def _json(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def _record(line: Line) -> dict[str, Any]:
    return {
        "shard_id": line.shard.shard_id,
        "url": line.shard.url,
        "size_bytes": line.shard.size_bytes,
        "version": line.shard.version,
        "bucket": line.bucket.name if line.bucket else "",
        "status": line.status,
        "reason": line.reason,
        "first_row": line.first_row,
        "rows": line.rows,
    }


def to_parquet(generation: Generation) -> bytes:
    """The generation as a file; the same generation gives the same bytes."""
    facts = {
        "format_version": FORMAT_VERSION,
        "number": generation.number,
        "unit_rows": generation.unit_rows,
        "batch_size": generation.batch_size,
        "chunk_frames": generation.chunk_frames,
        "recipe_fingerprint": generation.recipe_fingerprint,
        "fingerprint": generation.fingerprint,
    }
    table = pa.Table.from_pylist([_record(line) for line in generation.lines], schema=_SCHEMA)
    return parquet.to_bytes(table.replace_schema_metadata({"latentmill": json.dumps(facts, sort_keys=True)}))


def from_parquet(data: bytes, name: str) -> Generation:
    """The generation in a file; `name` is for messages.

    Raises:
        MismatchError: another format version. StoreError: damaged, or no plan.
    """
    try:
        schema, table = parquet.from_bytes(data)
        facts = json.loads(schema.metadata[b"latentmill"])
        if facts["format_version"] != FORMAT_VERSION:
            raise MismatchError(
                f"format_version: {name} has {facts['format_version']}, this release reads {FORMAT_VERSION}"
            )
        generation = _generation(table, facts)
        whole = generation.fingerprint == facts["fingerprint"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{name} is damaged, or is no plan of latentmill: {error}. Restore it.") from error
    if not whole:
        raise StoreError(f"{name} is damaged: its lines do not have the fingerprint that it names. Restore it.")
    return generation


def _generation(table: pa.Table, facts: dict[str, Any]) -> Generation:
    return Generation(
        facts["number"],
        tuple(_lines(table)),
        facts["unit_rows"],
        facts["recipe_fingerprint"],
        facts["batch_size"],
        facts["chunk_frames"],
    )


def _lines(table: pa.Table) -> Iterator[Line]:
    """A batch of records at a time; lines share their buckets, and those of one shard its reference."""
    buckets = {"": None} | {name: Bucket.parse(name) for name in table["bucket"].unique().to_pylist() if name}
    shard: ShardRef | None = None
    for batch in table.to_batches(max_chunksize=_BATCH_LINES):
        for record in batch.to_pylist():
            same = (record["url"], record["size_bytes"], record["version"])
            if shard is None or (shard.url, shard.size_bytes, shard.version) != same:
                shard = ShardRef(*same)
            yield Line(
                shard,
                buckets[record["bucket"]],
                sys.intern(record["status"]),
                sys.intern(record["reason"]),
                record["first_row"],
                record["rows"],
            )
