"""PyAV's frames with jumps over what nobody wants; every frame is proven to be the one it is taken for.

In:   an open video, Targets.
Out:  (index, frame) in presentation order, the same that decoding all of it gives.
Cost: mp4 and mov: a seek per jump, by the header's index, and nothing decoded before the first one. Other containers:
    two passes over the packets up to the last target. Decoded are at most those between a key frame and its target.
Errors: NotExactError where the proof fails: the caller decodes from the start; MissingPictureError: the caller decodes
    without leaving frames out. FFmpeg's errors pass.

The proof: a key packet is found again by its time stamp and is a clean start (pipeline.decode.seek). Its index is the
number of shown packets before it in the file, plus its leading ones, which come after it and are shown before it. From
there on pipeline.decode.proof tells frames apart. Frame 0 need not be decoded to know its time where the first packet
is a clean start without leading ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from pipeline.decode.nal import length_size
from pipeline.decode.packets import demuxed
from pipeline.decode.proof import NotExactError, codec_of, is_progressive, is_shown, proven_frames
from pipeline.decode.seek import (
    MIN_JUMP_FRAMES,
    SEEKABLE_CODECS,
    KeyFrame,
    KeyFrames,
    Target,
    is_clean_start,
)

if TYPE_CHECKING:
    from av.video.stream import VideoStream

    from pipeline.decode.container import OpenVideo

    Packet = av.Packet[VideoStream]

SEEKABLE_CONTAINERS = ("mp4", "mkv", "mpegts", "flv")
# No picture is decoded before more than 16 that are shown earlier (ITU-T H.264, A.3.1; H.265, A.4.1): a key frame's
# leading packets are all there before the 16th of those that are shown after it.
_MAX_REORDERED = 16
# Without an index, a jump costs a pass over the packets; it also must lie beyond what the decoder has read ahead.
_MIN_PASS_FRAMES = 60
_MAX_ATTEMPTS = 8


class SeekingWalk:
    """A video's frames, from the first on; once `approach` was called, it may jump ahead and leave frames out.

    first_pts: when the first frame is shown. None until it is decoded, unless the packets tell by themselves.

    Args:
        video: freshly opened.
        last: nothing beyond it will be approached.
        reopen: opens the same video once more, for a pass over its packets.
        leaves_out: frames before a target may be left out, if nothing is predicted from them.
    """

    def __init__(
        self,
        video: OpenVideo,
        last: Target,
        reopen: Callable[[], AbstractContextManager[OpenVideo]],
        *,
        leaves_out: bool,
    ) -> None:
        self._video, self._last, self._reopen = video, last, reopen
        # FFmpeg guesses when mkv's packets are decoded.
        self._leaves_out = leaves_out and video.container_name != "mkv"
        self.first_pts, self._packets = _known_start(video, demuxed(video))
        self._target: Target | None = None
        self._frames = proven_frames(video, self._packets, None, 0, self._is_before)
        self._keys: KeyFrames | None = None
        self._next_index, self._pts = 0, self.first_pts or 0
        self._is_plain = codec_of(video) in SEEKABLE_CODECS and is_progressive(video)
        self._header_size = (video.stream.width, video.stream.height)

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        return self

    def __next__(self) -> tuple[int, av.VideoFrame]:
        index, frame = next(self._frames)
        assert frame.pts is not None  # proven
        if self._next_index == 0 and index > 0 and not self._is_as_announced(frame):
            raise NotExactError
        self._is_plain = self._is_plain and not frame.interlaced_frame  # fields may be packets of their own
        self.first_pts = frame.pts if self.first_pts is None else self.first_pts
        self._next_index, self._pts = index + 1, frame.pts
        return index, frame

    def _is_as_announced(self, frame: av.VideoFrame) -> bool:
        """What the first frame would tell of all others, where it was not decoded."""
        return (frame.width, frame.height) == self._header_size and not frame.interlaced_frame

    def approach(self, target: Target) -> None:
        """Leave out frames before the target; go on at the last key frame before it, when that saves enough to pay.

        Raises:
            NotExactError: none of the key frames before the target is a clean start.
        """
        self._target = target
        distance = self._frames_to(target)
        if not self._is_plain or distance < MIN_JUMP_FRAMES:
            return
        if self._keys is None:
            if not self._by_index and distance < _MIN_PASS_FRAMES:
                return
            self._keys = KeyFrames(_indexed_keys(self._video) if self._by_index else self._passed_keys())
        keys = list(itertools.islice(self._keys.up_to(target, self._first_pts, self._tick), _MAX_ATTEMPTS))
        least = self._next_index + (MIN_JUMP_FRAMES if self._by_index else _MIN_PASS_FRAMES)
        # Once this walk has left its place there is no way back: an earlier key frame is tried when the last one is no
        # clean start or is shown after the target, and frames that were there before are left out.
        if keys and keys[0].frames_before >= least and not any(self._starts_at(key, target) for key in keys):
            raise NotExactError

    @property
    def _by_index(self) -> bool:
        return self._video.is_indexed

    @property
    def _first_pts(self) -> int:
        assert self.first_pts is not None
        return self.first_pts

    @property
    def _tick(self) -> Fraction:
        return self._video.tick_seconds

    def _frames_to(self, target: Target) -> float:
        """How many frames lie between here and there; a guess by the average rate when only times are known."""
        if target.index is not None:
            return target.index - self._next_index
        assert target.seconds is not None
        rate = self._video.stream.average_rate or 25
        return float((target.seconds - (self._pts - self._first_pts) * self._tick) * rate)

    def _starts_at(self, key: KeyFrame, target: Target) -> bool:
        """Move to a key frame, unless it is no clean start or is shown after the target."""
        if self._by_index:
            self._video.container.seek(key.time, stream=self._video.stream)
            self._packets = demuxed(self._video)
        else:
            self._video.stream.codec_context.flush_buffers()
        packet = self._find(key)
        if not _is_clean(self._video, packet):
            return False
        ahead, num_leading = _leading(self._video, packet, self._packets) if self._by_index else ([packet], 0)
        pts, index = packet.pts, key.frames_before + num_leading
        if pts is None or not target.is_after(index, (pts - self._first_pts) * self._tick):
            return False
        self._packets = itertools.chain(ahead, self._packets)
        there, frames = self._next_index, proven_frames(self._video, self._packets, pts, index, self._is_before)
        self._frames = itertools.dropwhile(lambda numbered: numbered[0] < there, frames)
        return True

    def _is_before(self, index: int, pts: int) -> bool:
        """Whether a frame is shown no later than the target, so that those before it need not be decoded for it."""
        if self._target is None or not self._leaves_out:
            return False
        return self._target.is_after(index, (pts - self._first_pts) * self._tick)

    def _find(self, key: KeyFrame) -> Packet:
        for packet in self._packets:
            time = packet.dts if self._by_index else packet.pts
            if packet.is_keyframe and time == key.time:
                return packet
            if self._by_index and time is not None and time > key.time:
                break
        raise NotExactError

    def _passed_keys(self) -> list[KeyFrame]:
        with self._reopen() as video:
            return _keys_of_packets(video, self._is_beyond)

    def _is_beyond(self, num_shown: int, time: int) -> bool:
        if self._last.index is not None:
            return num_shown > self._last.index
        assert self._last.seconds is not None
        return (time - self._first_pts) * self._tick > self._last.seconds


def _known_start(video: OpenVideo, packets: Iterator[Packet]) -> tuple[int | None, Iterator[Packet]]:
    """The first frame's time, where the first packet is a clean start and shown first; and all packets."""
    if not video.is_indexed:  # reading ahead could meet holes that lie behind what is wanted
        return None, packets
    first = next(packets, None)
    if first is None:
        return None, iter(())
    if not (first.is_keyframe and is_shown(first, codec_of(video)) and _is_clean(video, first)):
        return None, itertools.chain([first], packets)
    ahead, num_leading = _leading(video, first, packets)
    return None if num_leading else first.pts, itertools.chain(ahead, packets)


def _is_clean(video: OpenVideo, packet: Packet) -> bool:
    codec = codec_of(video)
    return is_clean_start(codec, bytes(packet), length_size(codec, video.stream.codec_context.extradata or b""))


def _leading(video: OpenVideo, key: Packet, packets: Iterator[Packet]) -> tuple[list[Packet], int]:
    """The key packet and those read ahead to see all its leading ones, and how many these are."""
    ahead, num_leading, num_later, codec = [key], 0, 0, codec_of(video)
    while num_later < _MAX_REORDERED:
        packet = next(packets, None)
        if packet is None:
            break
        ahead.append(packet)
        if is_shown(packet, codec):
            if packet.pts is None or key.pts is None:
                raise NotExactError
            num_leading += packet.pts < key.pts
            num_later += packet.pts > key.pts
    return ahead, num_leading


def _indexed_keys(video: OpenVideo) -> list[KeyFrame]:
    """The key frames that an mp4's header names, by decoding time."""
    keys: list[KeyFrame] = []
    num_shown, before = 0, None
    for entry in video.stream.index_entries:
        time = entry.timestamp
        if before is not None and time <= before:
            raise NotExactError
        before = time
        if not entry.is_discard:
            if entry.is_keyframe:
                keys.append(KeyFrame(time, num_shown))
            num_shown += 1
    return keys


def _keys_of_packets(video: OpenVideo, is_beyond: Callable[[int, int], bool]) -> list[KeyFrame]:
    """The clean key frames among the packets up to the last wanted one, by presentation time."""
    codec = codec_of(video)
    keys: list[KeyFrame] = []
    num_shown = num_beyond = 0
    key_time: int | None = None
    for packet in video.packets():
        if not is_shown(packet, codec):
            continue
        time = packet.pts
        if time is None or (packet.is_keyframe and key_time is not None and time <= key_time):
            raise NotExactError
        if packet.is_keyframe:
            key_time = time
            if _is_clean(video, packet):
                keys.append(KeyFrame(time, num_shown))
        elif keys and keys[-1].time == key_time and time < keys[-1].time:
            keys[-1] = KeyFrame(time=keys[-1].time, frames_before=keys[-1].frames_before + 1)
        num_shown += 1
        num_beyond += is_beyond(num_shown, time)
        if num_beyond > 2 * _MAX_REORDERED:
            break
    return keys
