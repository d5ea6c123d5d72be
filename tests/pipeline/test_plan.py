from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import parquet
from pipeline.buckets import Bucket, BucketConfig
from pipeline.errors import MismatchError, ShardError, StoreError
from pipeline.generation import Generation, Line, from_parquet
from pipeline.index import IndexFragment
from pipeline.placement import PlacedShard
from pipeline.plan import Plan, Unit, extend, load_plan, new_shards, to_parquet
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.sampling import SamplingConfig
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage
from tests.fakes import FAKE_CARD, fake_recipe
from tests.plans import all_clips, clips_of, fragment, media_info, plan_of

RECIPE = Recipe(
    FAKE_CARD,
    sampling=SamplingConfig((5, 9), windows="uniform", num_windows=3, short="smaller"),
    buckets=BucketConfig(("32x32", "32x64")),
    encode=EncodeConfig(batch_size=2, unit_rows=4),
)
BUCKET = Bucket(9, 32, 32)


media = st.one_of(
    st.builds(media_info, num_frames=st.integers(1, 14), width=st.sampled_from([96, 192])),
    st.just(media_info(kind="image")),
    st.sampled_from(["tar_damaged", "no_video"]),
)
batches = st.lists(st.lists(st.lists(media, max_size=8), min_size=1, max_size=4), min_size=1, max_size=3)


def fragments_of(shapes: list[list[list[object]]]) -> list[list[IndexFragment]]:
    """Batches of shards, whose urls sort in the order they come."""
    numbers = iter(range(100))
    return [[fragment(f"shard-{next(numbers):02d}", samples) for samples in batch] for batch in shapes]  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(batches)
def test_every_clip_has_one_row_in_one_unit_in_shard_offset_window_order(shapes: list[list[list[object]]]) -> None:
    made = fragments_of(shapes)
    flat = [one for batch in made for one in batch]
    plan = plan_of(RECIPE, *made)
    clips = all_clips(plan, flat)
    expected = {
        (one.shard.url, placement.sample.offset, index, placement.bucket)
        for one in flat
        for placement in PlacedShard.of(one, RECIPE).placements
        for index in range(placement.windows.count)
    }
    places = [(clip.shard_url, clip.sample.offset, clip.window_index, clip.bucket) for clip in clips]
    assert len(places) == len(set(places)) == plan.num_clips
    assert set(places) == expected
    for bucket, group in groupby(clips, key=lambda clip: clip.bucket):
        of_bucket = list(group)
        order = [(clip.shard_url, clip.sample.offset, clip.window_index) for clip in of_bucket]
        rows = [clip.row for clip in of_bucket]
        assert order == sorted(order)
        assert rows == sorted(set(rows))
        assert rows[-1] + 1 == plan.buckets[bucket].end_row


@settings(max_examples=60, deadline=None)
@given(batches)
def test_units_are_slices_of_the_rows_and_agree_with_the_counts(shapes: list[list[list[object]]]) -> None:
    made = fragments_of(shapes)
    flat = [one for batch in made for one in batch]
    plan = plan_of(RECIPE, *made)
    units = list(plan.units())
    assert units == sorted(set(units))
    for unit in units:
        rows = [clip.row for clip in clips_of(plan, unit, flat)]
        assert rows == list(range(unit.number * 4, unit.number * 4 + len(rows)))
        assert len(rows) == plan.num_rows(unit) >= 1
    for bucket, bucket_plan in plan.buckets.items():
        for line in bucket_plan.lines:
            one = next(one for one in flat if one.shard == line.shard)
            assert line.rows == PlacedShard.of(one, RECIPE).rows_per_bucket()[bucket]
    samples = sum(len(one.samples) for one in flat)
    placed = sum(len(PlacedShard.of(one, RECIPE).placements) for one in flat)
    assert sum(line.rows for line in plan.unplaced()) == samples - placed


@settings(max_examples=40, deadline=None)
@given(batches)
def test_a_new_generation_changes_no_earlier_unit(shapes: list[list[list[object]]]) -> None:
    made = fragments_of(shapes)
    flat = [one for batch in made for one in batch]
    plan = plan_of(RECIPE, *made)
    for count in range(1, len(made)):
        earlier = plan_of(RECIPE, *made[:count])
        for unit in earlier.units():
            assert clips_of(earlier, unit, flat) == clips_of(plan, unit, flat)
            assert earlier.generation_of(unit).fingerprint == plan.generation_of(unit).fingerprint
        for bucket, bucket_plan in earlier.buckets.items():
            later = [line for line in plan.buckets[bucket].lines if line.first_row >= bucket_plan.end_row]
            assert not later or later[0].first_row == -(-bucket_plan.end_row // 4) * 4


def test_the_order_and_numbers_by_hand() -> None:
    first = [fragment("a", [media_info(30)] * 3), fragment("b", [media_info(30), "no_video"])]  # 2 windows each
    second = [fragment("c", [media_info(30)])]
    plan = plan_of(fake_recipe(), first, second)
    lines = [(line.shard.url, line.first_row, line.rows) for line in plan.buckets[BUCKET].lines]
    assert lines == [("a", 0, 6), ("b", 6, 2), ("c", 8, 2)]
    assert [(line.shard.url, line.status, line.reason, line.rows) for line in plan.unplaced()] == [
        ("b", "failed", "no_video", 1)
    ]
    assert [unit.name for unit in plan.units()] == [f"9x32x32/00000{n}" for n in range(3)]
    assert [plan.generation_of(unit).number for unit in plan.units()] == [0, 0, 1]
    assert [plan.num_rows(unit) for unit in plan.units()] == [4, 4, 2]
    assert (plan.num_clips, plan.buckets[BUCKET].end_row) == (10, 10)


def test_units_without_rows_are_not_listed() -> None:
    def generation(number: int, first_row: int) -> Generation:
        line = Line(ShardRef(f"s{number}", 1, "1"), BUCKET, "planned", "", first_row, 3)
        return Generation.of(number, (line,), fake_recipe())

    plan = Plan([generation(0, 0), generation(1, 12)], fake_recipe())
    assert [unit.number for unit in plan.units()] == [0, 3]
    assert [plan.generation_of(unit).number for unit in plan.units()] == [0, 1]


def test_new_shards_are_told_from_planned_ones() -> None:
    known = fragment("a", [media_info()])
    plan = plan_of(fake_recipe(), [known])
    fresh = ShardRef("b", 7, "1")
    assert new_shards(plan, [fresh, known.shard, fresh]) == [fresh]
    with pytest.raises(ShardError, match="shard a changed since it was planned: size 10000 -> 5, version 1 -> 1"):
        new_shards(plan, [ShardRef("a", 5, "1")])
    with pytest.raises(ShardError, match=r"size 10000 -> 10000, version 1 -> 2. Restore it, or write to a new --store"):
        new_shards(plan, [ShardRef("a", 10_000, "2")])


def test_a_shard_without_samples_is_planned_once() -> None:
    plan = plan_of(fake_recipe(), [fragment("empty", [])])
    assert new_shards(plan, [ShardRef("empty", 10_000, "1")]) == []
    assert (plan.num_clips, list(plan.units()), [line.rows for line in plan.unplaced()]) == (0, [], [0])


def test_on_placed_sees_every_shard_once() -> None:
    made = [fragment("a", [media_info()]), fragment("b", ["no_video"])]
    seen: list[tuple[str, int]] = []
    extend(
        Plan([], fake_recipe()), made, fake_recipe(), lambda ref, placed: seen.append((ref.url, len(placed.placements)))
    )
    assert seen == [("a", 1), ("b", 0)]


def saved(storage: LocalStorage, plan: Plan) -> None:
    for generation in plan.generations:
        storage.put(generation.name, to_parquet(generation))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    plan = plan_of(RECIPE, [fragment("a", [media_info(), "no_video"])], [fragment("b", [media_info(kind="image")])])
    saved(storage, plan)
    assert load_plan(storage, RECIPE).generations == plan.generations
    assert [to_parquet(one) for one in load_plan(storage, RECIPE).generations] == [
        to_parquet(one) for one in plan.generations
    ]
    assert load_plan(LocalStorage(tmp_path / "elsewhere"), RECIPE).generations == ()


def test_every_flipped_byte_is_harmless_or_named() -> None:
    generation = plan_of(RECIPE, [fragment("a", [media_info(), "no_video"])]).generations[0]
    data = to_parquet(generation)
    refused: list[str] = []
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            assert from_parquet(bytes(flipped), "plan/000000.parquet") == generation
        except StoreError as error:
            refused.append(str(error))
    assert len(refused) > len(data) // 6
    assert all("plan/000000.parquet" in message for message in refused)
    with pytest.raises(StoreError, match=r"plan/000000\.parquet is damaged, or is no plan of latentmill: .*Restore it"):
        from_parquet(data[:-20], "plan/000000.parquet")


def test_changed_lines_are_refused() -> None:
    generation = plan_of(RECIPE, [fragment("a", [media_info()])]).generations[0]
    schema, table = parquet.from_bytes(to_parquet(generation))
    rows = pa.array([row + 1 for row in table["first_row"].to_pylist()], pa.int64())
    changed = table.set_column(schema.get_field_index("first_row"), "first_row", rows)
    with pytest.raises(StoreError, match="p is damaged: its lines do not have the fingerprint that it names"):
        from_parquet(parquet.to_bytes(changed), "p")


def test_another_format_version_is_refused_by_name() -> None:
    generation = plan_of(RECIPE, [fragment("a", [])]).generations[0]
    schema, table = parquet.from_bytes(to_parquet(generation))
    facts = json.loads(schema.metadata[b"latentmill"]) | {"format_version": 99}
    data = parquet.to_bytes(table.replace_schema_metadata({"latentmill": json.dumps(facts)}))
    with pytest.raises(MismatchError, match="format_version: plan/x has 99, this release reads 1"):
        from_parquet(data, "plan/x")


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = plan_of(fake_recipe(), [fragment("a", [media_info()])], [fragment("b", [media_info()])])
    with pytest.raises(MismatchError, match=r"plan/000000.parquet was made for another recipe"):
        Plan(plan.generations, RECIPE)
    with pytest.raises(StoreError, match=r"plan/000000.parquet is missing, plan/000001.parquet is there"):
        Plan(plan.generations[1:], fake_recipe())


@pytest.mark.parametrize(
    ("constant", "value", "line"),
    [
        (
            "pipeline.recipe._UNIT_ROWS_AT_MOST",
            128,
            "unit_rows of bucket 9x256x256: the store has 256, this release takes 128",
        ),
        (
            "pipeline.recipe._CALL_PIXELS",
            1 << 20,
            "batch_size of bucket 9x256x256: the store has 4, this release takes 2",
        ),
        ("pipeline.recipe._CALL_FRAMES", 4, "batch_size of bucket 9x256x256: the store has 4, this release takes 8"),
        ("pipeline.recipe._BATCH_AT_MOST", 2, "batch_size of bucket 9x256x256: the store has 4, this release takes 2"),
        (
            "models.spec._CHUNK_FRAMES_AT_LEAST",
            12,
            "chunk_frames of bucket 9x256x256: the store has 8, this release takes 12",
        ),
    ],
)
def test_a_release_with_another_constant_does_not_go_on_with_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, value: int, line: str
) -> None:
    recipe = fake_recipe(buckets=BucketConfig(), encode=EncodeConfig())
    saved(LocalStorage(tmp_path), plan_of(recipe, [fragment("a", [media_info()])]))
    assert load_plan(LocalStorage(tmp_path), recipe).num_clips == 2
    monkeypatch.setattr(constant, value)
    remedy = "Use the release that made the store, or a new --store."
    with pytest.raises(MismatchError, match=rf"^plan/000000.parquet was .* otherwise:\n  {line}\n{remedy}$"):
        load_plan(LocalStorage(tmp_path), recipe)


def test_every_number_that_another_release_takes_otherwise_is_named() -> None:
    (generation,) = plan_of(fake_recipe(), [fragment("a", [media_info()])]).generations
    facts = {"unit_rows": {BUCKET.name: 8}, "batch_size": {BUCKET.name: 4}, "chunk_frames": {BUCKET.name: None}}
    with pytest.raises(MismatchError) as refused:
        Plan([dataclasses.replace(generation, **facts)], fake_recipe())
    assert str(refused.value).splitlines()[1:-1] == [
        "  unit_rows of bucket 9x32x32: the store has 8, this release takes 4",
        "  batch_size of bucket 9x32x32: the store has 4, this release takes 2",
        "  chunk_frames of bucket 9x32x32: the store has None, this release takes 8",
    ]


def test_a_plan_records_how_its_buckets_are_encoded() -> None:
    media = [media_info(), media_info(kind="image")]
    (generation,) = plan_of(RECIPE, [fragment("a", media)]).generations
    image, video = "1x32x32", BUCKET.name
    assert generation.unit_rows == {image: 4, video: 4}
    assert generation.batch_size == {image: 2, video: 2}
    assert generation.chunk_frames == {image: None, video: 8}
    streamed = fake_recipe(encode=EncodeConfig(unit_rows=4, chunk_frames=12, stream_mb=0.01))
    (generation,) = plan_of(streamed, [fragment("a", media[:1])]).generations
    assert (generation.batch_size, generation.chunk_frames) == ({video: 1}, {video: 12})


def test_equal_shards_and_recipes_give_equal_bytes() -> None:
    one, other = (plan_of(RECIPE, [fragment("a", [media_info(), media_info(kind="image")])]) for _ in range(2))
    assert list(map(to_parquet, one.generations)) == list(map(to_parquet, other.generations))


@pytest.mark.parametrize("field", ["unit_rows", "batch_size", "chunk_frames"])
def test_a_changed_number_is_refused(field: str) -> None:
    (generation,) = plan_of(RECIPE, [fragment("a", [media_info()])]).generations
    schema, table = parquet.from_bytes(to_parquet(generation))
    facts = json.loads(schema.metadata[b"latentmill"]) | {field: {BUCKET.name: 12}}
    data = parquet.to_bytes(table.replace_schema_metadata({"latentmill": json.dumps(facts)}))
    with pytest.raises(StoreError, match="p is damaged: its lines do not have the fingerprint that it names"):
        from_parquet(data, "p")


def test_a_large_plan_is_walked_in_linear_time() -> None:
    shards = 20_000
    lines = tuple(Line(ShardRef(f"s{n:06d}", 1, "1"), BUCKET, "planned", "", 4 * n, 4) for n in range(shards))
    plan = Plan([Generation.of(0, lines, fake_recipe())], fake_recipe())
    assert sum(plan.num_rows(unit) for unit in plan.units()) == 4 * shards == plan.num_clips
    assert plan.num_rows(Unit(BUCKET, shards - 1)) == 4
