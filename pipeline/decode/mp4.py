"""The outline of an mp4 or mov file.

In:   a seekable file.
Out:  whether it is fragmented: whether its header's index leaves out frames that lie in `moof` boxes.
Cost: 16 bytes per top-level box; a fragmented file is known at its first fragment.
Errors: none; a broken outline ends the walk, as it does for FFmpeg.
"""

from __future__ import annotations

import struct
from typing import IO


def is_fragmented(file: IO[bytes]) -> bool:
    """Whether a top-level `moof` box exists (ISO/IEC 14496-12, 8.8.4). The file's position is kept."""
    position = file.tell()
    try:
        return b"moof" in _top_level_boxes(file)
    finally:
        file.seek(position)


def _top_level_boxes(file: IO[bytes]) -> list[bytes]:
    kinds: list[bytes] = []
    start = 0
    while b"moof" not in kinds:
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            break
        size, kind = struct.unpack(">I4s", header[:8])
        if size == 1 and len(header) == 16:
            size = struct.unpack(">Q", header[8:])[0]
        kinds.append(kind)
        if size < 8:
            break
        start += size
    return kinds
