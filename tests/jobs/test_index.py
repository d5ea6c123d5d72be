"""index: one shard that cannot be read costs no other its fragment, and how far it is is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import index
from jobs.__main__ import main
from pipeline.errors import ShardError, StoreError, UnitError
from pipeline.index import list_fragments
from pipeline.storage import LocalStorage
from tests.fakes import write_numbered_shards


@pytest.mark.parametrize("engine", [["--local", "--decode-workers", "1"], []], ids=["local", "ray"])
def test_the_others_are_indexed(
    ray_cluster: None, engine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_numbered_shards(tmp_path / "shards", 2, 1)
    bad = tmp_path / "shards" / "0-zipped.tar"  # sorts first
    bad.write_bytes(b"\x1f\x8b" + b"x" * 2000)
    store = tmp_path / "store"
    assert main(["index", str(bad), *map(str, good), "--store", str(store), *engine]) == 1
    told = capsys.readouterr().err
    assert "ShardError: 1 of 3 shards cannot be indexed: " in told
    assert str(bad) in told
    assert "gzip" in told
    assert "run the same command again" in told
    assert len(list(list_fragments(LocalStorage(store)))) == 2
    assert main(["index", *map(str, good), "--store", str(store), *engine]) == 0
    assert "are new" not in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_no_shards_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(index, "write_fragment", write)
    shards = write_numbered_shards(tmp_path / "shards", 2, 1)
    arguments = ["--store", str(tmp_path / "store"), "--local", "--decode-workers", "1"]
    assert main(["index", *map(str, shards), *arguments]) == 1
    assert "StoreError: no space left" in capsys.readouterr().err


def test_a_shard_by_itself_is_told_as_it_is() -> None:
    with pytest.raises(ShardError, match=r"^shard x is gone$"):
        index.finish([ShardError("shard x is gone")], 1)


def test_all_causes_are_told_when_the_last_shard_is_done() -> None:
    seen = list[int]()

    def outcomes() -> Iterator[ShardError | UnitError | None]:
        for number in range(6):
            seen.append(number)
            yield ShardError(f"bad {number}") if number in {1, 3} else None

    with pytest.raises(ShardError, match=r"2 of 6 shards cannot be indexed: bad 1; bad 3\. What is indexed stays"):
        index.finish(outcomes(), 6)
    assert seen == list(range(6))


def test_where_nothing_can_be_read_it_ends_early() -> None:
    outcomes = iter([None] + [UnitError("no answer")] * 30)
    with pytest.raises(ShardError, match="20 of 21 shards cannot be indexed"):
        index.finish(outcomes, 31)
    assert len(list(outcomes)) == 10


def test_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock: Any = SimpleNamespace(now=0.0)
    monkeypatch.setattr(index, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def outcomes() -> Iterator[ShardError | UnitError | None]:
        for number in range(25):
            clock.now += 1.0
            yield ShardError("bad") if number == 14 else None

    with pytest.raises(ShardError):
        index.finish(outcomes(), 25)
    assert capsys.readouterr().err.splitlines() == [
        "index: 10 of 25 shards",
        "index: 20 of 25 shards, 1 cannot be indexed",
    ]
