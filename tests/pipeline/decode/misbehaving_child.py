"""A decode process that hangs, crashes, eats memory, or closes its pipes and lives on.

It is asked to by the source's key: `<behaviour>@<position>`.

The behaviour shows when a window of the request holds that grid position.
"""

from __future__ import annotations

import ctypes
import os

from pipeline.decode import child
from pipeline.decode.backend import decode_pieces, decode_windows, pieces_of


def hang():
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the GIL, as native decoders that hang do


def spin():
    while True:
        pass


def crash():
    ctypes.string_at(0)


def fall_mute():
    os.closerange(3, 64)
    hang()


def eat_memory(limits):
    bytearray(limits.memory_bytes)


def misbehave_in(windows, request, limits):
    behaviour, _, position = request.source.key.partition("@")
    if any(window.start <= int(position) < window.start + window.num_frames for window in windows):
        {"hang": hang, "spin": spin, "crash": crash, "mute": fall_mute, "oom": lambda: eat_memory(limits)}[behaviour]()


def decode_or_misbehave(request, limits, out):
    misbehave_in(request.windows, request, limits)
    return decode_windows(request, limits, out)


def pieces_or_misbehave(request, limits, piece_frames):
    pieces = decode_pieces(request, limits, piece_frames)
    for window in pieces_of(request.windows[0], piece_frames):
        misbehave_in([window], request, limits)
        yield next(pieces)


if __name__ == "__main__":
    child.decode_windows = decode_or_misbehave
    child.decode_pieces = pieces_or_misbehave
    child.main()
