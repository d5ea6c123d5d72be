"""Memory for frames: what a decode process and its owner both see, and what the owner hands out.

In:   a file descriptor of anonymous memory (memfd_create), inherited by the child; shapes.
Out:  numpy arrays.
Cost: the largest request's frames for as long as the child lives, and what waits to be used again: up to 64 MiB, or
    one array where that is larger; no name in any file system, so a kill leaves nothing.
Errors: OSError when the system has no memory for the map.
"""

from __future__ import annotations

import collections
import fcntl
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

from pipeline.decode.records import DecodeRequest


class Arena:
    """A mapping of the memory behind `fd`, which it owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Arena:
        """A new, empty arena that can grow but not shrink: a damaged child cannot pull it away under a reader."""
        fd = os.memfd_create("decode-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(fd)

    @property
    def size_bytes(self) -> int:
        """How large the memory is."""
        return os.fstat(self.fd).st_size

    def grow(self, size_bytes: int) -> None:
        """Make the memory at least this large."""
        if size_bytes > self.size_bytes:
            os.ftruncate(self.fd, size_bytes)

    def frames(self, request: DecodeRequest) -> Sequence[np.ndarray]:
        """The request's windows, one after the other: views, uint8 T H W 3, valid until the next request."""
        if self._map is None or len(self._map) < request.decoded_bytes:
            self._map = None  # the old map goes before the new one counts against the address space
            self._map = mmap.mmap(self.fd, self.size_bytes)
        views, offset = [], 0
        for window in request.windows:
            shape = (window.num_frames, request.shape.height, request.shape.width, 3)
            size = int(np.prod(shape))
            views.append(np.frombuffer(self._map, np.uint8, size, offset).reshape(shape))
            offset += size
        return views

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last view."""
        self._map = None
        os.close(self.fd)


class FrameMemory:
    """Gives out arrays, and uses their memory again once nobody refers to them or to a view of them.

    Touching a fresh page costs 30 times the copy of a page: that, and not the copy, is what a hand-over costs.
    """

    def __init__(self, keep_bytes: int = 64 << 20) -> None:
        self._keep_bytes = keep_bytes
        # A deque's own methods are atomic; a lock would not do where the garbage collector may come in between.
        self._free: collections.deque[mmap.mmap] = collections.deque()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array whose values are left over."""
        size_bytes = math.prod(shape)
        memory = self._take(size_bytes)
        whole = np.frombuffer(memory, np.uint8, size_bytes)
        # Views refer to `whole`, so it goes last.
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole.reshape(shape)

    def copy(self, frames: np.ndarray) -> np.ndarray:
        """An array of its own with the same values."""
        copied = self.empty(frames.shape)
        copied[...] = frames
        return copied

    @property
    def free_bytes(self) -> int:
        """How much waits to be used again."""
        return sum(map(len, list(self._free)))

    def _take(self, size_bytes: int) -> mmap.mmap:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if size_bytes <= len(memory) <= 2 * size_bytes:
                return memory
            self._free.append(memory)
        pages = math.ceil(size_bytes / mmap.PAGESIZE)
        return mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _give_back(self, memory: mmap.mmap) -> None:
        self._free.append(memory)
        while self.free_bytes > self._keep_bytes and len(self._free) > 1:
            self._free.popleft()
