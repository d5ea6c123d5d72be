"""The proof that every frame of a video is the one it is taken for, and which packets can be left out on the way.

In:   an open video, its packets from a clean start on; of a frame, whether those before it may be left out.
Out:  (index, frame) in presentation order.
Cost: some microseconds per packet. Of H.264 with B-frames about half of the frames before a target are not decoded.
Errors: NotExactError where the proof fails; DecodeError `lost_frame`, a packet gives no frame. FFmpeg's errors pass.

The decoder has to return exactly one frame for every shown packet it is given, in the order of presentation times.

A packet is left out where its frame is shown before what is wanted and nothing is predicted from it, as long as no
picture is missing (pipeline.decode.references), and not before the first frame, until which a decoder's complaints do
not count. Such a frame's index is known when its packet comes, since every later packet is decoded later and so shown
later than that. A decoder that has to learn from such frames how many it must hold back, so as to give frames in order,
is given them.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import av

from pipeline.decode.backend import damage
from pipeline.decode.packets import frames_of
from pipeline.decode.references import References

if TYPE_CHECKING:
    from av.video.stream import VideoStream

    from pipeline.decode.container import OpenVideo

    Packet = av.Packet[VideoStream]

IsBefore = Callable[[int, int], bool]
"""Of an index and a time stamp in ticks: whether a frame there is shown no later than what is wanted next."""

_FRAME_PER_PACKET = ("h264", "hevc", "av1", "mpeg2video")
_PROGRESSIVE = (0, 1)  # AV_FIELD_UNKNOWN, AV_FIELD_PROGRESSIVE


class NotExactError(Exception):
    """This video's frames cannot be told apart by its packets."""


class MissingPictureError(NotExactError):
    """A picture is missing after packets were left out, so that the decoder may not notice: it must be given all."""


def codec_of(video: OpenVideo) -> str:
    """FFmpeg's canonical name."""
    return video.stream.codec_context.codec.canonical_name


def is_progressive(video: OpenVideo) -> bool:
    """Whether each packet holds whole frames, as far as the header tells."""
    return video.stream.codec_context.field_order in _PROGRESSIVE


def is_shown(packet: Packet, codec: str) -> bool:
    """Whether a packet holds a frame that is shown, as far as its container and VP8's header tell."""
    # Bit 4 of a VP8 frame is show_frame (RFC 6386, 9.1).
    hidden = codec == "vp8" and packet.size > 0 and not bytes(packet)[0] & 0x10
    return packet.size > 0 and not packet.is_discard and not hidden


def proven_frames(
    video: OpenVideo, packets: Iterator[Packet], start_pts: int | None, index: int, is_before: IsBefore
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of all shown packets that are not left out, in order, with their indices.

    Args:
        video: whose decoder is used.
        packets: in the file's order.
        start_pts: of the key packet after a jump; frames shown before it do not count.
        index: of the first frame.
        is_before: what may be left out, if nothing is predicted from it.

    Raises:
        NotExactError: a frame belongs to no packet, or decoding cannot begin at `start_pts`.
        MissingPictureError: only where packets were left out.
        DecodeError: `lost_frame`, a packet gives no frame.
    """
    due, codec = _Due(index), codec_of(video)
    references = References(codec, video.stream.codec_context.extradata or b"")
    last: av.VideoFrame | None = None
    for packet in packets:
        is_needed = references.follow(packet)
        if due.has_left_out and not references.is_intact:
            raise MissingPictureError
        began = start_pts is None or last is not None
        if is_shown(packet, codec):
            if packet.pts is None:
                raise NotExactError
            if start_pts is None or packet.pts >= start_pts:
                if began and not is_needed and due.can_spare(packet, is_before):
                    due.leave_out(packet.pts)
                    continue
                due.add(packet.pts)
        for frame in frames_of(video, packet) if began else _first_frames(packet):
            if start_pts is not None and frame.pts is not None and frame.pts < start_pts:
                continue
            if frame.pts is None:
                raise NotExactError
            due.drop_left_out(frame.pts)
            if due.first is None:
                raise NotExactError
            if due.first != frame.pts:
                raise _missing(video, due.first, last)
            last = frame
            yield due.pop(), frame
    due.drop_left_out(sys.maxsize)
    if due.first is not None:
        raise _missing(video, due.first, last)


class _Due:
    """The time stamps of shown packets whose frames have not come yet, or will not since they were left out."""

    def __init__(self, index: int) -> None:
        self.has_left_out = False  # a packet, ever
        self._index = index  # of the first of them
        self._last: int | None = None  # the time stamp of the last frame that came
        self._times: list[int] = []  # a heap
        self._left_out: dict[int, int] = {}  # time stamp: index

    def add(self, pts: int) -> None:
        """A packet goes to the decoder."""
        heapq.heappush(self._times, pts)

    def leave_out(self, pts: int) -> None:
        """A packet does not."""
        self.has_left_out = True
        self._left_out[pts] = self._index + sum(time < pts for time in self._times)
        heapq.heappush(self._times, pts)

    def can_spare(self, packet: Packet, is_before: IsBefore) -> bool:
        """Whether a packet's frame, and one that is shown after it, come before what is wanted.

        Not before the frame's index is certain; nor while the decoder holds back fewer frames than this one comes late.
        """
        pts, dts = packet.pts, packet.dts
        if pts is None or dts is None or pts > dts + (packet.duration or 0) or pts in self._times:
            return False
        if self._last is not None and pts < self._last:
            return False
        later = [time for time in self._times if time > pts]
        num_held = len(self._times) - len(self._left_out)
        if not 0 < len(later) <= num_held:
            return False
        return is_before(self._index + len(self._times) - len(later) + 1, min(later))

    def drop_left_out(self, before_pts: int) -> None:
        """Forget the first ones, as far as they were left out.

        Raises:
            NotExactError: one of them had another index than was thought.
        """
        while self._times and self._times[0] < before_pts and self._times[0] in self._left_out:
            if self._left_out.pop(heapq.heappop(self._times)) != self._index:
                raise NotExactError
            self._index += 1

    @property
    def first(self) -> int | None:
        """The first time stamp."""
        return self._times[0] if self._times else None

    def pop(self) -> int:
        """The index of the first frame, which has come."""
        self._last = heapq.heappop(self._times)
        self._index += 1
        return self._index - 1


def _missing(video: OpenVideo, pts: int, last: av.VideoFrame | None) -> Exception:
    """Why there is no frame for a packet: damage, where a packet in mid-stream cannot be anything but one frame."""
    whole_frames = codec_of(video) in _FRAME_PER_PACKET and is_progressive(video)
    if whole_frames and last is not None and not last.interlaced_frame:
        return damage(
            video.source, "lost_frame", f"the packet at {float(pts * video.tick_seconds):.3f} s gave no frame"
        )
    return NotExactError()


def _first_frames(packet: Packet) -> list[av.VideoFrame]:
    """A packet's frames; damage before the first frame after a jump may be the jump's fault."""
    try:
        frames = packet.decode()
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise NotExactError from error
    if any(frame.is_corrupt for frame in frames):
        raise NotExactError
    return frames
