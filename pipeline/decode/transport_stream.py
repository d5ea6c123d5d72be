"""Holes in an MPEG transport stream, which FFmpeg passes over without an error.

In:   a file, read through here by whoever demuxes it.
Out:  the same bytes; the places where packets are missing (ISO/IEC 13818-1, 2.4.3).
Cost: a few numpy operations per read.
Errors: none.

Every packet of a stream with payload counts one further, modulo 16. Files that were joined break all counters at the
seam: a break that begins with a new program association table is a seam, and no hole.
"""

from __future__ import annotations

import os
from typing import IO

import numpy as np

_PACKET, _SYNC = 188, 0x47
_TABLE_PID, _NULL_PID = 0, 0x1FFF


def is_transport_stream(file: IO[bytes]) -> bool:
    """Whether it begins with three packets of 188 bytes. The file's position is kept."""
    position = file.tell()
    head = file.read(3 * _PACKET)
    file.seek(position)
    return len(head) == 3 * _PACKET and set(head[::_PACKET]) == {_SYNC}


class CheckedTransportStream:
    """A readable, seekable file that notes holes in what is read in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._first_hole: dict[int, int] = {}  # of each stream
        self._media_pids: set[int] = set()
        self._restart(0)

    def read(self, size: int = -1) -> bytes:
        """As the file's."""
        if (position := self._file.tell()) != self._checked + len(self._rest):
            self._restart(position)
        data = self._file.read(size)
        self._check(self._rest + data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As the file's."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As the file's."""
        return self._file.tell()

    def has_hole(self, pid: int, start: int, stop: int) -> bool:
        """Whether packets of this stream, or of an unknown one, are missing between two positions."""
        return any(start < self._first_hole.get(number, start) <= stop for number in (pid, _NULL_PID))

    def _restart(self, position: int) -> None:
        """Packets begin at multiples of their size until one does not."""
        self._checked, self._rest = position, b""
        self._skip = -position % _PACKET
        self._counters: dict[int, tuple[int, int]] = {}
        self._seams: list[int] = []

    def _check(self, data: bytes) -> None:
        start = self._skip
        while (count := (len(data) - start) // _PACKET) > 0:
            packets = np.frombuffer(data, np.uint8, count * _PACKET, start).reshape(count, _PACKET)
            wrong = np.flatnonzero(packets[:, 0] != _SYNC)
            whole = int(wrong[0]) if len(wrong) else count
            self._check_counters(packets[:whole], self._checked + start)
            start += whole * _PACKET
            if whole < count:
                self._add_hole(_NULL_PID, self._checked + start)
                start = _next_packet(data, start)
        self._skip = max(0, start - len(data))
        self._rest, self._checked = data[start:], self._checked + min(start, len(data))

    def _check_counters(self, packets: np.ndarray, start: int) -> None:
        head = packets[:, :6].astype(np.int64)
        pids = (head[:, 1] & 0x1F) << 8 | head[:, 2]
        counters, has_payload = head[:, 3] & 0x0F, head[:, 3] & 0x10 != 0
        announced = (head[:, 3] & 0x20 != 0) & (head[:, 4] > 0) & (head[:, 5] & 0x80 != 0)
        for pid in np.unique(pids[has_payload]):  # the tables, number 0, come first
            rows = np.flatnonzero((pids == pid) & has_payload)
            before, place = self._counters.get(int(pid), (int(counters[rows[0]]) - 1, -1))
            steps = np.diff(counters[rows], prepend=before) % 16
            places = start + rows * _PACKET
            for row in np.flatnonzero((steps > 1) & ~announced[rows]):
                self._add_break(int(pid), int(places[row - 1]) if row else place, int(places[row]))
            self._counters[int(pid)] = int(counters[rows[-1]]), int(places[-1])
            self._check_beginnings(int(pid), packets[rows], places)

    def _check_beginnings(self, pid: int, packets: np.ndarray, places: np.ndarray) -> None:
        """A packet that announces a PES packet must hold one, unless its stream is a table."""
        announced = packets[:, 1] & 0x40 != 0
        begins = _begins_media(packets)
        if (announced & begins).any():
            self._media_pids.add(pid)
        if pid in self._media_pids and (wrong := announced & ~begins).any():
            self._add_hole(pid, int(places[wrong][0]))

    def _add_break(self, pid: int, before: int, place: int) -> None:
        if pid == _TABLE_PID:
            self._seams.append(place)
        elif pid != _NULL_PID and not any(before < seam < place for seam in self._seams):
            self._add_hole(pid, place)

    def _add_hole(self, pid: int, place: int) -> None:
        self._first_hole[pid] = min(place, self._first_hole.get(pid, place))


def _begins_media(packets: np.ndarray) -> np.ndarray:
    """Which payloads begin with a PES packet's start code."""
    adaptation = np.where(packets[:, 3] & 0x20, packets[:, 4].astype(np.int64) + 1, 0)
    begin = np.minimum(4 + adaptation, _PACKET - 3)
    prefix = packets[np.arange(len(packets))[:, None], begin[:, None] + np.arange(3)]
    begins: np.ndarray = (prefix == (0, 0, 1)).all(axis=1)
    return begins


def _next_packet(data: bytes, start: int) -> int:
    """Where two packets follow each other again, or the end."""
    position = data.find(_SYNC, start + 1)
    while position != -1 and data[position + _PACKET : position + _PACKET + 1] not in (b"", bytes([_SYNC])):
        position = data.find(_SYNC, position + 1)
    return len(data) if position == -1 else position
