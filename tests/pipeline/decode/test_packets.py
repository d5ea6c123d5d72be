"""What FFmpeg passes over without an error: holes in containers, and pictures that a decoder complains of."""

from __future__ import annotations

import io
from unittest.mock import Mock

import av
import numpy as np
import pytest

from pipeline.decode.avi import are_linked, first_chunk
from pipeline.decode.backend import decode_windows
from pipeline.decode.complaints import complaints
from pipeline.decode.container import OpenVideo
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.nal import nal_units
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, Window
from pipeline.decode.transport_stream import CheckedTransportStream, is_transport_stream
from tests.clips import numbered_video, read_number, stored

LIMITS = DecodeLimits()
PACKET = 188


def decode(data, folder, *windows):
    source = stored(folder, data)
    request = DecodeRequest(source, Grid(), tuple(Window(*window) for window in windows), ClipShape(64, 64), "pyav")
    return decode_windows(request, LIMITS)


@pytest.fixture(scope="module")
def transport():
    return numbered_video(60, container="mpegts")


def packet_places(data):
    with av.open(io.BytesIO(data)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size]


def video_pid(data):
    with av.open(io.BytesIO(data)) as container:
        return container.streams.video[0].id


def hole_in(data, read_bytes):
    file = CheckedTransportStream(io.BytesIO(data))
    while file.read(read_bytes):
        pass
    return next((place for place in range(len(data)) if file.has_hole(256, place - 1, place)), None)


@pytest.mark.parametrize("read_bytes", [77, PACKET, 1000, 1 << 15])
def test_a_transport_stream_has_holes_where_packets_are_missing_and_none_at_seams(read_bytes, transport):
    other = numbered_video(20, container="mpegts", start_ms=2000)
    assert video_pid(transport) == 256
    for sound in (transport, transport + transport, transport + other, other + transport):
        assert hole_in(sound, read_bytes) is None
    assert hole_in(transport[: PACKET * 20] + transport[PACKET * 23 :], read_bytes) == PACKET * 20
    assert hole_in(transport[:5000] + transport[5100:], read_bytes) == 5076  # the packet behind is out of step
    assert hole_in(transport[:5000] + bytes(300) + transport[5300:], read_bytes) == 5076
    start = packet_places(transport)[30]
    begun = transport[start : start + PACKET].index(b"\0\0\1\xe0") + start
    assert hole_in(transport[:begun] + bytes(4) + transport[begun + 4 :], read_bytes) == start


def test_a_transport_stream_is_known_by_its_first_packets(transport):
    file = io.BytesIO(b"xx" + transport)
    file.seek(2)
    assert is_transport_stream(file)
    assert file.tell() == 2
    assert not is_transport_stream(io.BytesIO(transport[1:]))
    assert not is_transport_stream(io.BytesIO(b"G"))


def test_reading_elsewhere_begins_anew(transport):
    file = CheckedTransportStream(io.BytesIO(transport))
    for start in (0, PACKET * 50, 1000, 777, 0):
        file.seek(start)
        file.read(PACKET * 9 + 5)
    assert file.tell() == PACKET * 9 + 5
    assert not file.has_hole(256, -1, len(transport))


def test_a_frame_that_is_missing_in_a_transport_stream_fails_what_lies_behind(transport, tmp_path):
    places = packet_places(transport)
    early, late = decode(transport[: places[40]] + transport[places[41] :], tmp_path, (2, 8), (45, 4))
    assert [read_number(frame) for frame in early.frames] == list(range(2, 10))
    assert late.reason == "lost_packets"


def test_joined_transport_streams_are_decoded_whole(transport, tmp_path):
    other = numbered_video(30, container="mpegts", start_ms=5000)
    (clip,) = decode(transport + other, tmp_path, (50, 40))
    assert [read_number(frame) for frame in clip.frames] == [*range(50, 60), *range(30)]


def with_sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as output:
        video, sound = output.add_stream("mpeg4", rate=25), output.add_stream("mp2", rate=44100)
        video.width = video.height = 96
        video.pix_fmt = "yuv420p"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 5 * number, np.uint8), format="rgb24")
            output.mux(video.encode(frame))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1764), np.int16), format="s16", layout="mono")
            samples.sample_rate = 44100
            output.mux(sound.encode(samples))
        for stream in (video, sound):
            output.mux(stream.encode(None))
    return buffer.getvalue()


def test_an_avi_with_sound_has_no_gaps_and_one_with_a_hole_has(tmp_path):
    sound = with_sound()
    (clip,) = decode(sound, tmp_path, (0, 40))
    assert len(clip.frames) == 40
    place = packet_places(sound)[20]
    early, late = decode(sound[: place - 8] + bytes(60) + sound[place + 52 :], tmp_path, (0, 15), (25, 4))
    assert isinstance(early, DecodedClip)
    assert late.reason == "lost_packets"
    first = packet_places(sound)[0]
    (beheaded,) = decode(sound[: first - 8] + bytes(8) + sound[first:], tmp_path, (0, 4))
    assert beheaded.reason == "lost_packets"
    assert first_chunk(io.BytesIO(sound[:100])) is None


def test_chunks_are_linked_through_lists_indices_and_other_streams():
    def chunk(kind, size):
        return kind + size.to_bytes(4, "little") + bytes(size + size % 2)

    between = chunk(b"01wb", 5) + b"LIST\x64\0\0\0rec " + chunk(b"ix00", 4) + chunk(b"JUNK", 1)
    file = io.BytesIO(bytes(9) + b"\0" + between + b"00dc\0\0\0\0")
    place = 10 + len(between) + 8
    assert are_linked(file, 9, place, 2)
    assert file.tell() == 0
    assert are_linked(file, place - 8, place, 2)
    assert are_linked(file, place, 5, 2)  # not stored in order
    assert not are_linked(file, 9, place, 1)  # there is no stream 1
    assert not are_linked(file, 9, place + 2, 2)
    assert not are_linked(file, 11, place, 2)


def test_a_gif_that_is_damaged_inside_a_frame_fails_from_there(tmp_path):
    video = bytearray(numbered_video(60, codec="gif", container="gif", pixel_format="rgb8"))
    start = packet_places(bytes(video))[30]
    video[start + 200 : start + 230] = bytes(30)
    early, late = decode(bytes(video), tmp_path, (2, 8), (40, 4))
    assert [read_number(frame) for frame in early.frames] == list(range(2, 10))
    assert str(late) == "corrupt_frame: clip: the decoder says: LZW decode failed"


@pytest.mark.parametrize(
    ("flipped", "told"),
    [(0xFF, "Frame num change"), (0x04, "illegal modification_of_pic_nums_idc"), (0x02, "non-existing PPS")],
)
def test_a_slice_whose_header_is_refused_fails_its_windows(flipped, told, tmp_path):
    video = bytearray(numbered_video(40, codec_options={"x264-params": "bframes=0:keyint=250:slices=4"}))
    with av.open(io.BytesIO(bytes(video))) as container:
        entry = container.streams.video[0].index_entries[20]
    units = list(nal_units(bytes(video[entry.pos : entry.pos + entry.size]), 4))
    assert len(units) == 4
    place = video.index(units[2], entry.pos)
    video[place + 2] ^= flipped
    early, late = decode(bytes(video), tmp_path, (2, 8), (18, 4))
    assert [read_number(frame) for frame in early.frames] == list(range(2, 10))
    assert str(late).startswith(f"corrupt_frame: clip: the decoder says: {told}")


def test_complaints_are_heard_in_their_block_only_and_nothing_is_left_behind():
    level = av.logging.get_level()
    with complaints() as heard:
        av.logging.log(av.logging.ERROR, "h264", "mmco: unref short failure")
        assert heard() == ""
        for _ in range(2):
            av.logging.log(av.logging.ERROR, "h264", "error while decoding MB 5 0, bytestream -39")
    assert heard() == "error while decoding MB"
    with complaints() as again:
        av.logging.log(av.logging.ERROR, "h264", "error while decoding MB 5 0, bytestream -39")
    assert again() == "error while decoding MB"
    with complaints() as other:
        av.logging.log(av.logging.WARNING, "h264", "error while decoding MB 5 0, bytestream -39")
    assert other() == ""
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == (level, True)


def test_streams_that_appear_in_mid_file_do_not_fail_its_end():
    """PyAV asks at a file's end for streams that it did not see at the beginning."""

    def demux(stream):
        yield from (stream, stream)
        raise IndexError("list index out of range")

    video = OpenVideo(Mock(), io.BytesIO(), Mock(demux=demux), "stream", 1, is_indexed=False, transport_stream=None)
    assert list(video.packets()) == ["stream", "stream"]
