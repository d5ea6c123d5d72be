"""A part of something as a file of its own.

In:   what reads bytes at an offset, which may give fewer than it was asked for; offset and size of the part.
Out:  an unbuffered, seekable, read-only file.
Cost: one call per read.
Errors: those of what reads.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ByteRange(io.RawIOBase):
    """Bytes [offset, offset + size_bytes) of whatever `fetch(offset, size_bytes)` reads from."""

    def __init__(
        self,
        fetch: Callable[[int, int], bytes | memoryview],
        offset: int,
        size_bytes: int,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._fetch, self._offset, self._size, self._on_close = fetch, offset, size_bytes, on_close
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # RawIOBase would ask for 8 kB at a time: a request each.
        return b"".join(iter(lambda: self._next(self._size), b""))

    def _next(self, size_bytes: int) -> bytes | memoryview:
        wanted = min(size_bytes, max(0, self._size - self._position))
        data = self._fetch(self._offset + self._position, wanted) if wanted else b""
        self._position += len(data)
        return data

    def close(self) -> None:
        self._on_close()
        super().close()
