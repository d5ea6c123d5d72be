"""Which tars are meant, and which version of each.

In:   patterns as a user types them: paths, globs, braces, list files, s3:// urls.
Out:  a sorted list of absolute paths and urls; a ShardRef per shard, whose `shard_id` changes when the shard does.
Cost: `expand` touches the directories that a glob names; `identify` is one stat or one HEAD request.
Errors: UsageError for a pattern that matches nothing, or that is no path or known url; ShardError and UnitError from
      `identify`.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from pipeline.errors import UsageError
from pipeline.storage import is_remote, stat_object

_MAX_STEM = 60


@dataclasses.dataclass(frozen=True, slots=True)
class ShardRef:
    """One version of one shard: where it lies, its size, and its mtime in nanoseconds or etag."""

    url: str
    size_bytes: int
    version: str

    def __post_init__(self) -> None:
        if not self.url or self.size_bytes < 0:
            raise ValueError(f"a shard has a url and a size, got {self.url=} {self.size_bytes=}")

    @property
    def shard_id(self) -> str:
        """A name that is safe in any file system, and that another version of the shard does not share."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", PurePosixPath(self.url).stem).lstrip(".")[:_MAX_STEM]
        identity = json.dumps([self.url, self.size_bytes, self.version]).encode()
        return f"{stem}-{hashlib.blake2b(identity, digest_size=6).hexdigest()}"


def identify(url: str) -> ShardRef:
    """The shard as it is now.

    Raises:
        ShardError: it is not there.
    """
    stat = stat_object(url)
    return ShardRef(url, stat.size_bytes, stat.version)


def expand(patterns: Sequence[str]) -> list[str]:
    """Every shard that the patterns name, once, sorted; local paths become absolute.

    A pattern is a path, a glob (`*`, `?`, `[]`, `**`; local only), either with braces (`{000..012}`, `{a,b}`), or a
    list file (`@shards` or `shards.txt`): one pattern per line, relative to the working directory, `#` for comments.
    Every name that braces give must be there.

    Raises:
        UsageError: a pattern matches nothing, its braces are unbalanced, or its scheme is not one that is read.
    """
    return sorted({url for pattern in patterns for line in _lines(pattern) for url in _expand_braces(line)})


def _lines(pattern: str) -> list[str]:
    """The patterns of a list file, or the pattern itself."""
    if is_remote(pattern) or not (pattern.startswith("@") or pattern.endswith(".txt")):
        return [pattern]
    path = Path(pattern.removeprefix("@"))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the list of shards {path}: {error}") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"the list of shards {path} names no shard")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    if not is_remote(pattern) and Path(pattern).is_file():
        yield _absolute(pattern)
        return
    try:
        names = braceexpand(pattern)
    except ValueError as error:
        raise UsageError(f"the shard pattern {pattern!r} has unbalanced braces") from error
    for name in names:
        yield from _match(name, pattern)


def _match(name: str, pattern: str) -> list[str]:
    if is_remote(name):
        if glob.has_magic(name):
            raise UsageError(f"{pattern!r}: globs work on local paths only; write the url with braces, {{000..012}}")
        return [name]
    found = [path for path in [name, *glob.glob(name, recursive=True)] if Path(path).is_file()]  # noqa: PTH207
    if not found:
        origin = "" if name == pattern else f" (from {pattern!r})"
        hint = f"; it is a directory: give {name.rstrip('/')}/*.tar" if name and Path(name).is_dir() else ""
        raise UsageError(f"no shard matches {name!r}{origin}{hint}")
    return [_absolute(path) for path in found]


def _absolute(path: str) -> str:
    """The path from the root, without `..`; links stay as they are, so that a name keeps its meaning."""
    absolute = os.path.normpath(Path(path).absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the name of shard {absolute!r} is not UTF-8: rename it") from error
    return absolute
