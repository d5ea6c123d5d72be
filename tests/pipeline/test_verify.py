"""verify finds every damage that we can think of, and names it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import ledger
from pipeline.decode.records import ClipShape, Window
from pipeline.errors import JobError, UnitError
from pipeline.index import fragment_name
from pipeline.plan import Plan, Unit
from pipeline.storage import LocalStorage
from pipeline.store import shard_name
from pipeline.verify import Comparison, StoredClip, check_store, choose, compare, restore
from tests.fakes import FakeDecoders, FakeEncoder, encode_store, fake_frames, fake_recipe, planned_store

ARRAY = "latents.zarr/9x32x32/zarr.json"


@pytest.fixture
def made(tmp_path: Path) -> tuple[LocalStorage, Plan]:
    storage, plan = planned_store(tmp_path)
    encode_store(storage, plan, FakeDecoders(bad=["b"]))
    return storage, plan


def first_two(plan: Plan) -> tuple[Unit, Unit]:
    first, second, *_ = plan.units()
    return first, second


def test_a_sound_store_has_no_problems(made: tuple[LocalStorage, Plan]) -> None:
    assert list(check_store(*made)) == []


def test_a_store_in_progress_has_no_problems(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path)
    assert list(check_store(storage, plan)) == []


def test_a_unit_whose_clips_all_failed_has_no_shard_and_no_problem(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path, [{"a": 30}])
    encode_store(storage, plan, FakeDecoders(bad=["a"]))
    assert not storage.exists(shard_name(next(plan.units())))
    assert list(check_store(storage, plan)) == []


def flip_byte(storage: LocalStorage, plan: Plan) -> str:
    name = shard_name(first_two(plan)[0])
    data = bytearray(storage.read(name))
    data[40] ^= 0x10
    storage.put(name, bytes(data))
    return f"{name} is damaged"


def cut_short(storage: LocalStorage, plan: Plan) -> str:
    name = shard_name(first_two(plan)[0])
    storage.put(name, storage.read(name)[:-7])
    return f"{name} is damaged"


def swap_shards(storage: LocalStorage, plan: Plan) -> str:
    names = [shard_name(unit) for unit in first_two(plan)]
    shards = [storage.read(name) for name in names]
    for name, data in zip(names, reversed(shards), strict=True):
        storage.put(name, data)
    return "9x32x32/000000 row 0 (a): its checksum is"


def delete_shard(storage: LocalStorage, plan: Plan) -> str:
    name = shard_name(first_two(plan)[0])
    storage.delete(name)
    return f"{name} is missing, with 3 written rows"


def rewrite_ledger(
    storage: LocalStorage, plan: Plan, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], mark: str = ""
) -> str:
    unit = first_two(plan)[0]
    name = ledger.unit_name(unit)
    rows = change(ledger.read_rows(storage, name))
    facts = json.dumps({"format_version": 1, "plan": mark or plan.generation_of(unit).fingerprint})
    table = pa.Table.from_pylist(rows, schema=ledger.SCHEMA).replace_schema_metadata({"latentmill": facts})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.put(name, bytes(sink.getvalue()))
    return name


def drop_ledger_line(storage: LocalStorage, plan: Plan) -> str:
    return f"{rewrite_ledger(storage, plan, lambda rows: rows[:-1])} does not list the clips"


def move_window(storage: LocalStorage, plan: Plan) -> str:
    name = rewrite_ledger(storage, plan, lambda rows: [{**rows[0], "window_start": 5}, *rows[1:]])
    return f"{name} does not list the clips"


def fail_a_written_row(storage: LocalStorage, plan: Plan) -> str:
    rewrite_ledger(storage, plan, lambda rows: [{**rows[0], "status": "failed"}, *rows[1:]])
    return "row 0 (a): failed in the ledger, and the array holds values"


def write_a_failed_row(storage: LocalStorage, plan: Plan) -> str:
    rewrite_ledger(storage, plan, lambda rows: [{**row, "status": "written"} for row in rows])
    return "row 2 (b): the array holds no latent"


def another_plan(storage: LocalStorage, plan: Plan) -> str:
    return f"{rewrite_ledger(storage, plan, lambda rows: rows, 'e' * 64)} fulfils another plan"


def damage_ledger(storage: LocalStorage, plan: Plan) -> str:
    name = ledger.unit_name(first_two(plan)[0])
    storage.put(name, storage.read(name)[:-9])
    return f"{name} is damaged"


def extra_files(storage: LocalStorage, plan: Plan) -> str:
    storage.put("latents.zarr/9x32x32/c.99.0.0.0.0", b"x")
    return "latents.zarr/9x32x32/c.99.0.0.0.0 belongs to no unit"


def extra_ledger(storage: LocalStorage, plan: Plan) -> str:
    storage.put("ledger/9x32x32/000099.parquet", b"x")
    return "ledger/9x32x32/000099.parquet belongs to no unit"


def change_metadata(storage: LocalStorage, **changes: Any) -> None:
    storage.put(ARRAY, json.dumps(json.loads(storage.read(ARRAY)) | changes).encode())


def change_shape(storage: LocalStorage, plan: Plan) -> str:
    change_metadata(storage, shape=[5, 4, 3, 4, 4])
    return f"{ARRAY} has shape [5, 4, 3, 4, 4], the plan says [9, 4, 3, 4, 4]"


def change_type(storage: LocalStorage, plan: Plan) -> str:
    change_metadata(storage, data_type="int16")
    return f"{ARRAY} has data_type int16, the plan says float16"


def change_fill_value(storage: LocalStorage, plan: Plan) -> str:
    change_metadata(storage, fill_value=0.0)
    return f"{ARRAY} has fill_value 0.0"


def delete_metadata(storage: LocalStorage, plan: Plan) -> str:
    storage.delete(ARRAY)
    return f"{ARRAY} cannot be read"


def break_metadata(storage: LocalStorage, plan: Plan) -> str:
    storage.put(ARRAY, b"[]")
    return f"{ARRAY} cannot be read"


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        cut_short,
        swap_shards,
        delete_shard,
        drop_ledger_line,
        move_window,
        fail_a_written_row,
        write_a_failed_row,
        another_plan,
        damage_ledger,
        extra_files,
        extra_ledger,
        change_shape,
        change_type,
        change_fill_value,
        delete_metadata,
        break_metadata,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_named(made: tuple[LocalStorage, Plan], damage: Callable[[LocalStorage, Plan], str]) -> None:
    storage, plan = made
    expected = damage(storage, plan)
    problems = list(check_store(storage, plan))
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_index_fragment_that_cannot_be_read_is_a_problem_of_its_units(
    made: tuple[LocalStorage, Plan], damage: str
) -> None:
    storage, plan = made
    name = fragment_name(next(iter(plan.shards.values())).shard_id)
    whole = storage.read(name)
    storage.delete(name)
    if damage == "cut":
        storage.put(name, whole[:-9])
    told = {"cut": f"{name} is damaged", "gone": f"no index fragment {name}"}[damage]
    problems = list(check_store(storage, plan))
    assert [ledger.unit_name(unit) for unit in first_two(plan)] == [problem.split()[0] for problem in problems]
    assert all(told in problem for problem in problems)


def test_unplaced_samples_are_counted(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path, [{"a": 30, "short": 3, "shorter": 2}])
    encode_store(storage, plan, FakeDecoders())
    assert list(check_store(storage, plan)) == []
    (name,) = storage.list("ledger/unplaced/")
    shard = next(iter(plan.shards.values()))
    rows = ledger.read_fragment(storage, name).table
    one = ledger.LedgerRow("short", shard.url, "short.mp4", 512, "filtered", reason="short_video")
    assert rows.num_rows == 2
    storage.put(name, ledger.to_parquet([one], plan.recipe.fingerprint))
    assert list(check_store(storage, plan)) == [
        f"{name} does not list the 2 samples of {shard.url} that the plan counts"
    ]
    storage.delete(name)
    assert [problem for problem in check_store(storage, plan) if f"{name} is missing" in problem]


def test_choose_is_stable_and_about_the_share() -> None:
    lines = [
        {"key": f"video {number}", "window_index": number % 3, "status": "failed" if number % 10 == 0 else "written"}
        for number in range(5_000)
    ]
    chosen = choose(lines, 0.1)
    assert 380 < len(chosen) < 520
    assert chosen == choose(lines, 0.1)
    assert choose(lines[2_000:], 0.1) == [line for line in chosen if int(line["key"].split()[1]) >= 2_000]
    assert {line["key"] for line in chosen} < {line["key"] for line in choose(lines, 0.2)}
    assert {line["status"] for line in chosen} == {"written"}
    assert choose(lines, 0.0) == []
    assert len(choose(lines, 1.0)) == 4_500


def by_hand(key: str, start: int) -> float:
    """PSNR of FakeEncoder: frame 0 is its own block means, frame 1 + 4k + j shows the blocks of frame 4 + 4k."""
    frames = fake_frames(key, Window(start, 9), ClipShape(32, 32)).astype(np.float64)
    shown = frames[[0, 4, 4, 4, 4, 8, 8, 8, 8]]
    errors = ((frames - shown) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean([10 * math.log10(255**2 / error) if error else 100.0 for error in errors]))


def test_compare_gives_the_psnr(tmp_path: Path) -> None:
    recipe = fake_recipe()
    exact = dataclasses.replace(recipe, encode=dataclasses.replace(recipe.encode, dtype="float32"))
    storage, plan = planned_store(tmp_path, recipe=exact)
    encode_store(storage, plan, FakeDecoders())
    results = list(compare(storage, plan, FakeEncoder(), FakeDecoders(), 1.0))
    comparisons = [result for result in results if isinstance(result, Comparison)]
    assert len(comparisons) == len(results) == plan.num_clips
    starts = {(row["key"], row["row"]): row["window_start"] for row in rows_of(storage, plan)}
    for result in comparisons:
        assert result.psnr == pytest.approx(by_hand(result.key, starts[result.key, result.row]), abs=1e-9)
        assert result.bucket == "9x32x32"
        assert result.ssim < 1


def rows_of(storage: LocalStorage, plan: Plan) -> list[dict[str, Any]]:
    return [row for unit in plan.units() for row in ledger.read_rows(storage, ledger.unit_name(unit))]


def test_compare_takes_at_least_one_clip_of_a_bucket(made: tuple[LocalStorage, Plan]) -> None:
    (result,) = compare(*made, FakeEncoder(), FakeDecoders(), 0.0)
    assert isinstance(result, Comparison)
    assert result.row == 0


@pytest.mark.parametrize(
    ("decoders", "expected"),
    [
        (FakeDecoders(bad=["a", "c", "d", "e"]), "fails with bad_media: on purpose"),
        (FakeDecoders(errors=dict.fromkeys("abcde", UnitError("broken off"))), "fails with broken off"),
    ],
)
def test_sources_that_fail_now_are_problems(
    made: tuple[LocalStorage, Plan], decoders: FakeDecoders, expected: str
) -> None:
    results = list(compare(*made, FakeEncoder(), decoders, 1.0))
    assert len(results) == 8
    assert all(isinstance(result, str) and expected in result for result in results)


def test_a_source_tar_that_changed_is_a_problem(made: tuple[LocalStorage, Plan]) -> None:
    storage, plan = made
    changed = next(iter(plan.shards))
    Path(changed).write_bytes(b"another tar")
    results = list(compare(storage, plan, FakeEncoder(), FakeDecoders(), 1.0))
    problems = [result for result in results if isinstance(result, str)]
    assert len(problems) == 4
    assert f"9x32x32/000000 row 0 (a): written, but its source now fails with shard {changed} changed" in problems[0]
    assert len(results) == 8


def test_a_gpu_without_memory_for_a_clip_ends_it_with_a_remedy(
    made: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore")

    encoder = FakeEncoder()
    monkeypatch.setattr(encoder, "decode", out_of_memory)
    with pytest.raises(JobError, match=r"decode a latent of 4x3x4x4: use --device cpu \(CUDA out of memory.*GiB\.\)$"):
        list(compare(*made, encoder, FakeDecoders(), 1.0))


def test_restore_shows_the_valid_frames_of_a_padded_clip(tmp_path: Path) -> None:
    from pipeline.sampling import SamplingConfig

    recipe = fake_recipe(sampling=SamplingConfig((9,), short="pad"))
    storage, plan = planned_store(tmp_path, [{"a": 6}], recipe)
    encode_store(storage, plan, FakeDecoders())
    (unit,) = plan.units()
    lines = ledger.read_rows(storage, ledger.unit_name(unit))
    (result,) = restore(storage, plan, unit, lines, FakeEncoder(), FakeDecoders())
    assert isinstance(result, StoredClip)
    assert result.source.shape == result.reconstruction.shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(result.source, fake_frames("a", Window(0, 6), ClipShape(32, 32)))
