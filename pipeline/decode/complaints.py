"""Damage that FFmpeg conceals, but complains of.

In:   whatever FFmpeg logs while it demuxes or decodes a packet.
Out:  the complaint that a picture is not what was encoded, or that packets are missing.
Cost: some microseconds per block.
Errors: none.

Only complaints count that mean missing or wrong pixels; FFmpeg has others, about metadata and manners, which sound
files cause as well. The arithmetic decoders of VP8, VP9 and AV1 cannot tell damage from data and hardly ever complain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import av.logging

_MPEG_BLOCKS = ("Error at MB", "ac-tex damaged", "illegal dc vlc", "invalid cbp", "mcbpc damaged", "cbpy damaged")
# A slice whose header is refused is left out without an error.
_H264_HEADERS = (
    "A non-intra slice in an IDR NAL unit",
    "Changing field mode",
    "Frame num change",
    "QP ",
    "abs_diff_pic_num overflow",
    "cabac_init_idc",
    "deblocking filter parameters",
    "deblocking_filter_idc",
    "illegal memory management control operation",
    "illegal modification_of_pic_nums_idc",
    "log2_weight_denom",
    "non-existing PPS",
    "pps_id",
    "reference count",
    "reference overflow",
    "slice type",
)
_TELLING = {
    "gif": ("LZW decode failed",),
    "h264": (
        "error while decoding MB",
        "Missing reference picture",
        "reference picture missing during reorder",
        "block unavailable for requested intra",
        *_H264_HEADERS,
    ),
    "hevc": ("Could not find ref with POC", "Error constructing the frame RPS"),
    "matroska,webm": ("invalid as first byte of an EBML number",),
    "mjpeg": ("error y=", "error count"),
    "mpeg2video": (*_MPEG_BLOCKS, "Invalid mb type", "slice mismatch", "end mismatch"),
    "mpeg4": (*_MPEG_BLOCKS, "illegal MB_type", "slice end not reached"),
    "vp8": ("Invalid partitions",),
}


@contextmanager
def complaints() -> Iterator[Callable[[], str]]:
    """A function that gives the first telling complaint on this thread since the beginning of the block, or ""."""
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as logs:
            yield lambda: _first_telling(logs) if logs else ""
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _first_telling(logs: list[tuple[int, str, str]]) -> str:
    return next((text for _, name, message in logs for text in _TELLING.get(name, ()) if text in message), "")
