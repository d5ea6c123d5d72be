"""Bytes at rest: ranges of shards to read, and the objects of a store, on POSIX file systems and object stores.

In:   a path, or an s3:// or gs:// url.
Out:  file-like ranges; a Storage whose `put_if_absent` is the one atomic commit of the whole project.
Cost: a local commit is write, fsync, link, fsync of the directory; a remote one is a single conditional put. A remote
      range costs a request when it is opened, and few more where it is larger (pipeline.block_cache).
Errors: UsageError for a url of another kind; ShardError for an input that is not there, UnitError when it cannot be
      opened now, OSError when reading it breaks off; of an output that cannot be read or written, StoreError on a file
      system, UnitError in an object store or on a broken disk or mount, FileNotFoundError for what is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from pipeline.block_cache import BlockCache
from pipeline.byte_range import ByteRange
from pipeline.errors import ShardError, StoreError, UnitError, UsageError
from pipeline.object_store import REMOTE_SCHEMES, ObjectStorage, client_of

_READ_AHEAD_BYTES = 1 << 16
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)


def is_remote(url: str) -> bool:
    """Whether the url names an object store.

    Raises:
        UsageError: it is neither a path nor a url of REMOTE_SCHEMES; `pipe:`, which would run a shell, above all.
    """
    scheme, separator, _ = url.partition("://")
    if separator and scheme in REMOTE_SCHEMES:
        return True
    if separator or url.startswith("pipe:") or url in ("", "-"):
        accepted = " or ".join(f"{scheme}://" for scheme in REMOTE_SCHEMES)
        raise UsageError(f"{url!r} is no place that latentmill reads or writes: give a local path, {accepted}")
    return False


@dataclasses.dataclass(frozen=True)
class ObjectStat:
    """Size and version of an input; the version changes when the bytes do (mtime in ns, or an etag)."""

    size_bytes: int
    version: str


def stat_object(url: str) -> ObjectStat:
    """Size and version of a shard.

    Raises:
        ShardError: it is not there or is not a file.
        UnitError: nobody can tell at the moment.
    """
    with _input_errors(url):
        if is_remote(url):
            client, name = client_of(url)
            return ObjectStat(*client.head(name))
        status = Path(url).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ShardError(f"shard {url} is not a file")
    return ObjectStat(status.st_size, str(status.st_mtime_ns))


def open_range(url: str, offset: int = 0, size_bytes: int | None = None, *, whole: bool = False) -> IO[bytes]:
    """A seekable, buffered, read-only view of bytes [offset, offset + size_bytes) of a file or object.

    It ends where the file ends; without `size_bytes` it reaches to there. whole: all of it is about to be read, which
    an object store is then asked for at once; on a local file it is all the same.

    Raises:
        ShardError: it is not there or is not a file.
        UnitError: it cannot be opened at the moment.
    """
    if is_remote(url):
        return io.BufferedReader(_remote_range(url, offset, size_bytes, whole=whole), _READ_AHEAD_BYTES)
    with _input_errors(url):
        handle = Path(url).open("rb", buffering=0)  # noqa: SIM115 (the range closes it)
    there = max(0, os.fstat(handle.fileno()).st_size - offset)
    size = there if size_bytes is None else min(size_bytes, there)
    raw = ByteRange(lambda start, count: os.pread(handle.fileno(), count, start), offset, size, handle.close)
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def _remote_range(url: str, offset: int, size_bytes: int | None, *, whole: bool) -> ByteRange:
    client, name = client_of(url)
    with _input_errors(url):
        blocks = BlockCache(functools.partial(client.get_range, name), offset, size_bytes, whole=whole)
    return ByteRange(blocks.read, offset, blocks.size_bytes, blocks.close)


@contextlib.contextmanager
def _input_errors(url: str) -> Iterator[None]:
    """OSErrors become ShardError where the shard is gone, which no retry changes, and else UnitError."""
    try:
        yield
    except OSError as error:
        is_gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        kind = ShardError if is_gone else UnitError
        raise kind(f"cannot read shard {url}: {error.strerror or error}") from error


class Storage(Protocol):
    """The objects below one prefix. Names are relative, with `/` between parts; every object is written whole.

    Every method raises StoreError when a file system cannot be read or written, UnitError when an object store cannot,
    or the disk or mount is broken.
    """

    @property
    def url(self) -> str:
        """The prefix, without a slash at its end; a local one is absolute."""
        ...

    def read(self, name: str) -> bytes:
        """The whole object; FileNotFoundError when it is not there."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace atomically."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write atomically if nothing is there yet; False when something was."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Names of all objects below the prefix `some/folder/`, sorted; of all with ""."""
        ...

    def delete(self, name: str) -> None:
        """Remove the object if it is there."""
        ...


class LocalStorage:
    """A Storage in a directory. Bytes in flight lie under `runs/tmp`, so that a kill leaves nothing among the data."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).absolute()

    @property
    def url(self) -> str:
        return str(self._root)

    def read(self, name: str) -> bytes:
        with _store_errors("read", self._root / name):
            return (self._root / name).read_bytes()

    def exists(self, name: str) -> bool:
        with _store_errors("read", self._root / name):
            return (self._root / name).is_file()

    def put(self, name: str, data: bytes) -> None:
        with self._in_flight(name, data) as temporary:
            temporary.replace(self._root / name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        with self._in_flight(name, data) as temporary:
            try:
                os.link(temporary, self._root / name)
            except FileExistsError:
                # NFS may repeat a link whose answer was lost, and then finds its own; the count of links tells.
                return temporary.stat().st_nlink == 2
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise StoreError(
                        f"cannot write {self._root / name}: {error.strerror}: commits need hard links, which this "
                        "file system lacks: put --store on another one"
                    ) from error
                raise
        return True

    def sweep(self, older_than_seconds: float) -> None:
        """Remove bytes in flight that killed processes left below `runs/tmp`."""
        for path in (self._root / "runs" / "tmp").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink()

    @contextlib.contextmanager
    def _in_flight(self, name: str, data: bytes) -> Iterator[Path]:
        """The data in a synced temporary file; afterwards the target's directory is synced."""
        target = self._root / name
        temporary = self._root / "runs" / "tmp" / uuid.uuid4().hex
        with _store_errors("write", target):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            _make_directory(target.parent)
            try:
                with temporary.open("wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            _sync_directory(target.parent)

    def list(self, prefix: str) -> list[str]:
        base = self._root / prefix
        with _store_errors("list", base):
            if not base.is_dir():
                return []
            folder = base.relative_to(self._root).as_posix()
            return sorted(_files_below(str(base), "" if folder == "." else f"{folder}/"))

    def delete(self, name: str) -> None:
        with _store_errors("delete", self._root / name):
            (self._root / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _store_errors(verb: str, path: Path) -> Iterator[None]:
    """OSErrors become StoreErrors with a remedy, or UnitErrors where one node may have lost its disk or its mount.

    A file that is not there to be read stays FileNotFoundError.
    """
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise
        kind = UnitError if error.errno in _BROKEN else StoreError
        raise kind(f"cannot {verb} {path}: {error.strerror or error}: {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user the right to, or name another --store"
    return "look at the file system, then run the same command again"


def _files_below(folder: str, prefix: str) -> Iterator[str]:
    """Names of the files below a folder, each after the prefix; links to folders are neither followed nor named.

    Strings alone, one at a time: a ledger has millions of names.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield prefix + entry.name
            elif not entry.is_symlink():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")


def _make_directory(directory: Path) -> None:
    """Like mkdir -p, with each new directory's name synced, so that a power cut cannot take a commit's folder away."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_storage(url: str) -> Storage:
    """The Storage at a path or url."""
    return ObjectStorage(url) if is_remote(url) else LocalStorage(url)
