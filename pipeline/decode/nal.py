"""NAL units, of which the packets of H.264 and HEVC and their decoders' records are made.

In:   bytes of a packet or a record.
Out:  units without lengths or start codes.
Cost: a copy of each unit.
Errors: none; units cut short are left out.
"""

from __future__ import annotations

from collections.abc import Iterator


def length_size(codec: str, extradata: bytes) -> int:
    """Bytes of a NAL unit's length, from a decoder configuration record; 0 when units have start codes instead.

    ISO/IEC 14496-15, 5.3.3.1 (avcC) and 8.3.3.1 (hvcC); a record begins with its version 1, start codes with 0.
    """
    place = 21 if codec == "hevc" else 4
    return (extradata[place] & 3) + 1 if len(extradata) > place and extradata[0] == 1 else 0


def nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The units of a packet.

    Args:
        data: the packet.
        length_size: bytes of a NAL unit's length (ISO/IEC 14496-15, 5.2.4.1 and 8.3.2.1); 0 for start codes.
    """
    if length_size == 0:
        for unit in data.split(b"\x00\x00\x01"):
            if unit.strip(b"\x00"):
                yield unit
        return
    position = 0
    while position + length_size < len(data):
        size = int.from_bytes(data[position : position + length_size], "big")
        position += length_size
        if 0 < size <= len(data) - position:
            yield data[position : position + size]
        position += size
