"""Memory for frames: taken once, lent again and again, and where wanted shared by a decode process and its owner.

In:   shapes; for shared memory a descriptor of anonymous memory (memfd_create), inherited by the child.
Out:  numpy arrays, each its borrower's for as long as anything refers to it.
Cost: what is lent, and what waits to be lent again: up to 64 MiB, or one array where that is larger; of address space
      what was ever lent at once, by class of size (four from each power of two to the next). No name in any file
      system, so a kill leaves nothing.
Errors: OSError when the system has no memory for the map.

Touching a fresh page costs 30 times the copy of a page, so memory is used again; and frames that the child writes where
the owner reads them are not copied at all.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import itertools
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

_SEGMENT_BYTES = 64 << 20
_TOGETHER_BYTES = 8 << 20  # of neighbours, soon in one batch: lending costs 10 us, as much as to copy a tiny clip
# Of the kernel's headers; Pythons built with old ones (conda's) lack the names, and os.memfd_create.
_CLOEXEC, _ALLOW_SEALING = 1, 2
_ADD_SEALS, _SEAL_SHRINK = 1033, 2


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """Part of a map; `offset` is its place in the file behind the map."""

    memory: mmap.mmap
    start: int
    size_bytes: int
    offset: int = 0


class FrameMemory:
    """Lends arrays, and lends their memory again once nobody refers to them or to a view of them."""

    def __init__(self, keep_bytes: int = 64 << 20) -> None:
        self._keep_bytes = keep_bytes
        # A deque's own methods are atomic; a lock would not do where the garbage collector may come in between.
        self._free: dict[int, collections.deque[_Block]] = {}

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array whose values are left over."""
        return self._lend(shape)[0]

    @property
    def free_bytes(self) -> int:
        """How much waits to be lent again."""
        return sum(size_bytes * len(blocks) for size_bytes, blocks in list(self._free.items()))

    def _lend(self, shape: tuple[int, ...]) -> tuple[np.ndarray, _Block]:
        size_bytes = math.prod(shape)
        block = self._take(_class_bytes(size_bytes))
        whole = np.frombuffer(block.memory, np.uint8, size_bytes, block.start)
        # Views refer to `whole`, so it goes last.
        weakref.finalize(whole, self._give_back, block).atexit = False
        return whole.reshape(shape), block

    def _take(self, size_bytes: int) -> _Block:
        try:
            return self._free[size_bytes].pop()
        except (KeyError, IndexError):
            return self._new_block(size_bytes)

    def _give_back(self, block: _Block) -> None:
        self._free.setdefault(block.size_bytes, collections.deque()).append(block)
        while self.free_bytes > self._keep_bytes:
            # Sizes that nobody gives back any more go first; of this one, one stays, however large.
            others = [
                blocks for size_bytes, blocks in list(self._free.items()) if blocks and size_bytes != block.size_bytes
            ]
            blocks = others[0] if others else self._free[block.size_bytes]
            if not others and len(blocks) <= 1:
                return
            try:
                self._drop(blocks.popleft())
            except IndexError:  # another thread was faster
                return

    def _new_block(self, size_bytes: int) -> _Block:
        return _Block(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0, size_bytes)

    def _drop(self, block: _Block) -> None:
        """Give a block's pages back to the system: here they go with their map."""


class SharedFrameMemory(FrameMemory):
    """FrameMemory that a child process maps, too, by an inherited descriptor."""

    def __init__(self, keep_bytes: int = 64 << 20) -> None:
        super().__init__(keep_bytes)
        self.fd = getattr(os, "memfd_create", _libc_memfd_create)("decode-frames", _CLOEXEC | _ALLOW_SEALING)
        # It can grow but not shrink: a damaged child cannot pull it away under a reader.
        fcntl.fcntl(self.fd, _ADD_SEALS, _SEAL_SHRINK)
        self._segment: mmap.mmap | None = None
        self._segment_offset = self._used_bytes = 0
        self._without_pages: dict[int, collections.deque[_Block]] = {}

    @property
    def size_bytes(self) -> int:
        """How much the child has to map; not all of it has pages."""
        return os.fstat(self.fd).st_size

    def lend(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        """A uint8 array, and where the child finds it."""
        array, block = self._lend(shape)
        return array, block.offset

    def lend_all(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[np.ndarray], list[int]]:
        """An array of each shape, and where the child finds them. Small ones lie together, and are given back so."""
        sizes = list(map(math.prod, shapes))
        if sum(sizes) > _TOGETHER_BYTES:
            arrays, offsets = zip(*map(self.lend, shapes), strict=True)
            return list(arrays), list(offsets)
        whole, offset = self.lend((sum(sizes),))
        ends = list(itertools.accumulate(sizes, initial=0))
        pairs = zip(itertools.pairwise(ends), shapes, strict=True)
        return [whole[start:end].reshape(shape) for (start, end), shape in pairs], [offset + one for one in ends[:-1]]

    def close(self) -> None:
        """Give the descriptor back; memory goes with the last array."""
        os.close(self.fd)

    def _new_block(self, size_bytes: int) -> _Block:
        try:
            return self._without_pages[size_bytes].pop()
        except (KeyError, IndexError):
            pass
        # Few maps, since each holds a descriptor.
        if self._segment is None or self._used_bytes + size_bytes > len(self._segment):
            self._segment_offset, self._used_bytes = self.size_bytes, 0
            length = max(_SEGMENT_BYTES, size_bytes)
            os.ftruncate(self.fd, self._segment_offset + length)
            self._segment = mmap.mmap(self.fd, length, offset=self._segment_offset)
        start = self._used_bytes
        self._used_bytes += size_bytes
        return _Block(self._segment, start, size_bytes, self._segment_offset + start)

    def _drop(self, block: _Block) -> None:
        with contextlib.suppress(OSError):  # Then it keeps its pages, and is lent again as well.
            block.memory.madvise(mmap.MADV_REMOVE, block.start, block.size_bytes)
        self._without_pages.setdefault(block.size_bytes, collections.deque()).append(block)


class FrameView:
    """The child's side of a SharedFrameMemory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None

    @property
    def size_bytes(self) -> int:
        """How much there is to map."""
        return os.fstat(self._fd).st_size

    def array(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """What the owner has lent itself under this offset."""
        # All of a message's arrays are lent before it comes: none of them keeps an old map beside the new one.
        if self._map is None or len(self._map) < self.size_bytes:
            self._map = None  # the old map goes before the new one counts against the address space
            self._map = mmap.mmap(self._fd, self.size_bytes)
        return np.frombuffer(self._map, np.uint8, math.prod(shape), offset).reshape(shape)


def _class_bytes(size_bytes: int) -> int:
    """The size, rounded up to an eighth of the next power of two: few sizes, so that others' memory fits again."""
    step = max(mmap.PAGESIZE, 1 << (max(1, size_bytes) - 1).bit_length() >> 3)
    return max(1, math.ceil(size_bytes / step)) * step


def _libc_memfd_create(name: str, flags: int) -> int:
    fd: int = ctypes.CDLL(None, use_errno=True).memfd_create(name.encode(), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd
