import os
import time
from pathlib import Path

import pytest

from pipeline.errors import ShardError, UsageError
from pipeline.shards import ShardRef, expand, identify


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b-x.tar", "b-y.tar", "deep/er/c.tar", "odd{1.tar", "[1].tar"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "dir.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["a-{000..002}.tar"], ["a-000.tar", "a-001.tar", "a-002.tar"]),
        (["{a-{000..001},b-{x,y}}.tar"], ["a-000.tar", "a-001.tar", "b-x.tar", "b-y.tar"]),
        (["b-*.tar", "a-001.tar"], ["a-001.tar", "b-x.tar", "b-y.tar"]),
        (["{a,b}-[0x]*.tar"], ["a-000.tar", "a-001.tar", "a-002.tar", "b-x.tar"]),
        (["**/c.tar"], ["deep/er/c.tar"]),
        (["a-000.tar", "./deep/../a-000.tar", "a-00[0].tar"], ["a-000.tar"]),
        (["odd{1.tar", "[1].tar"], ["[1].tar", "odd{1.tar"]),
        (["*.tar"], ["[1].tar", "a-000.tar", "a-001.tar", "a-002.tar", "b-x.tar", "b-y.tar", "odd{1.tar"]),
    ],
)
def test_patterns_become_sorted_absolute_paths(folder: Path, patterns: list[str], names: list[str]) -> None:
    assert expand(patterns) == [str(folder / name) for name in names]


@pytest.mark.parametrize("pattern", ["@list", "shards.txt"])
def test_list_files_hold_one_pattern_per_line(folder: Path, pattern: str) -> None:
    Path(pattern.removeprefix("@")).write_text("# mine\n\n  b-*.tar\na-{000..001}.tar\ns3://bucket/{0,1}.tar\n")
    names = ["a-000.tar", "a-001.tar", "b-x.tar", "b-y.tar"]
    assert expand([pattern]) == [*(str(folder / name) for name in names), "s3://bucket/0.tar", "s3://bucket/1.tar"]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("nothing-*.tar", "nothing-"),
        ("a-{000..003}.tar", "a-003.tar"),
        ("", "''"),
        ("dir.tar", "directory"),
        ("a-{000.tar", "unbalanced"),
        ("@missing", "missing"),
        ("empty.txt", "empty.txt"),
        ("s3://bucket/*.tar", "globs"),
        ("pipe:cat a-000.tar", "pipe:"),
        ("{pipe:,}cat", "pipe:"),
        ("-", "'-'"),
        ("http://host/a.tar", "http"),
        ("file:///a.tar", "file"),
        ("evil.txt", "pipe:"),
    ],
)
def test_refused_patterns_are_named(folder: Path, pattern: str, named: str) -> None:
    Path("empty.txt").write_text("# nothing\n")
    Path("evil.txt").write_text("pipe:touch pwned\n")
    with pytest.raises(UsageError, match=named):
        expand([pattern])
    assert not Path("pwned").exists()


def test_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    Path(os.fsdecode(b"bad-\xff.tar")).write_bytes(b"")
    with pytest.raises(UsageError, match="not UTF-8"):
        expand(["bad-*.tar"])


def test_another_version_has_another_id(folder: Path) -> None:
    url = str(folder / "a-000.tar")
    before = identify(url)
    assert identify(url) == before
    Path(url).write_bytes(b"more")
    resized = identify(url)
    os.utime(url, ns=(time.time_ns(), resized.size_bytes + 7))
    touched = identify(url)
    assert len({before.shard_id, resized.shard_id, touched.shard_id}) == 3
    assert touched == ShardRef(url, 4, "11")
    with pytest.raises(ShardError, match=r"nowhere\.tar"):
        identify(str(folder / "nowhere.tar"))


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("/data/train-000.tar", "train-000"),
        ("s3://bucket/../../.a b/ü$*.x.tar", "_.x"),
        ("/data/" + "n" * 200 + ".tar", "n" * 60),
        ("/data/..tar", ""),
    ],
)
def test_ids_are_safe_file_names(url: str, stem: str) -> None:
    name, _, digest = ShardRef(url, 1, "v").shard_id.rpartition("-")
    assert name == stem
    assert len(digest) == 12
    assert int(digest, 16) >= 0


def test_a_shard_without_a_url_cannot_be() -> None:
    with pytest.raises(ValueError, match="url"):
        ShardRef("", 0, "")
