"""A range of a remote object, read in few requests: what was read stays at hand, and reading on asks for more at once.

In:   what fetches a part of the object and says how long the whole object is.
Out:  any part of the range, from memory where it can be.
Cost: one request when it is opened, which brings OPENING_BYTES, or MAX_BLOCK_BYTES when all is about to be read; after
    a jump, one for JUMP_BYTES; where reading goes on, each brings GROWTH times as much as the one before, from
    OPENING_BYTES to MAX_BLOCK_BYTES. The blocks used last are kept, up to MAX_KEPT_BYTES.
Errors: those of the fetch.

A request costs some 40 ms, in which a connection carries about 4 MB. So small videos are fetched whole; of large ones
(a header here, an index at the end, a window in between) come the parts that are read, and gaps up to NEAR_BYTES do not
end a run: small members of a tar are read over, large ones jumped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

OPENING_BYTES = 1 << 20
JUMP_BYTES = 1 << 16
NEAR_BYTES = 1 << 20
GROWTH = 4
MAX_BLOCK_BYTES = 8 << 20
MAX_KEPT_BYTES = 32 << 20

# Offset and size of a part, to those of its bytes that are there, and the size of the whole object.
Fetch = Callable[[int, int], tuple[bytes, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    start: int
    data: bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class BlockCache:
    """Bytes [offset, offset + size_bytes) of an object, or as many of them as there are; without a size, all the rest.

    `size_bytes`, the attribute, is how many there are. whole: all of them are about to be read.
    """

    def __init__(self, fetch: Fetch, offset: int, size_bytes: int | None, *, whole: bool = False) -> None:
        self._fetch = fetch
        opening_bytes = MAX_BLOCK_BYTES if whole else OPENING_BYTES
        wanted = opening_bytes if size_bytes is None else min(size_bytes, opening_bytes)
        data, object_bytes = fetch(offset, max(1, wanted))
        there = max(0, object_bytes - offset)
        self.size_bytes = there if size_bytes is None else min(size_bytes, there)
        self._stop = offset + self.size_bytes
        self._blocks = [_Block(offset, data)]  # in the order of their last use

    def read(self, start: int, size_bytes: int) -> memoryview:
        """Up to `size_bytes` bytes from `start` on, in terms of the object; at least one where the range has one."""
        block = next((block for block in self._blocks if block.start <= start < block.stop), None)
        if block is None:
            block = self._fetched(start, size_bytes)
        else:
            self._blocks.remove(block)
        self._keep(block)
        return memoryview(block.data)[start - block.start :][:size_bytes]

    def close(self) -> None:
        """Let go of all that was kept."""
        self._blocks.clear()

    def _fetched(self, start: int, size_bytes: int) -> _Block:
        """A new block, up to the next one that is there."""
        stop = min((block.start for block in self._blocks if block.start > start), default=self._stop)
        wanted = min(max(size_bytes, self._usual_bytes(start)), stop - start)
        self._make_room(wanted)
        return _Block(start, self._fetch(start, wanted)[0] if wanted > 0 else b"")

    def _usual_bytes(self, start: int) -> int:
        near = (block for block in self._blocks if 0 <= start - block.stop <= NEAR_BYTES)
        before = max(near, key=lambda block: block.stop, default=None)
        return JUMP_BYTES if before is None else min(max(OPENING_BYTES, GROWTH * len(before.data)), MAX_BLOCK_BYTES)

    def _make_room(self, size_bytes: int) -> None:
        while self._blocks and sum(len(block.data) for block in self._blocks) + size_bytes > MAX_KEPT_BYTES:
            del self._blocks[0]

    def _keep(self, block: _Block) -> None:
        if 0 < len(block.data) <= MAX_BLOCK_BYTES:  # whoever asks for more at once keeps it himself
            self._blocks.append(block)
