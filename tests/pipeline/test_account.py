from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import ledger, parquet, store
from pipeline.account import Account, close_books, open_books, take_account, units_left
from pipeline.buckets import BucketConfig
from pipeline.errors import StoreError, UsageError
from pipeline.plan import Plan
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.storage import LocalStorage
from pipeline.store import read_unit, to_float32
from tests.fakes import FakeEncoder, fake_recipe
from tests.plans import encode_all, encode_unit, fragment, media_info, planned_store

FRAGMENTS = [
    fragment("a", [media_info(30), "no_video", media_info(30), media_info(8), "no_video"]),
    fragment("b", [media_info(kind="image"), media_info(30, width=192), "tar_damaged"]),
    fragment("c", []),
]
FAILED = {1: "corrupt", 3: "timeout"}
RECIPE = fake_recipe(buckets=BucketConfig(("32x32", "32x64")))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def finished(storage: LocalStorage, recipe: Recipe = RECIPE) -> Plan:
    plan = planned_store(storage, recipe, FRAGMENTS)
    encode_all(FakeEncoder(), storage, plan, FRAGMENTS, FAILED)
    return plan


def test_the_books_of_a_finished_store(storage: LocalStorage) -> None:
    account = take_account(storage, finished(storage), max_failures=3)
    assert dataclasses.replace(account, failures=()) == Account(
        clips=7,
        samples_without_clip=4,
        written=4,
        filtered={"short_video": 1},
        failed={"corrupt": 2, "no_video": 2, "tar_damaged": 1, "timeout": 1},
        clips_failed={"corrupt": 2, "timeout": 1},
        units=3,
        units_done=3,
        clips_left=0,
    )
    assert account.is_complete
    assert account.clips_done == 7
    assert account.lines() == [
        "in 11 = 4 written + 1 filtered + 6 failed",
        "  filtered short_video: 1",
        "  failed corrupt: 2",
        "  failed no_video: 2",
        "  failed tar_damaged: 1",
        "  failed timeout: 1",
        "units: 3 of 3 done",
        "  a-1: no_video: detail 1",
        "  a-4: no_video: detail 4",
        "  b-2: tar_damaged: detail 2",
    ]


def test_the_books_of_a_store_under_way(storage: LocalStorage) -> None:
    plan = planned_store(storage, RECIPE, FRAGMENTS)
    units = list(plan.units())
    assert take_account(storage, plan).clips_left == 7
    longest_first = sorted(units, key=lambda unit: -unit.bucket.num_frames * unit.bucket.height * unit.bucket.width)
    assert longest_first != units
    assert list(units_left(storage, plan)) == longest_first
    encode_unit(FakeEncoder(), storage, plan, units[1], FRAGMENTS, FAILED)
    account = take_account(storage, plan)
    assert (account.written, account.clips_left, account.units_done, account.is_complete) == (2, 3, 1, False)
    assert account.clips_done == 4
    assert account.lines()[0] == "in 11 = 2 written + 1 filtered + 5 failed + 3 left"
    assert account.failures == ()
    assert list(units_left(storage, plan)) == [unit for unit in longest_first if unit != units[1]]
    encode_all(FakeEncoder(), storage, plan, FRAGMENTS, FAILED)
    assert list(units_left(storage, plan)) == []


def test_books_that_do_not_balance_are_refused() -> None:
    with pytest.raises(StoreError, match=r"the books do not balance: 3 clips \+ 1 samples without one against 3"):
        Account(3, 1, 1, {"keep": 1}, {"corrupt": 1}, {}, 1, 1, 0)


def rewritten(storage: LocalStorage, name: str, keep: slice) -> None:
    schema, table = parquet.from_bytes(storage.read(name))
    rows = table.slice(keep.start or 0, keep.stop)
    storage.put(name, parquet.to_bytes(rows.replace_schema_metadata(schema.metadata)))


def test_a_ledger_that_lost_rows_is_refused(storage: LocalStorage) -> None:
    plan = finished(storage)
    name = ledger.unit_name(list(plan.units())[1])
    rewritten(storage, name, slice(1, None))
    with pytest.raises(StoreError, match=rf"{name} has 3 rows, the plan gives 9x32x32/000000 4: the books do not"):
        take_account(storage, plan)


def test_unplaced_samples_that_are_lost_are_missed(storage: LocalStorage) -> None:
    plan = finished(storage)
    name = ledger.unplaced_name(FRAGMENTS[0].shard)
    rewritten(storage, name, slice(0, 2))
    with pytest.raises(StoreError, match="the books do not balance: 7 clips"):
        take_account(storage, plan)
    storage.delete(name)
    with pytest.raises(StoreError, match=rf"{name} is missing, and the plan counts on it"):
        take_account(storage, plan)


def test_unplaced_samples_of_an_unplanned_shard_do_not_count(storage: LocalStorage) -> None:
    """A planner that was killed before it put its generation leaves such a fragment."""
    plan = finished(storage)
    before = take_account(storage, plan)
    storage.put("ledger/unplaced/other.parquet", storage.read(ledger.unplaced_name(FRAGMENTS[0].shard)))
    assert take_account(storage, plan) == before


@pytest.mark.parametrize(
    "encode",
    [{}, {"dtype": "bfloat16"}, {"posterior": "moments"}, {"posterior": "sample", "dtype": "float32"}],
    ids=str,
)
def test_statistics_are_those_of_all_written_values(storage: LocalStorage, encode: dict[str, Any]) -> None:
    recipe = dataclasses.replace(RECIPE, encode=EncodeConfig(batch_size=2, unit_rows=4, **encode))
    plan = finished(storage, recipe)
    per_channel: list[np.ndarray] = []
    for unit in plan.units():
        values = to_float32(read_unit(storage, recipe, unit), recipe.encode.dtype).astype(np.float64)
        written = values[~np.isnan(values).all(axis=(1, 2, 3, 4))]
        per_channel.append(written.swapaxes(0, 1).reshape(written.shape[1], -1))
    everything = np.concatenate(per_channel, axis=1)
    close_books(storage, plan)
    statistics = store.open_header(storage).statistics
    assert statistics["rows"] == 4
    np.testing.assert_allclose(statistics["channel_mean"], everything.mean(axis=1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(statistics["channel_std"], everything.std(axis=1), rtol=1e-10, atol=1e-12)
    assert (statistics["minimum"], statistics["maximum"]) == (everything.min(), everything.max())


def test_statistics_of_nothing(storage: LocalStorage) -> None:
    plan = planned_store(storage, RECIPE, [fragment("a", ["no_video"])])
    assert close_books(storage, plan)
    assert store.open_header(storage).statistics == {"rows": 0, "plan": [plan.generations[0].fingerprint]}
    assert take_account(storage, plan).is_complete


def test_closing_twice_writes_once(storage: LocalStorage) -> None:
    plan = finished(storage)
    assert close_books(storage, plan)
    header = store.open_header(storage)
    assert header.statistics["rows"] == 4
    assert header.statistics["plan"] == [generation.fingerprint for generation in plan.generations]
    samples = {name: storage.read(name) for name in storage.list("samples/")}
    assert list(samples) == ["samples/part-000000.parquet"]
    metadata = Path(storage.url, "latents.zarr/zarr.json").stat()
    assert not close_books(storage, plan)
    assert {name: storage.read(name) for name in storage.list("samples/")} == samples
    assert Path(storage.url, "latents.zarr/zarr.json").stat().st_mtime_ns == metadata.st_mtime_ns
    assert store.open_header(storage) == header


def test_new_shards_open_the_books_again(storage: LocalStorage) -> None:
    plan = finished(storage)
    close_books(storage, plan)
    more = [fragment("d", [media_info(30)])]
    extended = planned_store(storage, RECIPE, more, plan)
    assert take_account(storage, extended).clips_left == 2
    with pytest.raises(StoreError, match=r"is not complete: 9x32x32/000001 is not encoded yet. Run encode again"):
        close_books(storage, extended)
    encode_all(FakeEncoder(), storage, extended, [*FRAGMENTS, *more], FAILED)
    assert close_books(storage, extended)
    assert store.open_header(storage).statistics["rows"] == 6
    rows = parquet.from_bytes(storage.read("samples/part-000000.parquet"))[1]
    assert rows.num_rows == 6


def test_books_that_were_opened_again_are_closed_with_what_is_there_then(storage: LocalStorage) -> None:
    """A unit whose files were deleted may come back with other rows, and the plan is the same."""
    plan = finished(storage)
    close_books(storage, plan)
    before = store.open_header(storage).statistics
    unit = next(unit for unit in plan.units() if unit.bucket.width == 32 and unit.bucket.num_frames == 9)
    storage.delete(ledger.unit_name(unit))
    storage.delete(store.shard_name(unit))
    open_books(storage)
    assert store.open_header(storage).statistics == {key: value for key, value in before.items() if key != "plan"}
    open_books(storage)
    encode_unit(FakeEncoder(), storage, plan, unit, FRAGMENTS)  # this time no row fails
    assert close_books(storage, plan)
    assert store.open_header(storage).statistics["rows"] == before["rows"] + len(FAILED)
    assert parquet.from_bytes(storage.read("samples/part-000000.parquet"))[1].num_rows == before["rows"] + len(FAILED)
    assert not close_books(storage, plan)


def test_there_are_no_books_without_a_store(storage: LocalStorage) -> None:
    with pytest.raises(UsageError, match="is not a store yet"):
        close_books(storage, Plan([], RECIPE))
