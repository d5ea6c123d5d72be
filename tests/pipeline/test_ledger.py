from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import ledger, parquet
from pipeline.errors import StoreError
from pipeline.ledger import FAILED, SCHEMA, WRITTEN, LedgerRow
from pipeline.placement import PlacedShard
from pipeline.plan import Plan
from pipeline.storage import LocalStorage
from tests.fakes import FakeEncoder, fake_recipe
from tests.plans import encode_all, encode_unit, fragment, media_info, plan_of, planned_store

NAME = "ledger/9x32x32/000000.parquet"
ROWS = [
    LedgerRow(
        key="../k é",
        shard="/s.tar",
        member="k.mp4",
        offset=2**40,
        status=WRITTEN,
        row=3,
        window_index=1,
        window_start=7,
        num_frames=9,
        valid_frames=5,
        pts_seconds=(0.0, 0.04),
        decoder="pyav",
        kind="video",
        source_height=96,
        source_width=64,
        source_fps=25.0,
        caption="a caption",
        metadata='{"score": 1}',
        checksum="c" * 32,
        minimum=-1.5,
        maximum=2.5,
        channel_mean=(0.5, -0.5),
        channel_variance=(1.0, 2.0),
    ),
    LedgerRow("b", "/s.tar", "", 0, FAILED, row=4, reason="corrupt", detail="frame 3"),
]
FRAGMENTS = [
    fragment("a", [media_info(30), "no_video", media_info(30), media_info(8)]),
    fragment("b", [media_info(kind="image"), media_info(30)]),
]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def as_dict(row: LedgerRow) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(row).items()}


def test_rows_survive_their_file_and_give_the_same_bytes(storage: LocalStorage) -> None:
    data = ledger.to_parquet(ROWS, "f" * 64)
    assert ledger.to_parquet([dataclasses.replace(row) for row in ROWS], "f" * 64) == data
    assert ledger.to_parquet(ROWS, "e" * 64) != data
    storage.put(NAME, data)
    assert ledger.read_rows(storage, NAME) == [as_dict(row) for row in ROWS]
    assert ledger.read_rows(storage, NAME, ["key", "row"]) == [{"key": "../k é", "row": 3}, {"key": "b", "row": 4}]
    assert ledger.read_fragment(storage, NAME).plan == "f" * 64
    assert parquet.from_bytes(storage.read(NAME))[0].equals(SCHEMA)


def test_a_fragment_has_the_bytes_of_the_rows_as_dicts() -> None:
    data = ledger.to_parquet(ROWS, "f" * 64)
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in ROWS], schema=SCHEMA)
    assert parquet.to_bytes(table.replace_schema_metadata(parquet.from_bytes(data)[0].metadata)) == data


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "ok"},
        {"checksum": ""},
        {"reason": "corrupt"},
        {"status": FAILED, "checksum": ""},
        {"status": FAILED, "reason": "corrupt"},
    ],
)
def test_rows_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a ledger row is|a written row has a checksum"):
        dataclasses.replace(ROWS[0], **changes)


def test_damage_is_named_with_its_remedy(storage: LocalStorage) -> None:
    data = ledger.to_parquet(ROWS, "f" * 64)
    storage.put(NAME, data[:-30])
    with pytest.raises(StoreError, match=rf"{storage.url}/{NAME} is damaged: .*Delete it and run encode again"):
        ledger.read_rows(storage, NAME)
    storage.put(NAME, b"")
    with pytest.raises(StoreError, match=rf"{NAME} is damaged"):
        ledger.read_rows(storage, NAME)
    with pytest.raises(StoreError, match=r"unplaced/x.parquet is missing, and the plan counts on it. Restore it"):
        ledger.read_rows(storage, "ledger/unplaced/x.parquet")


def test_every_flipped_byte_is_harmless_or_named(storage: LocalStorage) -> None:
    data = ledger.to_parquet(ROWS, "f" * 64)
    refused: list[str] = []
    for position in range(0, len(data), 11):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        (Path(storage.url) / NAME).parent.mkdir(parents=True, exist_ok=True)
        (Path(storage.url) / NAME).write_bytes(flipped)
        try:
            assert ledger.read_rows(storage, NAME) == [as_dict(row) for row in ROWS]
        except StoreError as error:
            refused.append(str(error))
    assert len(refused) > len(data) // 44
    assert all(NAME in message for message in refused)


def test_another_table_is_no_ledger(storage: LocalStorage) -> None:
    table = SCHEMA.empty_table().select(["key"]).replace_schema_metadata({"latentmill": '{"plan": ""}'})
    storage.put(NAME, parquet.to_bytes(table))
    with pytest.raises(StoreError, match=rf"{NAME} has other columns than a ledger of this release: \['key'\]"):
        ledger.read_rows(storage, NAME)


def test_done_units_are_those_with_a_fragment_of_this_plan(storage: LocalStorage) -> None:
    plan = planned_store(storage, fake_recipe(), FRAGMENTS)
    units = list(plan.units())
    assert list(ledger.done_units(storage, plan)) == []
    encode_unit(FakeEncoder(), storage, plan, units[1], FRAGMENTS)
    assert list(ledger.done_units(storage, plan)) == list(ledger.listed_units(storage, plan)) == [units[1]]
    table = dict(ledger.done_fragments(storage, plan, ["key"]))[units[1]]
    assert table["key"].to_pylist() == ["a-0", "a-0", "a-2", "a-2"]

    name = ledger.unit_name(units[1])
    whole = storage.read(name)
    fragment_ = ledger.read_fragment(storage, name)
    other = {**(fragment_.table.schema.metadata or {}), b"latentmill": b'{"format_version": 1, "plan": "other"}'}
    storage.put(name, parquet.to_bytes(fragment_.table.replace_schema_metadata(other)))
    with pytest.raises(StoreError, match=rf"{name} fulfils another plan than the store's"):
        list(ledger.done_units(storage, plan))
    storage.put(name, parquet.to_bytes(fragment_.table.slice(1)))
    with pytest.raises(StoreError, match=rf"{name} has 3 rows, the plan gives 9x32x32/000000 4: the books do not"):
        list(ledger.done_units(storage, plan))
    storage.put(name, whole)
    assert list(ledger.done_units(storage, plan)) == [units[1]]


class SlowStorage(LocalStorage):
    """Every read takes as long as one of an object store; counts those under way."""

    under_way = most = reads = 0
    lock = threading.Lock()

    def read(self, name: str) -> bytes:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.reads += 1
        time.sleep(0.02)
        with self.lock:
            self.under_way -= 1
        return super().read(name)


def test_fragments_are_read_ahead_within_a_bound_and_once_each(tmp_path: Path) -> None:
    storage = SlowStorage(tmp_path)
    fragments = [fragment(name, [media_info(30)] * 4) for name in "abcdefghijklmnopqrst"]
    plan = planned_store(storage, fake_recipe(), fragments)
    encode_all(FakeEncoder(), storage, plan, fragments)
    units = list(plan.units())
    assert len(units) == 40
    storage.reads = 0
    assert [unit for unit, _ in ledger.done_fragments(storage, plan, ["key"])] == units
    assert storage.reads == len(units)
    assert 8 < storage.most <= 16
    storage.reads = 0
    walk = ledger.done_fragments(storage, plan, ["key"])
    assert next(walk)[0] == units[0]
    walk.close()
    assert storage.reads <= 17, "fragments were read that nobody asked for"


def test_a_later_generation_leaves_fragments_valid(storage: LocalStorage) -> None:
    plan = planned_store(storage, fake_recipe(), FRAGMENTS[:1])
    encode_all(FakeEncoder(), storage, plan, FRAGMENTS)
    extended = planned_store(storage, fake_recipe(), FRAGMENTS[1:], plan)
    assert list(ledger.done_units(storage, extended)) == list(plan.units())
    assert len(list(extended.units())) > len(list(plan.units()))


def test_unplaced_samples_have_lines_with_their_reasons(storage: LocalStorage) -> None:
    planned_store(storage, fake_recipe(), FRAGMENTS)
    rows = ledger.read_rows(storage, ledger.unplaced_name(FRAGMENTS[0].shard))
    assert [(row["key"], row["status"], row["reason"], row["row"]) for row in rows] == [
        ("a-1", "failed", "no_video", -1),
        ("a-3", "filtered", "short_video", -1),
    ]
    assert rows[0]["detail"] == "detail 1"
    assert rows[1]["caption"] == "caption 3"
    assert not storage.exists(ledger.unplaced_name(FRAGMENTS[1].shard))


def compacted(storage: LocalStorage, plan: Plan) -> list[list[dict[str, Any]]]:
    ledger.compact(storage, plan, lambda *_: None)
    return [parquet.from_bytes(storage.read(name))[1].to_pylist() for name in storage.list("samples/")]


def test_compact_holds_the_written_rows_in_bounded_parts(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned_store(storage, fake_recipe(), FRAGMENTS)
    encode_all(FakeEncoder(), storage, plan, FRAGMENTS, failed={1: "corrupt"})
    expected = [
        {"bucket": unit.bucket.name, **row}
        for unit in plan.units()
        for row in ledger.read_rows(storage, ledger.unit_name(unit))
        if row["status"] == WRITTEN
    ]
    assert [row["row"] for row in expected] == [0, 0, 2, 3, 4, 5]
    assert ledger.compact(storage, plan, lambda *_: None) == 6
    assert compacted(storage, plan) == [expected]
    monkeypatch.setattr(ledger, "_PART_BYTES", 1)
    parts = compacted(storage, plan)
    assert [len(part) for part in parts] == [1, 3, 2]
    assert [row for part in parts for row in part] == expected
    monkeypatch.undo()
    assert compacted(storage, plan) == [expected]  # No part of an earlier run is left.


def test_a_store_without_a_latent_has_an_empty_table(storage: LocalStorage) -> None:
    plan = planned_store(storage, fake_recipe(), [fragment("a", ["no_video"])])
    assert ledger.compact(storage, plan, lambda *_: None) == 0
    schema, table = parquet.from_bytes(storage.read("samples/part-000000.parquet"))
    assert (schema.names, table.num_rows) == (["bucket", *SCHEMA.names], 0)


def test_write_unplaced_of_a_whole_shard_writes_nothing(storage: LocalStorage) -> None:
    placed = PlacedShard.of(FRAGMENTS[1], fake_recipe())
    ledger.write_unplaced(storage, FRAGMENTS[1].shard, placed, "f")
    assert plan_of(fake_recipe(), FRAGMENTS).num_clips == 7
    assert storage.list("ledger/") == []
