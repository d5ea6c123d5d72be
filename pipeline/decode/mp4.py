"""The outline of an mp4 or mov file.

In:   a seekable file.
Out:  whether its header's index names all frames, or leaves out some that lie in `moof` boxes.
Cost: 16 bytes per top-level box; a fragmented file is known at its first fragment, any other kind at its first box.
Errors: none; a broken outline ends the walk, as it does for FFmpeg.
"""

from __future__ import annotations

import struct
from typing import IO

_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"pnot")


def is_indexed(file: IO[bytes]) -> bool:
    """Whether there is a `moov` box and no `moof` box (ISO/IEC 14496-12, 8.2.1, 8.8.4). The file's position is kept."""
    position = file.tell()
    try:
        kinds = _top_level_boxes(file)
    finally:
        file.seek(position)
    return b"moov" in kinds and b"moof" not in kinds


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
        if size < 8 or kinds[0] not in _FIRST_BOXES:
            break
        start += size
    return kinds
