"""The chain of chunks in an AVI file, where FFmpeg passes over a gap without an error.

In:   a seekable file, the end of one packet and the place of the next one.
Out:  whether all that lies between them are chunks, and where the first of them is.
Cost: 8 bytes read per chunk in between, of which there are hardly any: packets of all streams follow each other.
Errors: none.
"""

from __future__ import annotations

import struct
from typing import IO

_HEADER = 8
# A list's or a segment's contents are chunks; the others hold none.
_LISTS, _OTHERS = (b"LIST", b"RIFF"), (b"JUNK", b"idx1")
_MAX_CHUNKS = 64  # more are no gap, but another part of a file that is not interleaved


def first_chunk(file: IO[bytes]) -> int | None:
    """Where the first packets begin, behind "movi", as far as the outline leads there. The file's position is kept."""
    position, place = file.tell(), 12
    try:
        while True:
            file.seek(place)
            header = file.read(_HEADER + 4)
            if len(header) < _HEADER + 4:
                return None
            if header[:4] == b"LIST" and header[8:] == b"movi":
                return place + len(header)
            size = struct.unpack("<I", header[4:8])[0]
            place += _HEADER + size + size % 2
    finally:
        file.seek(position)


def are_linked(file: IO[bytes], end: int, place: int, num_streams: int) -> bool:
    """Whether the chunk that begins at `end` leads, chunk by chunk, to the one whose data is at `place`.

    The file's position is kept.
    """
    if place - _HEADER in (end, end + end % 2) or place < end:  # some writers pad to even places, others do not
        return True
    end += end % 2
    if end > place - _HEADER:
        return False
    position = file.tell()
    try:
        return _lead_to(file, end, place - _HEADER, num_streams)
    finally:
        file.seek(position)


def _lead_to(file: IO[bytes], place: int, goal: int, num_streams: int) -> bool:
    for _ in range(_MAX_CHUNKS):
        file.seek(place)
        header = file.read(_HEADER)
        if len(header) < _HEADER or not _is_known(header[:4], num_streams):
            return False
        size = struct.unpack("<I", header[4:])[0]
        place += _HEADER + (4 if header[:4] in _LISTS else size + size % 2)
        if place >= goal:
            return place == goal
    return True


def _is_known(kind: bytes, num_streams: int) -> bool:
    """A stream's data ("01wb"), its index ("ix01"), or one of the format's own chunks."""
    number = kind[2:] if kind[:2] == b"ix" else kind[:2]
    return kind in (*_LISTS, *_OTHERS) or (number.isdigit() and int(number) < num_streams)
