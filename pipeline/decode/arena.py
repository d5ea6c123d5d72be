"""Memory that a decode process and its owner both see.

In:   a file descriptor of anonymous memory (memfd_create), inherited by the child.
Out:  numpy views of it.
Cost: the largest request's frames for as long as the child lives; no name in any file system, so a kill leaves nothing.
Errors: OSError when the system has no memory for the map.
"""

from __future__ import annotations

import fcntl
import mmap
import os
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
