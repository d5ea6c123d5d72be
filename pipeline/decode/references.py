"""Which pictures of an H.264 stream others are predicted from, and whether one of these is missing, by headers alone.

In:   a stream's decoder configuration record; its packets, from a clean start on.
Out:  of each packet, whether the others need it.
Cost: some microseconds per packet; nothing is decoded.
Errors: none. What is not understood is needed.

A picture's nal_ref_idc says whether others may be predicted from it; frame_num counts those that are, so a hole in it
tells of a lost one (ITU-T H.264, 7.4.1 and 7.4.3). FFmpeg meets such a hole in other ways when it is not given all
packets, and may conceal what it would complain of.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import SupportsBytes

from pipeline.decode.nal import length_size, nal_units

_SLICE, _IDR, _SEI, _PARAMETERS, _DELIMITER, _FILLER = 1, 5, 6, 7, 9, 12
_DISPOSABLE = (_SLICE, _SEI, _DELIMITER, _FILLER)  # whole first bytes, so with nal_ref_idc 0
_HEADER_BYTES = 16  # of a slice: more than its fields up to frame_num can take
_WITH_CHROMA_FORMAT = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


class References:
    """Follows a stream packet by packet. is_intact: all that was said of it so far holds."""

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._length_size = length_size(codec, extradata)
        self._parameters: SequenceParameters | None = None
        self._frame_num: int | None = None  # of the last picture that others are predicted from
        self.is_intact = codec == "h264"
        if self.is_intact:
            self._learn_all(extradata)

    def _learn_all(self, extradata: bytes) -> None:
        if self._length_size == 0:
            units = nal_units(extradata, 0)
        else:  # ISO/IEC 14496-15, 5.3.3.1: so many parameter sets, each with its length in two bytes
            count = extradata[5] & 0x1F if len(extradata) > 5 else 0
            units = itertools.islice(nal_units(extradata[6:], 2), count)
        for unit in units:
            if unit[0] & 0x1F == _PARAMETERS:
                self._learn(unit)

    def _learn(self, unit: bytes) -> None:
        parameters = SequenceParameters.parse(unit)
        self.is_intact &= parameters is not None and self._parameters in (None, parameters)
        self._parameters = parameters

    def follow(self, packet: SupportsBytes) -> bool:
        """Take the next packet. Whether others need it, or may need it: all do once a picture is missing."""
        if not (self.is_intact and (data := bytes(packet))):
            return True
        units = list(nal_units(data, self._length_size))
        kinds = [unit[0] & 0x1F for unit in units]
        if _PARAMETERS in kinds and _IDR in kinds:  # another sequence may begin
            self._parameters = None
        for unit, kind in zip(units, kinds, strict=True):
            if kind == _PARAMETERS:
                self._learn(unit)
        first_slices = [unit for unit in units if unit[0] & 0x1F in (_SLICE, _IDR) and unit[1:2] >= b"\x80"]
        self.is_intact = self.is_intact and len(first_slices) == 1 and self._follows(first_slices[0])
        return not (self.is_intact and _is_disposable(units))

    def _follows(self, first_slice: bytes) -> bool:
        """Whether a picture is the next one, after as many that others are predicted from as there should be."""
        parameters, last = self._parameters, self._frame_num
        if parameters is None or parameters.may_have_gaps or parameters.may_have_fields:
            return False
        frame_num = parameters.frame_num(first_slice)
        if frame_num is None:
            return False
        if first_slice[0] >> 5 & 3:
            self._frame_num = frame_num
        if first_slice[0] & 0x1F == _IDR:
            return frame_num == 0
        return last is None or frame_num == (last + 1) % (1 << parameters.frame_num_bits)


def _is_disposable(units: list[bytes]) -> bool:
    """Whether nothing is predicted from a packet's picture, and there is nothing else in it."""
    kinds = [unit[0] for unit in units]
    return all(kind in _DISPOSABLE for kind in kinds) and _DELIMITER not in kinds[1:]


@dataclasses.dataclass(frozen=True)
class SequenceParameters:
    """What a sequence parameter set says of frame_num (ITU-T H.264, 7.3.2.1.1).

    may_have_gaps: frame_num may leave out numbers. may_have_fields: a picture may be half a frame.
    """

    frame_num_bits: int
    may_have_gaps: bool
    may_have_fields: bool

    @classmethod
    def parse(cls, unit: bytes) -> SequenceParameters | None:
        """None where it is cut short."""
        bits = _Bits(unit[1:])
        try:
            profile = bits.fixed(24) >> 16
            bits.unsigned()
            if profile in _WITH_CHROMA_FORMAT:
                _read_chroma_format(bits)
            frame_num_bits = bits.unsigned() + 4
            _read_order_count(bits)
            bits.unsigned()
            may_have_gaps = bool(bits.fixed(1))
            bits.unsigned()
            bits.unsigned()
            return cls(frame_num_bits, may_have_gaps, may_have_fields=not bits.fixed(1))
        except EOFError:
            return None

    def frame_num(self, first_slice: bytes) -> int | None:
        """Of a slice's picture (7.3.3); None where it is cut short."""
        bits = _Bits(first_slice[1:_HEADER_BYTES])
        try:
            for _ in range(3):
                bits.unsigned()
            return bits.fixed(self.frame_num_bits)
        except EOFError:
            return None


def _read_chroma_format(bits: _Bits) -> None:
    chroma_format = bits.unsigned()
    if chroma_format == 3:
        bits.fixed(1)  # separate colour planes: a picture then has three first slices, and is not understood
    bits.unsigned()
    bits.unsigned()
    bits.fixed(1)
    if bits.fixed(1):
        for matrix in range(12 if chroma_format == 3 else 8):
            if bits.fixed(1):
                _read_scaling_list(bits, 16 if matrix < 6 else 64)


def _read_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _read_order_count(bits: _Bits) -> None:
    kind = bits.unsigned()
    if kind == 0:
        bits.unsigned()
    elif kind == 1:
        bits.fixed(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()


class _Bits:
    """Reads a unit's fields (ITU-T H.264, 7.2 and 9.1). Raises EOFError past its end."""

    def __init__(self, payload: bytes) -> None:
        plain = payload.replace(b"\x00\x00\x03", b"\x00\x00")  # 7.4.1: emulation prevention
        self._value, self._left = int.from_bytes(plain, "big"), 8 * len(plain)

    def fixed(self, count: int) -> int:
        """u(n)."""
        if count > self._left:
            raise EOFError
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def unsigned(self) -> int:
        """ue(v)."""
        zeros = 0
        while not self.fixed(1):
            zeros += 1
        return (1 << zeros) - 1 + self.fixed(zeros)

    def signed(self) -> int:
        """se(v)."""
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)
