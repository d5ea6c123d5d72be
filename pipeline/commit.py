"""A unit's end: its Zarr shard, then its ledger fragment, each put if absent.

In:   a unit's clips and, per clip, its stored row and decode facts, or the error that it failed with.
Out:  the two objects in the store; CommitReport.
Cost: checksum, statistics and Zarr encoding of one unit, and two puts.
Errors: StoreError when a file system cannot be written; UnitError when an object store cannot, or denies a put for
        something that is not there, or when two workers have destroyed each other's rows.

Nobody but the unit writes these names. A second try that finds the Zarr shard there without a ledger fragment keeps it
when it is whole and holds the same rows, and takes the checksums from it; otherwise it replaces it. Beside a ledger
fragment nothing is ever changed. Should another worker's appear while this one replaces the Zarr shard, the shard
becomes again what that fragment tells of; where nobody has those rows any more, the fragment is taken back.

A put-if-absent that was denied proves nothing, so what is there is read: an object store may deny one that landed, when
it was repeated because its answer was lost, and one that met another which then failed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import ledger
from pipeline.errors import SampleError, StoreError, UnitError
from pipeline.ledger import FAILED, WRITTEN, LedgerRow
from pipeline.placement import Clip, caption
from pipeline.plan import Plan, Unit
from pipeline.recipe import Recipe, StoreDtype
from pipeline.storage import Storage
from pipeline.store import (
    absent_rows,
    checksum,
    decode_shard,
    encode_shard,
    shard_name,
    stored_nan,
    to_float32,
    to_float64,
)

# Of the latents' spread. Devices and versions differ by less; a shard of another recipe, left by a job whose plan was
# replaced while it ran, by more.
_DEVICE_TOLERANCE = 0.05
_GROUP_VALUES = 1 << 18


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """How a clip's frames were had."""

    decoder: str
    pts_seconds: tuple[float, ...]


RowResult = RowFacts | SampleError


@dataclasses.dataclass(frozen=True)
class CommitReport:
    """Counts of one committed unit, and the bytes put.

    `won` is False when the unit was committed already: by another worker, or by a put of ours whose answer was lost.
    """

    written: int
    failed: dict[str, int]
    bytes_written: int
    won: bool


def commit(
    storage: Storage, plan: Plan, unit: Unit, clips: Sequence[Clip], results: Sequence[RowResult], rows: np.ndarray
) -> CommitReport:
    """Write a unit.

    `rows` are its stored rows [S, C, t, h, w]; those that no clip of `results` holds are set to NaN, in place.

    Raises:
        UnitError: the store denied a put for what is not there, or the unit's rows were destroyed; it is not done.
    """
    recipe = plan.recipe
    first_row = plan.first_row(unit)
    held = [clip.row - first_row for clip, result in zip(clips, results, strict=True) if isinstance(result, RowFacts)]
    absent = np.ones(len(rows), bool)
    absent[held] = False
    rows[absent] = stored_nan(recipe.encode.dtype)
    put = _put_shard(storage, recipe, unit, rows, absent)
    statistics = _channel_statistics(put.rows, recipe.encode.dtype)
    lines = []
    for clip, result in zip(clips, results, strict=True):
        place = clip.row - first_row
        if isinstance(result, SampleError):
            outcome = _failure(result)
        else:
            outcome = _latent(result, put.rows[place], statistics[place])
        lines.append(_line(recipe, clip, outcome))
    fragment = ledger.to_parquet(lines, plan.generation_of(unit).fingerprint)
    won = storage.put_if_absent(ledger.unit_name(unit), fragment)
    if not won:
        _read_denied(storage, ledger.unit_name(unit))
        if put.replaced is not None:
            _fit_to_ledger(storage, plan, unit, put.replaced)
    failed = Counter(line.reason for line in lines if line.status == FAILED)
    return CommitReport(len(held), dict(sorted(failed.items())), put.num_bytes + len(fragment) * won, won)


@dataclasses.dataclass(frozen=True)
class _Put:
    """What the Zarr shard then holds, the bytes put, and the Zarr shard that they replaced."""

    rows: np.ndarray
    num_bytes: int
    replaced: bytes | None = None


def _put_shard(storage: Storage, recipe: Recipe, unit: Unit, rows: np.ndarray, absent: np.ndarray) -> _Put:
    """Put the Zarr shard, unless the ledger has the unit, or one is there that is whole and holds the same rows."""
    if storage.exists(ledger.unit_name(unit)):
        return _Put(rows, 0)
    name = shard_name(unit)
    data = encode_shard(recipe, unit.bucket, rows)
    if data and storage.put_if_absent(name, data):
        return _Put(rows, len(data))
    if not data and not storage.exists(name):
        return _Put(rows, 0)
    there = _read_denied(storage, name)
    rows_there = _whole_rows(recipe, unit, there)
    if rows_there is not None and _are_same(rows_there, rows, absent, recipe):
        return _Put(rows_there, 0)
    if storage.exists(ledger.unit_name(unit)):
        return _Put(rows, 0)
    _replace(storage, name, data)
    return _Put(rows, len(data), there)


def _read_denied(storage: Storage, name: str) -> bytes:
    """What is there already, says the store.

    Raises:
        UnitError: nothing is.
    """
    there = _read(storage, name)
    if there is None:
        where = f"{storage.url}/{name}"
        raise UnitError(f"{where} was refused as if it were there, and it is not: the unit is tried again")
    return there


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read(name)
    except FileNotFoundError:
        return None


def _replace(storage: Storage, name: str, data: bytes) -> None:
    """Put the Zarr shard; one without bytes is none."""
    if data:
        storage.put(name, data)
    else:
        storage.delete(name)


def _fit_to_ledger(storage: Storage, plan: Plan, unit: Unit, replaced: bytes) -> None:
    """Make the Zarr shard what the ledger fragment tells of, be it ours or one that appeared while we replaced a shard.

    Raises:
        UnitError: neither what is there nor what we replaced is that. The unit is then not done any more.
    """
    name, ledger_name = shard_name(unit), ledger.unit_name(unit)
    lines = ledger.read_rows(storage, ledger_name, ["row", "status", "checksum"])
    told = {line["row"]: line["checksum"] for line in lines if line["status"] == WRITTEN}
    if _checksums(plan, unit, _read(storage, name) or b"") == told:
        return
    for data in (replaced, b""):
        if _checksums(plan, unit, data) == told:
            _replace(storage, name, data)
            return
    storage.delete(ledger_name)
    raise UnitError(
        f"two workers wrote {storage.url}/{name} at the same time, with other rows: the unit is tried again"
    )


def _checksums(plan: Plan, unit: Unit, data: bytes) -> dict[int, str] | None:
    """Of the rows that a Zarr shard holds, by their numbers; None when it is damaged."""
    recipe = plan.recipe
    rows = _whole_rows(recipe, unit, data) if data else absent_rows(recipe, unit.bucket)
    if rows is None:
        return None
    held = np.flatnonzero(~_are_absent(to_float32(rows, recipe.encode.dtype)))
    return {plan.first_row(unit) + int(place): checksum(rows[place]) for place in held}


def _whole_rows(recipe: Recipe, unit: Unit, data: bytes) -> np.ndarray | None:
    """The rows of a Zarr shard without ledger; None when it is damaged, for then nobody vouches for it."""
    try:
        return decode_shard(recipe, unit.bucket, data, shard_name(unit))
    except StoreError:
        return None


def _are_same(there: np.ndarray, rows: np.ndarray, absent: np.ndarray, recipe: Recipe) -> bool:
    """Whether a Zarr shard holds the same rows, with values that another device or library version could have made."""
    values_there, values = (to_float32(stored, recipe.encode.dtype) for stored in (there, rows))
    if not np.array_equal(_are_absent(values_there), absent):
        return False
    difference = np.abs(values_there[~absent] - values[~absent])
    return not difference.size or bool(difference.max() <= _DEVICE_TOLERANCE * values[~absent].std())


def _are_absent(values: np.ndarray) -> np.ndarray:
    absent: np.ndarray = np.isnan(values).reshape(len(values), -1).all(axis=1)
    return absent


def _line(recipe: Recipe, clip: Clip, outcome: dict[str, Any]) -> LedgerRow:
    sample, media = clip.sample, clip.media
    return LedgerRow(
        key=sample.key,
        shard=clip.shard_url,
        member=sample.member,
        offset=sample.offset,
        row=clip.row,
        window_index=clip.window_index,
        window_start=clip.window.start,
        num_frames=clip.bucket.num_frames,
        valid_frames=clip.window.num_frames,
        kind=media.kind,
        source_height=media.height,
        source_width=media.width,
        source_fps=media.fps,
        caption=caption(sample, recipe),
        metadata=sample.metadata,
        **outcome,
    )


def _failure(error: SampleError) -> dict[str, Any]:
    return {"status": FAILED, "reason": error.reason, "detail": error.detail}


def _latent(facts: RowFacts, row: np.ndarray, statistics: Sequence[list[float]]) -> dict[str, Any]:
    minima, maxima, means, variances = statistics
    return {
        "status": WRITTEN,
        "decoder": facts.decoder,
        "pts_seconds": facts.pts_seconds,
        "checksum": checksum(row),
        "minimum": min(minima),
        "maximum": max(maxima),
        "channel_mean": tuple(means),
        "channel_variance": tuple(variances),
    }


def _channel_statistics(rows: np.ndarray, dtype: StoreDtype) -> list[list[list[float]]]:
    """Minima, maxima, means and variances of every stored row's channels; NaN for a row that is absent.

    In groups of channels: many small rows at once, and little of a film's latent, which takes four times the memory as
    float64.
    """
    num_rows, num_channels = rows.shape[:2]
    channels = rows.reshape(num_rows * num_channels, -1)
    group = max(1, _GROUP_VALUES // channels.shape[1])
    groups = (to_float64(channels[start : start + group], dtype) for start in range(0, len(channels), group))
    statistics = np.hstack([[v.min(axis=1), v.max(axis=1), v.mean(axis=1), v.var(axis=1)] for v in groups])
    by_row: list[list[list[float]]] = statistics.reshape(4, num_rows, num_channels).swapaxes(0, 1).tolist()
    return by_row
