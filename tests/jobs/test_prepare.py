"""index and plan: fragments are reused, a plan grows, another recipe replaces it or is refused, the price is told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import prepare
from jobs.__main__ import main
from pipeline.buckets import Bucket
from pipeline.errors import MismatchError
from pipeline.index import list_fragments
from pipeline.ledger import unit_name
from pipeline.plan import Unit, load_plan
from pipeline.storage import LocalStorage
from pipeline.store import open_header
from pipeline.worker import EncodeWorker
from tests.clips import numbered_video
from tests.fakes import FAKE_CARD, FakeEncoder, planned_store, sample_members, write_numbered_shards, write_tar

RECIPE = ["--encoder", "fake", "--frames", "9", "--sizes", "32x32", "--batch-size", "2", "--unit-rows", "2"]
Run = Callable[..., int]
_NAMED = ["key", "status", "reason", "detail"]


@pytest.fixture(scope="module")
def video() -> bytes:
    return numbered_video(num_frames=12)


@pytest.fixture
def tars(tmp_path: Path, video: bytes) -> list[Path]:
    """Two tars with three and two videos."""
    (tmp_path / "in").mkdir()
    return [
        write_tar(
            tmp_path / "in" / f"{name}.tar",
            [member for number in range(count) for member in sample_members(f"{name}{number}", video)],
        )
        for name, count in (("a", 3), ("b", 2))
    ]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


@pytest.fixture
def run(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command on the store, with the fake encoder."""
    monkeypatch.setattr(prepare, "describe_encoder", lambda flags: (FAKE_CARD, "fake"))

    def run(command: str, *arguments: object) -> int:
        local = ["--local", "--decode-workers", "1"] if command == "index" else []
        return main([command, *map(str, arguments), "--store", storage.url, *local])

    return run


def contents(storage: LocalStorage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.list("")}


class TestIndex:
    def test_fragments_are_reused(
        self, run: Run, tars: list[Path], storage: LocalStorage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("index", *tars) == 0
        told = capsys.readouterr()
        assert "index: 2 of 2 shards are new" in told.err
        assert "samples: 5 = 5 ok + 0 filtered + 0 failed" in told.out
        before = contents(storage)
        assert run("index", *tars) == 0
        told = capsys.readouterr()
        assert "new" not in told.err
        assert "samples: 5 = 5 ok" in told.out
        assert contents(storage) == before

    def test_a_changed_tar_is_indexed_again_and_its_old_fragment_forgotten(
        self, run: Run, tars: list[Path], storage: LocalStorage, video: bytes
    ) -> None:
        run("index", *tars)
        old = set(list_fragments(storage))
        write_tar(tars[0], sample_members("a0", video))
        assert run("index", tars[0]) == 0
        new = set(list_fragments(storage))
        assert len(new) == 2
        assert len(new & old) == 1
        assert [name[0] for name in new & old] == ["b"]

    def test_a_planned_fragment_stays_and_the_change_is_refused(
        self, run: Run, tars: list[Path], storage: LocalStorage, video: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("index", *tars)
        assert run("plan", *RECIPE) == 0
        planned = contents(storage)
        write_tar(tars[0], sample_members("a0", video))
        assert run("index", *tars) == 0
        assert len(list_fragments(storage)) == 3
        assert run("plan") == 1
        assert re.search(r"ShardError: shard .*a\.tar changed since it was planned", capsys.readouterr().err)
        assert planned.items() <= contents(storage).items()

    def test_no_shards(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("index") == 2
        assert "index needs SHARDS" in capsys.readouterr().err

    def test_a_pattern_without_a_match(self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("index", tmp_path / "none-*.tar") == 2
        assert "no shard matches" in capsys.readouterr().err

    def test_a_shard_that_is_no_tar(self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
        assert run("index", tmp_path / "x.tar") == 1
        assert "gzip" in capsys.readouterr().err


class TestPlan:
    def test_tells_the_price(self, run: Run, tars: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        write_tar(tars[0], [*sample_members("a0", numbered_video(12)), *sample_members("s", numbered_video(5))])
        run("index", *tars)
        capsys.readouterr()
        assert run("plan", *RECIPE) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["bucket", "clips", "videos", "frames", "to", "decode", "read", "written", "units"]
        # 3 clips of 9 frames; a row is 4 x 3 x 4 x 4 float16 values; 3 rows make 2 units of 2 rows.
        size = re.escape(lines[1].split()[4])
        assert re.fullmatch(rf"9x32x32 +3 +3 +27 +{size} kB +1\.2 kB +2", lines[1])
        assert re.fullmatch(r"2 shards, 3 clips, 2 units, [\d.]+ kB to read, 1\.2 kB to write", lines[2])
        assert lines[3] == "  filtered short_video: 1"

    def test_needs_an_index(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("plan", *RECIPE) == 2
        assert "run `latentmill index" in capsys.readouterr().err

    def test_needs_an_encoder(
        self, tars: list[Path], storage: LocalStorage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["index", str(tars[0]), "--store", storage.url, "--local"]) == 0
        for arguments, told in (([], "--encoder is needed"), (["--encoder", "/none"], "--encoder /none: ")):
            assert main(["plan", "--store", storage.url, *arguments]) == 2
            assert told in capsys.readouterr().err
        assert storage.list("") == storage.list("index/")

    def test_again_changes_nothing_and_needs_no_flags(self, run: Run, tars: list[Path], storage: LocalStorage) -> None:
        run("index", *tars)
        run("plan", *RECIPE)
        before = contents(storage)
        assert run("plan") == 0
        assert contents(storage) == before

    def test_another_recipe_replaces_a_plan_that_nothing_was_encoded_for(
        self, run: Run, tars: list[Path], storage: LocalStorage, tmp_path: Path
    ) -> None:
        run("index", *tars)
        run("plan", *RECIPE)
        # What a worker that was killed between its two puts leaves behind:
        storage.put("latents.zarr/9x32x32/c.0.0.0.0.0", b"of the old recipe")
        assert run("plan", "--frames", "5", "--min-width", "5000") == 0
        replaced = contents(storage)
        assert open_header(storage).recipe.sampling.frames == (5,)

        fresh = LocalStorage(tmp_path / "fresh")
        for name in storage.list("index/"):
            fresh.put(name, storage.read(name))
        changed = [*RECIPE, "--frames", "5", "--min-width", "5000", "--store", fresh.url]
        assert main(["plan", *changed]) == 0
        assert replaced == contents(fresh)

    def test_another_recipe_is_refused_once_a_unit_is_committed(
        self, run: Run, tars: list[Path], storage: LocalStorage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("index", *tars)
        run("plan", *RECIPE)
        storage.put(unit_name(Unit(Bucket(9, 32, 32), 0)), b"a commit")
        before = contents(storage)
        assert run("plan", "--frames", "5", "--dtype", "float32") == 1
        err = capsys.readouterr().err
        assert "MismatchError" in err
        assert "sampling.frames: the store has [9], this command asks for [5]" in err
        assert "encode.dtype: " in err
        assert contents(storage) == before

    def test_a_new_tar_extends_the_plan_and_touches_nothing_else(
        self, run: Run, tars: list[Path], storage: LocalStorage
    ) -> None:
        run("index", tars[0])
        run("plan", *RECIPE)
        before = contents(storage)
        old = load_plan(storage, open_header(storage).recipe)
        run("index", tars[1])
        assert run("plan") == 0
        after = contents(storage)
        grown = {"latents.zarr/9x32x32/zarr.json"}  # the array is longer
        assert {name for name in before if after[name] != before[name]} == grown
        plan = load_plan(storage, open_header(storage).recipe)
        # Three rows fill two units of two; the new ones begin at the third.
        assert [unit.number for unit in old.units()] == [0, 1]
        assert [unit.number for unit in plan.units()] == [0, 1, 2]
        assert [plan.num_rows(unit) for unit in plan.units()] == [2, 1, 2]
        assert [plan.generation_of(unit).number for unit in plan.units()] == [0, 0, 1]

    def test_too_many_broken_samples_stop_it_before_anything_is_written(
        self, run: Run, tars: list[Path], storage: LocalStorage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = [member for number in range(3) for member in sample_members(f"bad{number}", b"nothing")]
        write_tar(tars[0], bad)
        run("index", *tars)
        assert run("plan", *RECIPE) == 1
        err = capsys.readouterr().err
        assert "FailureLimitError: 3 of 5 samples cannot be read, more than --max-failed-share 0.2" in err
        assert f"not_media 3. {storage.url}/index/*.parquet names them, in the columns key, status, reason and" in err
        named = [pq.read_table(path, columns=_NAMED).to_pylist() for path in Path(storage.url).glob("index/*.parquet")]
        failed = {row["key"]: row["reason"] for rows in named for row in rows if row["status"] == "failed"}
        assert failed == dict.fromkeys(("bad0", "bad1", "bad2"), "not_media")
        assert storage.list("") == storage.list("index/")
        assert run("plan", *RECIPE, "--max-failed-share", "0.6") == 0
        assert len(storage.list("ledger/unplaced/")) == 1

    def test_of_two_planners_at_once_the_later_is_told(
        self,
        run: Run,
        tars: list[Path],
        storage: LocalStorage,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run("index", *tars)
        real = prepare.store.write_arrays

        def overtaken(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            storage.put("plan/000000.parquet", b"the other's")

        monkeypatch.setattr(prepare.store, "write_arrays", overtaken)
        assert run("plan", *RECIPE) == 1
        assert "at the same time: run this one again" in capsys.readouterr().err
        assert storage.read("plan/000000.parquet") == b"the other's"


@pytest.mark.parametrize(("device", "calls"), [("cpu", 0), ("cuda", 1)])
def test_an_encoder_on_a_gpu_is_warmed_up_before_there_is_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, calls: int
) -> None:
    encoder, opened = FakeEncoder(), list[tuple[str, str, str]]()
    monkeypatch.setattr(prepare, "open_encoder", lambda *arguments: opened.append(arguments) or encoder)
    _, plan = planned_store(tmp_path)
    assert prepare.ready_encoder("m", device, plan, 1 << 20) is encoder
    assert opened == [("m", device, "float32")]
    assert encoder.batches == calls


def test_another_encoder_than_the_plans_is_refused_where_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory was written to since, or a node has another copy."""
    _, plan = planned_store(tmp_path)
    monkeypatch.setattr(FakeEncoder, "card", dataclasses.replace(FAKE_CARD, fingerprint="e" * 64))
    monkeypatch.setattr(prepare, "open_encoder", lambda *_: FakeEncoder())
    with pytest.raises(MismatchError, match=f"the encoder m on .* its fingerprint is {'e' * 64}, the recipe has"):
        prepare.ready_encoder("m", "cpu", plan, 1 << 20)


@pytest.mark.parametrize(("flags", "window_mb"), [((), 512), (("--window-mb", "7"), 7)])
def test_the_window_is_the_plans_unless_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], window_mb: int
) -> None:
    seen: list[int] = []

    class Seeing(EncodeWorker):
        def __init__(self, *arguments: Any) -> None:
            seen.append(arguments[4])
            super().__init__(*arguments)

    monkeypatch.setattr("pipeline.local.EncodeWorker", Seeing)
    (shard,) = write_numbered_shards(tmp_path / "shards", 1, 2)
    recipe = ("--encoder", "rehearsal:4x8x8x16@100", "--frames", "9", "--sizes", "32x32")
    assert main(["encode", str(shard), "--store", str(tmp_path / "store"), "--local", *recipe, *flags]) == 0
    assert seen == [window_mb << 20]
