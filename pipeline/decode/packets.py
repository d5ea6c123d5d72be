"""A stream's packets and frames, with an error where FFmpeg passes over damage without one.

In:   an open video.
Out:  packets in the file's order; the frames of a packet.
Cost: some microseconds per packet. In MPEG transport streams a packet is held back until the next one is there.
Errors: DecodeError `lost_packets`, a hole in the container; `corrupt_frame`, a frame that the decoder complains of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import av

from pipeline.decode.avi import are_linked, first_chunk
from pipeline.decode.backend import damage
from pipeline.decode.complaints import complaints
from pipeline.errors import DecodeError

if TYPE_CHECKING:
    from av.video.stream import VideoStream

    from pipeline.decode.container import OpenVideo
    from pipeline.decode.transport_stream import CheckedTransportStream

    Packet = av.Packet[VideoStream]


def demuxed(video: OpenVideo) -> Iterator[Packet]:
    """All packets of the stream, and the empty one that ends it. Raises DecodeError at the first hole."""
    if video.transport_stream is not None:
        return _continuous(video, video.transport_stream)
    if video.container_name == "avi":
        return _linked(video)
    if video.container_name == "mkv":
        return _understood(video)
    return video.packets()


def _continuous(video: OpenVideo, transport_stream: CheckedTransportStream) -> Iterator[Packet]:
    packets = video.packets()
    held, start = next(packets, None), 0
    while held is not None:
        following = next(packets, None)
        stop = following.pos if following is not None and following.size else sys.maxsize
        if stop is not None and transport_stream.has_hole(video.stream.id, start, stop):
            raise _hole(video)
        yield held
        held, start = following, start if stop is None else stop


def _linked(video: OpenVideo) -> Iterator[Packet]:
    end = first_chunk(video.file)
    for packet in video.container.demux():
        if packet.size and packet.pos is not None and packet.pos > 0:
            if end is not None and not are_linked(video.file, end, packet.pos, len(video.container.streams)):
                raise _hole(video)
            end = packet.pos + packet.size
        if packet.stream_index == video.stream.index:
            yield cast("Packet", packet)


def _understood(video: OpenVideo) -> Iterator[Packet]:
    packets = video.packets()
    while True:
        with complaints() as heard:
            packet = next(packets, None)
        if heard():
            raise _hole(video)
        if packet is None:
            return
        yield packet


def _hole(video: OpenVideo) -> DecodeError:
    return damage(video.source, "lost_packets", "the container has a hole, or something foreign in it")


def frames_of(video: OpenVideo, packet: Packet, *, began: bool = True) -> Iterator[av.VideoFrame]:
    """What the decoder gives for a packet. Raises DecodeError when it complains, after what is shown earlier.

    Before its first frame (`began`) a decoder may complain for good reasons: of pictures that are predicted from others
    before the place where it began, and that it does not show.
    """
    strict = began or not video.stream.codec_context.has_b_frames
    with complaints() as heard:
        frames = packet.decode()
    if not (strict and (complaint := heard())):
        yield from frames
        return
    for frame in frames:
        if frame.pts is None or packet.pts is None or frame.pts >= packet.pts:
            break
        yield frame
    raise damage(video.source, "corrupt_frame", f"the decoder says: {complaint}")
