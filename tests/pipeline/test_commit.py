from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pipeline.commit
from pipeline import ledger, store
from pipeline.commit import CommitReport, RowResult, _channel_statistics, commit
from pipeline.errors import UnitError
from pipeline.ledger import unit_name
from pipeline.placement import Clip
from pipeline.plan import Plan, Unit
from pipeline.recipe import EncodeConfig, StoreDtype
from pipeline.storage import LocalStorage
from pipeline.store import checksum, encode_shard, read_unit, shard_name, stored_nan, to_float32, to_stored
from tests.fakes import FakeEncoder, fake_recipe
from tests.plans import clips_of, encode_rows, encode_unit, fragment, media_info, planned_store

FRAGMENTS = [fragment("a", [media_info(30), media_info(30), media_info(30)])]
Ready = tuple[LocalStorage, Plan, Unit]


@pytest.fixture
def ready(tmp_path: Path) -> Ready:
    """A planned store and its first unit of four rows."""
    storage = LocalStorage(tmp_path / "store")
    plan = planned_store(storage, fake_recipe(), FRAGMENTS)
    return storage, plan, next(plan.units())


def contents(storage: LocalStorage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in [*storage.list("latents.zarr/"), *storage.list("ledger/")]}


def put(ready: Ready, failed: dict[int, str] | None = None, scale: float = 1.0) -> CommitReport:
    storage, plan, unit = ready
    return encode_unit(FakeEncoder(scale), storage, plan, unit, FRAGMENTS, failed)


def nudged_rows(ready: Ready) -> tuple[list[Clip], np.ndarray, list[RowResult]]:
    """The unit as another device makes it: the last bit of every value differs."""
    _, plan, unit = ready
    clips = clips_of(plan, unit, FRAGMENTS)
    rows, results = encode_rows(FakeEncoder(), plan.recipe, unit, clips)
    return clips, (rows.view(np.uint16) ^ 1).view(np.float16), results


def assert_consistent(ready: Ready) -> None:
    """Every ledger row tells of the bytes that are there."""
    storage, plan, unit = ready
    rows = read_unit(storage, plan.recipe, unit)
    lines = ledger.read_rows(storage, ledger.unit_name(unit))
    assert [line["row"] for line in lines] == [clip.row for clip in clips_of(plan, unit, FRAGMENTS)]
    for line, row in zip(lines, rows, strict=True):
        if line["status"] == ledger.WRITTEN:
            assert line["checksum"] == checksum(row)
        else:
            assert np.isnan(row).all()


def test_a_unit_is_a_shard_and_a_ledger_fragment(ready: Ready) -> None:
    storage, plan, unit = ready
    report = put(ready)
    shard, fragment_ = (storage.read(name) for name in (shard_name(unit), ledger.unit_name(unit)))
    assert report == CommitReport(4, {}, len(shard) + len(fragment_), True)
    clips = clips_of(plan, unit, FRAGMENTS)
    expected, _ = encode_rows(FakeEncoder(), plan.recipe, unit, clips)
    assert read_unit(storage, plan.recipe, unit).tobytes() == expected.tobytes()
    line = ledger.read_rows(storage, ledger.unit_name(unit))[1]
    values = to_float32(expected[1], "float16").astype(np.float64)
    assert line == {
        "key": "a-0",
        "shard": "a",
        "member": "a-0.mp4",
        "offset": 512,
        "status": "written",
        "row": 1,
        "reason": "",
        "detail": "",
        "window_index": 1,
        "window_start": 21,
        "num_frames": 9,
        "valid_frames": 9,
        "pts_seconds": [n / 25 for n in range(9)],
        "decoder": "fake",
        "kind": "video",
        "source_height": 96,
        "source_width": 96,
        "source_fps": 25.0,
        "caption": "caption 0",
        "metadata": "{}",
        "checksum": checksum(expected[1]),
        "minimum": values.min(),
        "maximum": values.max(),
        "channel_mean": pytest.approx(values.mean(axis=(1, 2, 3)).tolist()),
        "channel_variance": pytest.approx(values.var(axis=(1, 2, 3)).tolist()),
    }


def rows_of_every_size(dtype: StoreDtype) -> Iterator[np.ndarray]:
    """Latents of many magnitudes, so that their sums depend on the order of addition; and zeros of both signs."""
    random = np.random.default_rng(0)
    for shape in [(16, 3, 8, 8), (4, 5, 16, 16), (1, 1, 1, 1), (7, 1, 1, 1), (16, 1, 1, 3), (3, 7, 11, 13)]:
        values = random.normal(size=shape) * 10.0 ** random.integers(-3, 4, shape)
        yield to_stored(values.astype(np.float32), dtype)
    yield to_stored(np.copysign(0, random.normal(size=(4, 3, 5, 7))).astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_statistics_are_those_of_each_channel_by_itself(monkeypatch: pytest.MonkeyPatch, dtype: StoreDtype) -> None:
    """To the last bit, however many channels and rows are taken at a time."""
    for row in rows_of_every_size(dtype):
        rows = np.stack([row, row[::-1], row])
        rows[1] = stored_nan(dtype)
        of_row = statistics_by_channel(row, dtype)
        expected = np.array([of_row, np.full_like(of_row, np.nan), of_row])
        for most in (1, 2 * row[0].size, 2 * row[0].size + 1, (len(row) + 1) * row[0].size, 1 << 18):
            monkeypatch.setattr(pipeline.commit, "_GROUP_VALUES", most)
            found = np.array(_channel_statistics(rows, dtype))
            np.testing.assert_array_equal(found, expected)
            assert found[0].tobytes() == expected[0].tobytes()  # Of zeros the sign, too.


def statistics_by_channel(row: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    channels = [to_float32(channel, dtype).astype(np.float64) for channel in row]
    return np.array([[getattr(v, name)() for v in channels] for name in ("min", "max", "mean", "var")])


def test_statistics_of_a_large_latent_take_little_memory() -> None:
    row = np.ones((64, 4, 256, 256), np.float16)
    tracemalloc.start()
    try:
        _channel_statistics(row[None], "float16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < row.nbytes / 2


def test_the_last_unit_may_be_short(ready: Ready) -> None:
    storage, plan, _ = ready
    last = list(plan.units())[-1]
    assert encode_unit(FakeEncoder(), storage, plan, last, FRAGMENTS).written == 2
    rows = read_unit(storage, plan.recipe, last)
    assert np.isfinite(rows[:2]).all()
    assert np.isnan(rows[2:]).all()


def test_failed_rows_are_nan_with_their_reason(ready: Ready) -> None:
    storage, _, unit = ready
    report = put(ready, {0: "corrupt", 3: "timeout"})
    assert (report.written, report.failed) == (2, {"corrupt": 1, "timeout": 1})
    lines = ledger.read_rows(storage, ledger.unit_name(unit))
    assert [(line["status"], line["reason"], line["detail"]) for line in lines] == [
        ("failed", "corrupt", "told to"),
        ("written", "", ""),
        ("written", "", ""),
        ("failed", "timeout", "told to"),
    ]
    assert [line["checksum"] == "" for line in lines] == [True, False, False, True]
    assert_consistent(ready)


def test_rows_that_overflow_do_not_reach_the_store(ready: Ready) -> None:
    report = put(ready, scale=1e6)
    assert (report.written, report.failed) == (0, {"overflow": 4})
    assert not ready[0].exists(shard_name(ready[2]))
    assert_consistent(ready)


@pytest.mark.parametrize("failed", [{}, {1: "corrupt"}, dict.fromkeys(range(4), "corrupt")])
def test_a_second_commit_changes_no_byte(ready: Ready, failed: dict[int, str]) -> None:
    """Whatever the late worker brings: the same, other failures, none left."""
    put(ready, failed)
    before = contents(ready[0])
    for late in ({}, {2: "timeout"}, dict.fromkeys(range(4), "timeout")):
        report = put(ready, late)
        assert not report.won
        assert report.bytes_written == 0
        assert contents(ready[0]) == before
    storage, plan, unit = ready
    clips, rows, results = nudged_rows(ready)
    assert not commit(storage, plan, unit, clips, results, rows).won
    assert contents(storage) == before


def test_even_a_damaged_shard_is_left_alone_beside_its_ledger(ready: Ready) -> None:
    storage, _, unit = ready
    put(ready)
    storage.put(shard_name(unit), storage.read(shard_name(unit))[:-9])
    before = contents(storage)
    assert not put(ready).won
    assert contents(storage) == before


def test_a_whole_shard_without_ledger_is_kept_with_its_own_checksums(ready: Ready) -> None:
    storage, plan, unit = ready
    _, rows, _ = nudged_rows(ready)
    there = encode_shard(plan.recipe, unit.bucket, rows)
    storage.put(shard_name(unit), there)
    report = put(ready)
    assert (report.written, report.won) == (4, True)
    assert storage.read(shard_name(unit)) == there
    assert_consistent(ready)
    lines = ledger.read_rows(storage, ledger.unit_name(unit))
    assert lines[0]["checksum"] == checksum(rows[0])
    assert lines[0]["maximum"] == float(rows[0].max())


def test_a_shard_of_another_recipe_without_ledger_is_replaced(ready: Ready) -> None:
    """The same rows at other values: left by a job whose plan was replaced while it ran."""
    storage, plan, unit = ready
    put(ready)
    whole = contents(storage)
    rows = read_unit(storage, plan.recipe, unit)
    storage.put(shard_name(unit), encode_shard(plan.recipe, unit.bucket, (rows * 1.2).astype(rows.dtype)))
    storage.delete(ledger.unit_name(unit))
    assert put(ready).won
    assert contents(storage) == whole


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 8]) + data[101:]


def emptied(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_shard_without_ledger_is_replaced(ready: Ready, damage: Callable[[bytes], bytes]) -> None:
    storage, _, unit = ready
    put(ready)
    whole = contents(storage)
    storage.put(shard_name(unit), damage(storage.read(shard_name(unit))))
    storage.delete(ledger.unit_name(unit))
    assert put(ready).won
    assert contents(storage) == whole


@pytest.mark.parametrize(("first", "second"), [({}, {1: "timeout"}), ({1: "timeout"}, {}), ({1: "a"}, {2: "b"})])
def test_a_shard_of_other_rows_without_ledger_is_replaced(
    ready: Ready, first: dict[int, str], second: dict[int, str]
) -> None:
    storage, plan, unit = ready
    put(ready, first)
    storage.delete(ledger.unit_name(unit))
    assert put(ready, second).won
    assert_consistent(ready)
    absent = np.isnan(read_unit(storage, plan.recipe, unit)).all(axis=(1, 2, 3, 4))
    assert np.flatnonzero(absent).tolist() == list(second)


def test_a_shard_is_removed_when_no_row_is_left(ready: Ready) -> None:
    storage, _, unit = ready
    put(ready)
    storage.delete(ledger.unit_name(unit))
    put(ready, dict.fromkeys(range(4), "timeout"))
    assert not storage.exists(shard_name(unit))
    assert_consistent(ready)


class Racing(LocalStorage):
    """Another worker commits whole in the instant before this one's `put` or `delete`."""

    def __init__(self, root: str, rival: Callable[[], object]) -> None:
        super().__init__(root)
        self._rival: Callable[[], object] | None = rival

    def _run_rival(self) -> None:
        rival, self._rival = self._rival, None
        if rival:
            rival()

    def put(self, name: str, data: bytes) -> None:
        self._run_rival()
        super().put(name, data)

    def delete(self, name: str) -> None:
        self._run_rival()
        super().delete(name)


@pytest.mark.parametrize("late", [{1: "timeout"}, dict.fromkeys(range(4), "timeout")])
def test_a_rival_that_commits_while_its_shard_is_replaced_wins(ready: Ready, late: dict[int, str]) -> None:
    storage, plan, unit = ready
    put(ready)
    won = contents(storage)
    fragment_ = storage.read(ledger.unit_name(unit))
    storage.delete(ledger.unit_name(unit))
    racing = Racing(storage.url, lambda: storage.put_if_absent(ledger.unit_name(unit), fragment_))
    report = encode_unit(FakeEncoder(), racing, plan, unit, FRAGMENTS, late)
    assert not report.won
    assert contents(storage) == won


# puts whose answer is no answer


class Unsure(LocalStorage):
    """Once, the first put-if-absent of a name that starts so is answered "something is there".

    As an object store does: after a conflict, or when a put is repeated whose answer was lost. `lands`: it was ours.
    """

    def __init__(self, root: str, prefix: str, lands: bool) -> None:
        super().__init__(root)
        self._prefix, self._lands = prefix, lands

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if not name.startswith(self._prefix):
            return super().put_if_absent(name, data)
        self._prefix = "nothing"
        if self._lands:
            super().put_if_absent(name, data)
        return False


def leave_shard_of_another_recipe(ready: Ready, *, damaged: bool = False) -> None:
    """A shard of other values, whole or damaged, without a ledger fragment."""
    storage, plan, unit = ready
    rows, _ = encode_rows(FakeEncoder(), plan.recipe, unit, clips_of(plan, unit, FRAGMENTS))
    data = encode_shard(plan.recipe, unit.bucket, (rows * 1.2).astype(rows.dtype))
    storage.put(shard_name(unit), flipped(data) if damaged else data)


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize("prefix", ["ledger/", "latents.zarr/"])
def test_a_put_that_landed_though_the_store_denies_it_counts(ready: Ready, prefix: str, leftover: bool) -> None:
    storage, plan, unit = ready
    put(ready)
    expected = contents(storage)
    for name in (unit_name(unit), shard_name(unit)):
        storage.delete(name)
    if leftover:
        leave_shard_of_another_recipe(ready)
    unsure = Unsure(storage.url, prefix, lands=True)
    assert encode_unit(FakeEncoder(), unsure, plan, unit, FRAGMENTS).written == 4
    assert_consistent(ready)
    assert contents(storage) == expected


@pytest.mark.parametrize("leftover", [False, True])
def test_a_ledger_fragment_that_did_not_land_is_told_and_the_next_try_is_done(ready: Ready, leftover: bool) -> None:
    storage, plan, unit = ready
    if leftover:
        leave_shard_of_another_recipe(ready)
    unsure = Unsure(storage.url, "ledger/", lands=False)
    with pytest.raises(
        UnitError, match=r"ledger/9x32x32/000000\.parquet was refused as if it were there, and it is not"
    ):
        encode_unit(FakeEncoder(), unsure, plan, unit, FRAGMENTS)
    assert encode_unit(FakeEncoder(), unsure, plan, unit, FRAGMENTS).won
    assert_consistent(ready)


def test_a_shard_that_did_not_land_is_told_and_the_next_try_is_done(ready: Ready) -> None:
    storage, plan, unit = ready
    unsure = Unsure(storage.url, "latents.zarr/", lands=False)
    with pytest.raises(UnitError, match=r"c\.0\.0\.0\.0\.0 was refused as if it were there, and it is not"):
        encode_unit(FakeEncoder(), unsure, plan, unit, FRAGMENTS)
    assert not storage.exists(unit_name(unit))
    assert encode_unit(FakeEncoder(), unsure, plan, unit, FRAGMENTS).won
    assert_consistent(ready)


# two workers on one unit, where a shard of other rows was left


def race(ready: Ready, mine: dict[int, str], rivals: dict[int, str]) -> CommitReport:
    """The report of a worker in whose put or delete of the shard another one commits whole."""
    storage, plan, unit = ready
    racing = Racing(storage.url, lambda: put(ready, rivals))
    return encode_unit(FakeEncoder(), racing, plan, unit, FRAGMENTS, mine)


ALL_FAILED = dict.fromkeys(range(4), "timeout")


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("mine", "rivals"),
    [
        ({}, {}),
        ({1: "timeout"}, {1: "timeout"}),
        ({1: "timeout"}, {1: "crash"}),  # other ledgers, the same shard
        (ALL_FAILED, ALL_FAILED),
        ({}, ALL_FAILED),  # whose shard is none
    ],
)
def test_what_was_left_is_not_put_back_beside_the_ledger_of_a_rival(
    ready: Ready, mine: dict[int, str], rivals: dict[int, str], damaged: bool
) -> None:
    leave_shard_of_another_recipe(ready, damaged=damaged)
    assert not race(ready, mine, rivals).won
    reasons = {
        line["row"]: line["reason"] for line in ledger.read_rows(ready[0], unit_name(ready[2])) if line["reason"]
    }
    assert reasons == rivals
    assert_consistent(ready)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(("mine", "rivals"), [({}, {1: "timeout"}), ({1: "timeout"}, {}), (ALL_FAILED, {})])
def test_a_unit_whose_shard_was_replaced_beyond_repair_is_given_back(
    ready: Ready, mine: dict[int, str], rivals: dict[int, str], damaged: bool
) -> None:
    """Nobody has the rows any more that the rival's ledger tells of: the unit is not done."""
    leave_shard_of_another_recipe(ready, damaged=damaged)
    with pytest.raises(UnitError, match="at the same time"):
        race(ready, mine, rivals)
    assert not ready[0].exists(unit_name(ready[2]))
    assert put(ready, mine).won
    assert_consistent(ready)


def test_of_two_that_replace_a_shard_the_later_ledger_changes_nothing(ready: Ready) -> None:
    """The rival's put and ledger come between this one's put and its ledger."""
    storage, plan, unit = ready
    leave_shard_of_another_recipe(ready)

    class Between(LocalStorage):
        def put(self, name: str, data: bytes) -> None:
            super().put(name, data)
            if not storage.exists(unit_name(unit)):
                put(ready, {1: "timeout"})

    assert not encode_unit(FakeEncoder(), Between(storage.url), plan, unit, FRAGMENTS).won
    assert [line["status"] for line in ledger.read_rows(storage, unit_name(unit))].count("failed") == 1
    assert_consistent(ready)


@pytest.mark.parametrize("nudge", [False, True])
def test_two_threads_at_once_make_one_ledger(ready: Ready, nudge: bool) -> None:
    storage, plan, _ = ready
    for unit in plan.units():
        clips = clips_of(plan, unit, FRAGMENTS)
        barrier = threading.Barrier(2)
        reports: list[CommitReport] = []

        def one(flip: int, unit: Unit = unit, clips: list[Clip] = clips, barrier: threading.Barrier = barrier) -> None:
            rows, results = encode_rows(FakeEncoder(), plan.recipe, unit, clips)
            rows = (rows.view(np.uint16) ^ flip).view(np.float16)
            barrier.wait()
            reports.append(commit(storage, plan, unit, clips, results, rows))  # noqa: B023 (joined below)

        threads = [threading.Thread(target=one, args=(flip,)) for flip in (0, int(nudge))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(report.won for report in reports) == [False, True]
        rows = read_unit(storage, plan.recipe, unit)
        for place, line in enumerate(ledger.read_rows(storage, ledger.unit_name(unit))):
            assert line["checksum"] == checksum(rows[place])


def test_bfloat16_units_have_checksums_of_their_bits(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    recipe = fake_recipe(encode=EncodeConfig(dtype="bfloat16", batch_size=2, unit_rows=4))
    plan = planned_store(storage, recipe, FRAGMENTS)
    unit = next(plan.units())
    encode_unit(FakeEncoder(), storage, plan, unit, FRAGMENTS, {2: "corrupt"})
    rows = read_unit(storage, recipe, unit)
    assert rows.dtype == np.uint16
    assert (rows[2] == store.stored_nan("bfloat16")).all()
    lines = ledger.read_rows(storage, ledger.unit_name(unit))
    assert [line["checksum"] for line in lines] == [checksum(rows[0]), checksum(rows[1]), "", checksum(rows[3])]
