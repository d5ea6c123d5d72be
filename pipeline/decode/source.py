"""Where a medium's bytes are read: in its shard, or in memory, once one request has brought all of them.

In:   a MediaSource.
Out:  a file to read it; for a decode, a source that holds its bytes.
Cost: to fetch, one request and up to MAX_FETCHED_BYTES of memory, however often the source is opened then; nothing for
    local files and larger videos.
Errors: UsageError and ShardError, as `open_range`; UnitError when reading breaks off.

A decode opens its source once or several times and reads most of it; a probe reads its beginning, and its index. So
whoever decodes fetches first, and whoever probes does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import IO

from pipeline.block_cache import MAX_BLOCK_BYTES
from pipeline.decode.records import MediaSource
from pipeline.errors import UnitError
from pipeline.storage import is_remote, open_range

# At 40 ms per request and 100 MB/s, a whole video takes 40 ms and 10 ms per MB: 92 ms for 5 MB, at most 124 ms. By
# blocks, a decode of 5 MB takes two to eight requests, 130 to 430 ms, also for one window in the middle: the header,
# the index, a jump, what follows. Only a window within the opening block comes sooner that way (50 ms, or 90 ms with
# the index at the end), by 74 ms at most; and of an mp4, one window costs up to 8 times the bytes. Beyond this size
# both losses grow, and blocks as large as this one leave few requests to save.
MAX_FETCHED_BYTES = MAX_BLOCK_BYTES


@dataclasses.dataclass(frozen=True)
class FetchedSource(MediaSource):
    """A MediaSource and those of its bytes that are there."""

    data: bytes = dataclasses.field(kw_only=True, repr=False)


def fetched(source: MediaSource) -> MediaSource:
    """The source with its bytes, where an object store has them and they are few; else the source as it is.

    Raises:
        ShardError: it is not there.
        UnitError: it cannot be read at the moment.
    """
    if not is_remote(source.path) or source.size_bytes > MAX_FETCHED_BYTES:
        return source
    with open_source(source, whole=True) as file:
        return FetchedSource(**vars(source), data=file.read())


@contextlib.contextmanager
def open_source(source: MediaSource, *, whole: bool = False) -> Iterator[IO[bytes]]:
    """The source's bytes as a seekable, read-only file. whole: all of them are about to be read.

    Raises:
        ShardError: it is not there.
        UnitError: it cannot be opened at the moment, or an OSError breaks off reading it, inside the block.
    """
    try:
        with _opened(source, whole=whole) as file:
            yield file
    except OSError as error:
        raise UnitError(f"cannot read {source.path}: {error.strerror or error}") from error


def _opened(source: MediaSource, *, whole: bool) -> IO[bytes]:
    if isinstance(source, FetchedSource):
        return io.BytesIO(source.data)  # shares the bytes
    return open_range(source.path, source.offset, source.size_bytes, whole=whole)
