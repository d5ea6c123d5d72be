"""Where decoding may start, and for which of the wanted positions a jump there pays.

In:   a container's index, or its packets; grid positions.
Out:  KeyFrames, each with the number of frames shown before it; Targets, in order.
Cost: some bytes per key frame. The index of an mp4 lies in its header; other containers cost a pass over the packets,
    up to the last wanted one, without decoding.
Errors: none.

A key frame counts from which a decoder needs nothing that came before: an IDR picture or an exact recovery point of
H.264, an IRAP picture of HEVC, a key frame of codecs whose key frames reset everything.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from pipeline.decode.backend import TimedFrame, rounding
from pipeline.decode.nal import nal_units
from pipeline.decode.records import Grid

# Frames that are decoded rather than jumped over: a jump costs a flush of the decoder and the frames in flight in it.
MIN_JUMP_FRAMES = 12
SEEKABLE_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")

_H264_IDR, _H264_SEI, _SEI_RECOVERY_POINT = 5, 6, 6
_HEVC_IRAP = range(16, 22)


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """time: identifies the packet, in stream ticks, ascending. frames_before: shown earlier (at least)."""

    time: int
    frames_before: int


@dataclasses.dataclass(frozen=True)
class Target:
    """One wanted moment: a frame's index on a native grid, else seconds after the first frame."""

    index: int | None
    seconds: Fraction | None

    @classmethod
    def at(cls, grid: Grid, position: int) -> Target:
        """The target of a grid position."""
        return cls(position * grid.frame_step, None) if grid.fps is None else cls(None, position / grid.fps)

    def is_after(self, index: int, seconds: Fraction) -> bool:
        """Whether a frame with this index and time comes before the target, or is the frame on screen there."""
        if self.index is not None:
            return index <= self.index
        assert self.seconds is not None
        return seconds <= self.seconds

    def is_done(self, frame: TimedFrame) -> bool:
        """Whether no later frame is needed once this one is there: a moment's frame ends where the next one begins."""
        if self.index is not None:
            return frame.index >= self.index
        assert self.seconds is not None
        return frame.pts_seconds - rounding(frame) > self.seconds


def targets(grid: Grid, positions: Sequence[range]) -> Iterator[Target]:
    """Every wanted position as a Target, in order."""
    return (Target.at(grid, position) for span in positions for position in span)


class KeyFrames:
    """A video's key frames in order."""

    def __init__(self, keys: Iterable[KeyFrame]) -> None:
        self._keys = list(keys)
        self._times = [key.time for key in self._keys]
        self._counts = [key.frames_before for key in self._keys]

    def up_to(self, target: Target, first_time: int, tick_seconds: Fraction) -> Iterator[KeyFrame]:
        """Those that may be shown no later than the target, the last one first. first_time: the first frame's."""
        if target.index is not None:
            stop = bisect.bisect_right(self._counts, target.index)
        else:
            assert target.seconds is not None
            stop = bisect.bisect_right(self._times, first_time + target.seconds / tick_seconds)
        return reversed(self._keys[:stop])


def is_clean_start(codec: str, data: bytes, length_size: int) -> bool:
    """Whether a key packet's pictures, and those shown after them, need nothing before it.

    Args:
        codec: FFmpeg's canonical name.
        data: the packet.
        length_size: as `nal_units` takes it.
    """
    if codec == "h264":
        return any(_is_h264_start(unit) for unit in nal_units(data, length_size))
    if codec == "hevc":
        return any(unit[0] >> 1 & 0x3F in _HEVC_IRAP for unit in nal_units(data, length_size))
    return codec in SEEKABLE_CODECS


def _is_h264_start(unit: bytes) -> bool:
    """An IDR slice, or a recovery point SEI with recovery_frame_cnt 0 and exact_match (ITU-T H.264, D.1.8)."""
    kind = unit[0] & 0x1F
    if kind != _H264_SEI:
        return kind == _H264_IDR
    position = 1
    while position + 2 < len(unit):
        payload, size = unit[position], unit[position + 1]
        if 0xFF in (payload, size):  # longer codes; recovery points have neither
            return False
        if payload == _SEI_RECOVERY_POINT:
            return unit[position + 2] >> 6 == 0b11
        position += 2 + size
    return False
