"""Storage: one contract for directories and object stores; ranges that equal slices; failures that name a remedy."""

from __future__ import annotations

import datetime as dt
import errno
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import object_store
from pipeline import storage as storage_module
from pipeline.block_cache import OPENING_BYTES, BlockCache
from pipeline.decode.limits import DecodeLimits
from pipeline.errors import ShardError, StoreError, UnitError, UsageError
from pipeline.storage import LocalStorage, ObjectStorage, Storage, is_remote, open_range, open_storage, stat_object
from pipeline.tarscan import scan
from tests.object_server import object_server

Make = Callable[[], Storage]
Asked = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_server() as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens the same empty place again and again."""
    if request.param == "local":
        return lambda: open_storage(str(tmp_path / "store"))
    request.getfixturevalue("server")
    url = f"s3://latents/{tmp_path.name}/store"
    return lambda: open_storage(url)


class TestContract:
    def test_what_was_put_is_read_by_another(self, make: Make) -> None:
        make().put("a/b/c.bin", b"one")
        assert make().read("a/b/c.bin") == b"one"
        make().put("a/b/c.bin", b"two, longer")
        assert make().read("a/b/c.bin") == b"two, longer"

    def test_empty_objects_are_objects(self, make: Make) -> None:
        make().put("empty", b"")
        assert make().exists("empty")
        assert make().read("empty") == b""

    def test_what_is_not_there(self, make: Make) -> None:
        storage = make()
        assert not storage.exists("a/b")
        assert storage.list("") == []
        assert storage.list("a/") == []
        storage.delete("a/b")
        with pytest.raises(FileNotFoundError):
            storage.read("a/b")

    def test_a_folder_is_no_object(self, make: Make) -> None:
        make().put("a/b", b"")
        assert not make().exists("a")

    def test_lists_below_a_folder_sorted_and_relative(self, make: Make) -> None:
        storage = make()
        for name in ("b/2", "b/1", "b/deep/er/3", "bb/4", "top"):
            storage.put(name, b"x")
        assert storage.list("b/") == ["b/1", "b/2", "b/deep/er/3"]
        assert storage.list("") == ["b/1", "b/2", "b/deep/er/3", "bb/4", "top"]

    def test_delete(self, make: Make) -> None:
        storage = make()
        storage.put("a/b", b"x")
        storage.delete("a/b")
        assert not storage.exists("a/b")
        assert storage.list("") == []

    def test_put_if_absent_keeps_the_first(self, make: Make) -> None:
        assert make().put_if_absent("u/1", b"first") is True
        assert make().put_if_absent("u/1", b"second") is False
        assert make().read("u/1") == b"first"
        make().delete("u/1")
        assert make().put_if_absent("u/1", b"third") is True

    def test_of_racing_threads_one_wins_and_its_bytes_are_whole(self, make: Make) -> None:
        for attempt in range(5):
            name = f"race/{attempt}"
            with ThreadPoolExecutor(6) as go:
                won = list(go.map(lambda n, name=name: make().put_if_absent(name, bytes([n]) * 200_000), range(6)))
            assert sum(won) == 1
            assert make().read(name) == bytes([won.index(True)]) * 200_000

    def test_the_url_leads_back(self, make: Make) -> None:
        make().put("x", b"1")
        assert open_storage(make().url + "/").read("x") == b"1"
        assert not make().url.endswith("/")


def test_racing_is_settled_by_the_server_not_by_a_look_first(server: str) -> None:
    """The conditional put itself is refused: `exists` is never asked."""
    storage = ObjectStorage("s3://latents/conditional")
    storage.put("x", b"first")
    storage.exists = None  # type: ignore[assignment,method-assign]
    assert storage.put_if_absent("x", b"second") is False


def test_of_racing_processes_one_wins(tmp_path: Path) -> None:
    program = (
        "import sys; from pipeline.storage import LocalStorage; s = LocalStorage(sys.argv[1]); sys.stdin.read(1)\n"
        "print(sum(s.put_if_absent(f'race/{k}', sys.argv[2].encode() * 100_000) for k in range(30)))"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for letter in "ab"
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"g")
        child.stdin.flush()
    won = [int(child.communicate()[0]) for child in children]
    assert sum(won) == 30
    storage = LocalStorage(tmp_path)
    contents = [storage.read(f"race/{number}") for number in range(30)]
    assert [sum(content == letter * 100_000 for content in contents) for letter in (b"a", b"b")] == won
    assert storage.list("runs/") == []


class TestLocalCommit:
    def test_a_kill_in_the_middle_leaves_nothing_among_the_data(self, tmp_path: Path) -> None:
        program = (
            "import os, sys; from pipeline.storage import LocalStorage\n"
            "os.fsync = lambda fd: (print('in flight', flush=True), sys.stdin.read())\n"
            "LocalStorage(sys.argv[1]).put(sys.argv[2], b'x' * 5_000_000)"
        )
        (tmp_path / "ledger").mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), "ledger/unit"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"in flight\n"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        storage = LocalStorage(tmp_path)
        assert [name.split("/")[:2] for name in storage.list("")] == [["runs", "tmp"]]
        assert storage.put_if_absent("ledger/unit", b"again") is True

    def test_synced_before_it_is_named_and_the_names_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        real_fsync, real_link = os.fsync, os.link

        def fsync(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            events.append(f"sync {'data' if path.is_file() else path.relative_to(tmp_path)}")
            real_fsync(handle)

        def link(source: Path, target: Path) -> None:
            assert Path(source).read_bytes() == b"data"
            events.append("link")
            real_link(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "link", link)
        LocalStorage(tmp_path).put_if_absent("ledger/17x8x8/000000", b"data")
        # New folders' names are synced, too: else a power cut takes the folder with the commit in it.
        assert events == ["sync .", "sync ledger", "sync data", "link", "sync ledger/17x8x8"]

    def test_a_link_whose_answer_was_lost_was_ours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real_link = os.link

        def repeated_link(source: Path, target: Path) -> None:
            real_link(source, target)
            raise FileExistsError(errno.EEXIST, "File exists")

        monkeypatch.setattr(os, "link", repeated_link)
        assert LocalStorage(tmp_path).put_if_absent("x", b"mine") is True

    @pytest.mark.parametrize(
        ("function", "number", "remedy"),
        [
            ("link", errno.EPERM, "hard links"),
            ("link", errno.EOPNOTSUPP, "hard links"),
            ("fsync", errno.ENOSPC, "free some space"),
            ("fsync", errno.EDQUOT, "free some space"),
            ("fsync", errno.EROFS, "name another --store"),
            ("fsync", errno.EFBIG, "look at the file system"),
        ],
    )
    def test_failures_name_file_and_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, remedy: str
    ) -> None:
        def fail(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        storage = LocalStorage(tmp_path)
        storage.put("ledger/other", b"")
        monkeypatch.setattr(os, function, fail)
        with pytest.raises(StoreError) as caught:
            storage.put_if_absent("ledger/unit", b"data")
        assert str(tmp_path / "ledger" / "unit") in str(caught.value)
        assert remedy in str(caught.value)
        monkeypatch.undo()
        assert storage.list("") == ["ledger/other"]

    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
    def test_a_broken_disk_or_mount_may_be_one_nodes_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """So the unit is tried elsewhere, where the whole job would have ended."""

        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        storage = LocalStorage(tmp_path)
        storage.put("x", b"data")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UnitError, match=f"cannot write .*ledger/unit: {os.strerror(number)}: look at the file"):
            storage.put_if_absent("ledger/unit", b"data")
        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(UnitError, match=f"cannot read .*/x: {os.strerror(number)}"):
            storage.read("x")

    def test_only_stale_bytes_in_flight_are_swept(self, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path)
        storage.put("ledger/unit", b"data")
        stale, fresh = tmp_path / "runs" / "tmp" / "stale", tmp_path / "runs" / "tmp" / "fresh"
        for path in (stale, fresh):
            path.write_bytes(b"half")
        os.utime(stale, (0, 0))
        storage.sweep(older_than_seconds=3600)
        assert storage.list("") == ["ledger/unit", "runs/tmp/fresh"]

    def test_a_file_where_the_store_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match=r"cannot write .*file/x: "):
            LocalStorage(tmp_path / "file").put("x", b"")

    def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def scandir(path: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(StoreError, match="cannot list"):
            LocalStorage(tmp_path).list("")

    @pytest.mark.parametrize(("error", "number"), [(PermissionError, errno.EACCES), (FileNotFoundError, errno.ENOENT)])
    def test_a_nested_folder_that_vanishes_or_is_unreadable_is_not_an_empty_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError], number: int
    ) -> None:
        storage = LocalStorage(tmp_path)
        for name in ("a/b/1", "a/c/2", "3"):
            storage.put(name, b"x")
        scandir = os.scandir

        def sometimes(path: str | Path) -> Any:
            if Path(path).name == "c":
                raise error(number, "gone or closed", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", sometimes)
        assert storage.list("a/b/") == ["a/b/1"]
        for prefix in ("", "a/", "a/c/"):
            with pytest.raises(StoreError, match=r"cannot list .*gone or closed: ") as caught:
                storage.list(prefix)
            assert type(caught.value.__cause__) is error

    @pytest.mark.parametrize("prefix", ["", "a/", "a", "a/b c/", "a//d/", "a/d/../", "empty/", "a/1", "none/"])
    def test_a_listing_is_every_file_below_by_name(self, tmp_path: Path, prefix: str) -> None:
        """As pathlib names them; links to folders are not followed, all other links are files."""
        for name in ("top", ".hidden", "a/1", "a/10", "a/2", "a/b c/x.parquet", "a/d/e/f/g", "a/d/é", "a.z/1", "ab"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "empty" / "too").mkdir(parents=True)
        (tmp_path / "a" / "to-folder").symlink_to(tmp_path / "a" / "d")
        (tmp_path / "a" / "to-file").symlink_to(tmp_path / "top")
        (tmp_path / "a" / "to-nothing").symlink_to(tmp_path / "nothing")
        found = [Path(folder, name) for folder, _, names in os.walk(tmp_path / prefix) for name in names]
        expected = sorted(path.relative_to(tmp_path).as_posix() for path in found)
        assert LocalStorage(tmp_path).list(prefix) == expected
        assert bool(expected) == (prefix not in ("empty/", "a/1", "none/"))

    def test_a_listing_costs_a_name_for_each_file(self, tmp_path: Path) -> None:
        count = 1000
        (tmp_path / "ledger").mkdir()
        for number in range(count):
            (tmp_path / "ledger" / f"{number:06d}.parquet").touch()
        storage = LocalStorage(tmp_path)
        tracemalloc.start()
        names = storage.list("ledger/")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = sum(sys.getsizeof(name) for name in names)
        assert len(names) == count
        assert peak < size + 40 * count, "more is held than the names"


class TestRanges:
    CONTENT = bytes(range(256)) * 40
    STEPS = st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(-1, 5000)),
            st.tuples(st.just("readinto"), st.integers(0, 5000)),
            st.tuples(st.just("seek"), st.integers(0, 12_000)),
            st.tuples(st.just("seek_end"), st.integers(-3000, 500)),
        ),
        max_size=12,
    )

    @pytest.fixture(scope="class", params=["local", "s3"])
    @classmethod
    def url(cls, request: pytest.FixtureRequest) -> Iterator[str]:
        if request.param == "s3":
            request.getfixturevalue("server")
            ObjectStorage("s3://videos").put("a/shard.tar", cls.CONTENT)
            yield "s3://videos/a/shard.tar"
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "shard.tar")
            path.write_bytes(cls.CONTENT)
            yield str(path)

    @settings(max_examples=40, deadline=None)
    @given(offset=st.integers(0, 11_000), size=st.none() | st.integers(0, 12_000), steps=STEPS)
    def test_a_range_reads_like_its_slice(
        self, url: str, offset: int, size: int | None, steps: list[tuple[str, int]]
    ) -> None:
        end = None if size is None else offset + size
        with open_range(url, offset, size) as file, io.BytesIO(self.CONTENT[offset:end]) as slice_:
            assert _play(file, steps) == _play(slice_, steps)

    def test_beyond_the_end_there_is_nothing(self, url: str) -> None:
        with open_range(url, 1_000_000, 10) as file:
            assert file.read() == b""
            assert file.seek(0, io.SEEK_END) == 0

    def test_the_size_and_version_of_a_shard(self, url: str) -> None:
        before = stat_object(url)
        assert before.size_bytes == len(self.CONTENT)
        assert stat_object(url) == before
        _overwrite(url, b"other")
        after = stat_object(url)
        assert after.size_bytes == 5
        assert after.version != before.version
        _overwrite(url, self.CONTENT)

    def test_a_missing_shard(self, url: str) -> None:
        for function in (open_range, stat_object):
            with pytest.raises(ShardError, match=r"cannot read shard .*gone\.tar"):
                function(url.replace("shard", "gone"))

    def test_a_directory_is_no_shard(self, tmp_path: Path) -> None:
        for function in (open_range, stat_object):
            with pytest.raises(ShardError, match="shard"):
                function(str(tmp_path))

    @pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
    def test_a_local_shard_that_cannot_be_opened_now_may_be_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "open", fail)
        monkeypatch.setattr(Path, "stat", fail)
        for function in (open_range, stat_object):
            with pytest.raises(UnitError, match=f"cannot read shard .*shard.tar: {os.strerror(number)}"):
                function(str(tmp_path / "shard.tar"))

    def test_a_file_in_the_place_of_a_shards_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for function in (open_range, stat_object):
            with pytest.raises(ShardError, match="cannot read shard"):
                function(str(tmp_path / "file" / "shard.tar"))

    def test_a_small_remote_range_is_one_request(self, asked: Asked) -> None:
        """No HEAD, and no second GET, wherever it is read."""
        content = os.urandom(700_000)
        ObjectStorage("s3://videos").put("small.tar", content)
        with open_range("s3://videos/small.tar", 1000, 600_000) as file:
            assert file.seek(0, io.SEEK_END) == 600_000
            for place in (590_000, 0, 300_000, 0, 590_000):
                file.seek(place)
                assert file.read(10_000) == content[1000 + place :][:10_000]
            file.seek(0)
            assert file.read() == content[1000:601_000]
        assert asked == [("GET", 1000, 600_000)]

    def test_a_remote_range_that_is_read_whole_is_one_request(self, asked: Asked) -> None:
        content = os.urandom(5 << 20)
        ObjectStorage("s3://videos").put("whole.tar", content)
        with open_range("s3://videos/whole.tar", 1000, 4 << 20, whole=True) as file:
            file.seek(3 << 20)
            assert file.read() == content[1000 + (3 << 20) : 1000 + (4 << 20)]
            file.seek(0)
            assert file.read() == content[1000 : 1000 + (4 << 20)]
        assert asked == [("GET", 1000, 4 << 20)]

    def test_an_empty_remote_range_is_one_of_an_object_that_is_there(self, server: str) -> None:
        ObjectStorage("s3://videos").put("there.tar", b"abc")
        with open_range("s3://videos/there.tar", 1, 0) as file:
            assert file.read() == b""
        with pytest.raises(ShardError, match="cannot read shard"):
            open_range("s3://videos/not-there.tar", 1, 0)

    def test_a_closed_remote_range_holds_no_bytes(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever decodes may keep the closed file in a cycle of references for long."""
        opened: list[BlockCache] = []

        class Seen(BlockCache):
            def __init__(self, *given: Any, **named: Any) -> None:
                super().__init__(*given, **named)
                opened.append(self)

        monkeypatch.setattr(storage_module, "BlockCache", Seen)
        ObjectStorage("s3://videos").put("there.tar", b"abc")
        with open_range("s3://videos/there.tar"):
            assert opened[0]._blocks
        assert not opened[0]._blocks

    def test_an_object_shorter_than_its_range_ends_early(self, asked: Asked) -> None:
        content = os.urandom(3 << 20)
        ObjectStorage("s3://videos").put("short.tar", content)
        with open_range("s3://videos/short.tar", 1000, 5 << 20) as file:
            assert file.seek(0, io.SEEK_END) == len(content) - 1000
            file.seek(0)
            assert file.read() == content[1000:]
        assert {verb for verb, *_ in asked} == {"GET"}

    def test_a_whole_remote_file_needs_no_look_for_its_size(self, asked: Asked) -> None:
        content = os.urandom(300_000)
        ObjectStorage("s3://videos").put("whole.tar", content)
        with open_range("s3://videos/whole.tar") as file:
            assert file.read() == content
        assert [verb for verb, *_ in asked] == ["GET"]

    def test_a_tar_of_large_videos_is_not_read_to_be_indexed(self, asked: Asked) -> None:
        tar = make_tar([(f"{k}.{end}", bytes(size)) for k in range(6) for end, size in (("mp4", 5 << 20), ("txt", 9))])
        ObjectStorage("s3://videos").put("large.tar", tar)
        with open_range("s3://videos/large.tar") as file:
            found = scan(file, len(tar))
            for member in found.members[1::2]:
                file.seek(member.offset)
                assert file.read(member.size_bytes) == bytes(9)
        assert len(found.members) == 12
        assert len(asked) == 1 + 6  # the texts lie in the blocks that the headers came with
        assert sum(size for _, _, size in asked) < len(tar) // 10

    def test_a_tar_of_small_videos_is_read_in_few_requests(self, asked: Asked) -> None:
        tar = make_tar([(f"{k}.mp4", bytes(100_000)) for k in range(200)])
        ObjectStorage("s3://videos").put("many.tar", tar)
        with open_range("s3://videos/many.tar") as file:
            assert len(scan(file, len(tar)).members) == 200
        assert len(asked) <= 5
        assert sum(size for _, _, size in asked) <= len(tar)

    def test_an_object_that_goes_away_breaks_the_reading_off(self, server: str) -> None:
        storage = ObjectStorage("s3://videos")
        storage.put("soon-gone.tar", bytes(OPENING_BYTES + 1))
        with open_range("s3://videos/soon-gone.tar") as file:
            storage.delete("soon-gone.tar")
            file.seek(OPENING_BYTES)
            with pytest.raises(FileNotFoundError, match=r"there is no s3://videos/soon-gone\.tar"):
                file.read()


@pytest.fixture
def asked(server: str, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the object store is asked for, from here on: verb, offset, size."""
    asked: Asked = []
    client = object_store.ObjectClient
    real_get, real_head = client.get_range, client.head

    def get_range(self: object_store.ObjectClient, name: str, offset: int, size_bytes: int) -> tuple[bytes, int]:
        asked.append(("GET", offset, size_bytes))
        return real_get(self, name, offset, size_bytes)

    def head(self: object_store.ObjectClient, name: str) -> tuple[int, str]:
        asked.append(("HEAD", 0, 0))
        return real_head(self, name)

    monkeypatch.setattr(client, "get_range", get_range)
    monkeypatch.setattr(client, "head", head)
    return asked


def make_tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def _play(file: Any, steps: list[tuple[str, int]]) -> list[Any]:
    heard: list[Any] = []
    for step, number in steps:
        if step == "read":
            heard.append(file.read(number))
        elif step == "readinto":
            buffer = bytearray(number)
            heard.append((file.readinto(buffer), bytes(buffer)))
        else:
            heard.append(file.seek(number, io.SEEK_SET if step == "seek" else io.SEEK_END))
        heard.append(file.tell())
    return heard


def _overwrite(url: str, content: bytes) -> None:
    if is_remote(url):
        ObjectStorage("s3://videos").put("a/shard.tar", content)
    else:
        Path(url).write_bytes(content)


class TestPlaces:
    @pytest.mark.parametrize(
        "url", ["pipe:cat shard.tar", "-", "", "http://host/x.tar", "file:///x", "memory://x", "ftp://x", "://x"]
    )
    def test_other_places_are_refused_by_all(self, url: str) -> None:
        for function in (is_remote, stat_object, open_range, open_storage):
            with pytest.raises(UsageError, match=r"give a local path, s3:// or gs://"):
                function(url)

    def test_a_url_without_a_name(self) -> None:
        with pytest.raises(UsageError, match="s3://NAME/KEY"):
            open_storage("s3://")

    def test_without_obstore_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "obstore.store", None)
        object_store._connect.cache_clear()
        with pytest.raises(UsageError, match=r"pip install 'latentmill\[s3\]'"):
            open_storage("s3://latents/x")


class SlowDown:
    """An S3 service that answers 503 so many times, and then with an object of three bytes."""

    def __init__(self) -> None:
        self.num_errors = self.num_asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.num_asked += 1
                is_disturbed = outer.num_asked <= outer.num_errors
                body = b"<Error><Code>SlowDown</Code></Error>" if is_disturbed else b"abc"
                self.send_response(503 if is_disturbed else 206)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Range", "bytes 0-2/3")
                self.send_header("ETag", '"1"')
                self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 (the server's name for it)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def slow_down(hastened: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDown]:
    service = SlowDown()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{service.server.server_port}")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=service.server.serve_forever, args=(0.01,))
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


_HASTE = 100


@pytest.fixture
def hastened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The object store's patience, at a hundred times the speed."""
    retries, backoff = object_store._RETRIES, object_store._RETRIES["backoff"]
    faster = {name: value / _HASTE if isinstance(value, dt.timedelta) else value for name, value in backoff.items()}
    patience = {**retries, "backoff": faster, "retry_timeout": retries["retry_timeout"] / _HASTE}
    monkeypatch.setattr(object_store, "_RETRIES", patience)
    object_store._connect.cache_clear()
    yield
    object_store._connect.cache_clear()


class TestDisturbances:
    def test_a_short_one_is_waited_out(self, slow_down: SlowDown) -> None:
        slow_down.num_errors = 8
        with open_range("s3://videos/x.tar") as file:
            assert file.read() == b"abc"
        assert slow_down.num_asked == 9

    def test_a_lasting_one_stops_no_job(self, slow_down: SlowDown) -> None:
        slow_down.num_errors = 10_000
        for function in (open_range, stat_object):
            began, slow_down.num_asked = time.monotonic(), 0
            with pytest.raises(UnitError, match=r"cannot read shard s3://videos/x\.tar: .*503"):
                function("s3://videos/x.tar")
            assert 40 <= _HASTE * (time.monotonic() - began) <= 90
            assert 8 < slow_down.num_asked < 60

    def test_it_is_told_before_a_decode_runs_out_of_time(self) -> None:
        """Else it were the clip's fault."""
        retries, seconds = object_store._RETRIES, DecodeLimits().timeout_seconds
        retry_seconds = (retries["retry_timeout"] + retries["backoff"]["max_backoff"]).total_seconds()
        timeout = object_store._CLIENT_OPTIONS["timeout"]
        assert isinstance(timeout, str)
        assert max(retry_seconds, float(timeout.removesuffix("s"))) <= seconds - 10


class TestRemoteFailures:
    @pytest.fixture
    def no_credentials(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
        object_store._connect.cache_clear()
        yield
        object_store._connect.cache_clear()

    def test_missing_credentials_name_the_remedy_and_do_not_hang(self, hastened: None, no_credentials: None) -> None:
        started = time.monotonic()
        with pytest.raises(UnitError, match=r"cannot read s3://latents/a/x: .*AWS_ACCESS_KEY_ID"):
            open_storage("s3://latents/a").exists("x")
        with pytest.raises(UnitError, match=r"cannot read shard s3://videos/x\.tar: .*AWS_ACCESS_KEY_ID") as caught:
            stat_object("s3://videos/x.tar")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 5

    def test_a_bucket_that_is_not_there(self, server: str) -> None:
        with pytest.raises(UnitError, match=r"cannot write s3://nowhere/x"):
            open_storage("s3://nowhere").put_if_absent("x", b"")
        with pytest.raises(UnitError, match=r"cannot list s3://nowhere/"):
            open_storage("s3://nowhere").list("")
