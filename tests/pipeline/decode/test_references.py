"""What H.264's headers tell of pictures, on packets made bit by bit from the standard and on those of x264."""

from __future__ import annotations

import io

import av
import pytest

from pipeline.decode.nal import nal_units
from pipeline.decode.references import References
from tests.clips import numbered_video

AVC, HIGH, HIGH_444 = 77, 100, 244


class Writer:
    """Writes a unit's fields."""

    def __init__(self, first_byte):
        self.bits = f"{first_byte:08b}"

    def fixed(self, count, value):
        self.bits += f"{value:0{count}b}"
        return self

    def unsigned(self, *values):
        for value in values:
            code = f"{value + 1:b}"
            self.bits += "0" * (len(code) - 1) + code
        return self

    def signed(self, *values):
        return self.unsigned(*(2 * value - 1 if value > 0 else -2 * value for value in values))

    def unit(self):
        """With the stop bit and emulation prevention (7.4.1)."""
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        unit, zeros = bytearray(), 0
        for byte in int(bits, 2).to_bytes(len(bits) // 8, "big"):
            if zeros == 2 and byte <= 3:
                unit.append(3)
                zeros = 0
            unit.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return bytes(unit)


def parameters(*, profile=AVC, frame_num_bits=4, order_count=0, gaps=0, frames_only=1, scaling=None):
    """A sequence parameter set (7.3.2.1.1)."""
    writer = Writer(0x67).fixed(8, profile).fixed(16, 0x001F).unsigned(0)
    if profile == HIGH_444:
        writer.unsigned(3).fixed(1, 0)
    if profile == HIGH:
        writer.unsigned(1)
    if profile in (HIGH, HIGH_444):
        writer.unsigned(0, 0).fixed(1, 0).fixed(1, scaling is not None)
        for deltas in scaling or []:
            writer.fixed(1, bool(deltas)).signed(*deltas)
    writer.unsigned(frame_num_bits - 4, order_count)
    if order_count == 0:
        writer.unsigned(2)
    if order_count == 1:
        writer.fixed(1, 0).signed(-3, 2).unsigned(2).signed(1, -1)
    return writer.unsigned(3).fixed(1, gaps).unsigned(19, 11).fixed(1, frames_only).fixed(5, 0b11000).unit()


def slice_of(frame_num, *, needed=True, kind=1, first=0, bits=4):
    """A slice header (7.3.3) and some data."""
    writer = Writer(kind | (0x40 if needed else 0)).unsigned(first, 5, 0)
    return writer.fixed(bits, frame_num).fixed(24, 0x155555).unit()


def packet(*units):
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def with_start_codes(*units):
    return b"".join(b"\x00\x00\x01" + unit for unit in units)


def record(*units):
    """A decoder configuration record (ISO/IEC 14496-15, 5.3.3.1)."""
    sets = b"".join(len(unit).to_bytes(2, "big") + unit for unit in units)
    return b"\x01\x4d\x00\x1f\xff" + bytes([0xE0 | len(units)]) + sets + b"\x01\x00\x02\x68\xee"


IDR = packet(slice_of(0, kind=5))
SPARE = slice_of(1, needed=False)
DELIMITER, SEI, FILLER = b"\x09\xf0", b"\x06\x01\x01\x34\x80", b"\x0c\xff\x80"


def after_idr(*extra, **options):
    references = References("h264", record(parameters(**options), *extra))
    assert references.follow(packet(slice_of(0, kind=5, bits=options.get("frame_num_bits", 4))))
    return references


@pytest.mark.parametrize(
    ("units", "needed"),
    [
        ([SPARE], False),
        ([DELIMITER, SEI, SPARE, slice_of(1, needed=False, first=40), FILLER], False),
        ([slice_of(1)], True),
        ([SPARE, slice_of(1, first=40)], True),
        ([parameters(), SPARE], True),
        ([b"\x02" + SPARE[1:]], True),  # data partitions
        ([DELIMITER, DELIMITER, SPARE], True),
        ([SPARE, SPARE], True),  # two pictures
        ([slice_of(1, needed=False, first=40)], True),  # its first slice is missing
        ([DELIMITER], True),
        ([SPARE[:1]], True),
        ([b"\x01\x9e"], True),
    ],
)
def test_what_a_packet_may_hold_that_others_do_not_need(units, needed):
    assert after_idr().follow(packet(*units)) is needed
    references = References("h264", with_start_codes(parameters()))
    references.follow(with_start_codes(slice_of(0, kind=5)))
    assert references.follow(with_start_codes(*units)) is needed


def test_a_missing_picture_is_told_and_nothing_is_spared_from_then_on():
    references = after_idr()
    assert not references.follow(packet(slice_of(1, needed=False)))
    assert references.follow(packet(slice_of(1)))
    assert not references.follow(packet(slice_of(2, needed=False)))
    assert not references.follow(packet(slice_of(2, needed=False)))
    assert references.is_intact
    assert references.follow(packet(slice_of(3, needed=False)))  # 2 was to be a picture that others need
    assert not references.is_intact
    assert references.follow(packet(slice_of(1, needed=False)))
    assert not references.is_intact


@pytest.mark.parametrize("lost", [slice_of(0), slice_of(2), slice_of(1, kind=5)])
def test_a_needed_picture_out_of_turn_is_told(lost):
    references = after_idr()
    references.follow(packet(lost))
    assert not references.is_intact


def test_numbers_begin_anew_after_an_idr_picture_and_at_their_end():
    references = after_idr()
    for number in [*range(1, 16), 0, 1]:
        assert not references.follow(packet(slice_of(number, needed=False)))
        assert references.follow(packet(slice_of(number)))
    assert references.follow(IDR)
    assert not references.follow(packet(SPARE))
    assert references.is_intact


def test_a_stream_may_begin_with_any_number():
    references = References("h264", record(parameters()))
    assert references.follow(packet(slice_of(7)))
    assert not references.follow(packet(slice_of(8, needed=False)))
    assert References("h264", record(parameters())).follow(b"")
    assert references.follow(b"")
    assert references.is_intact


SCALING = [[], [1] * 16, [-8], *[[]] * 3, [5, -13], []]  # of which two end early


@pytest.mark.parametrize(
    "options",
    [
        {"frame_num_bits": 16},
        {"order_count": 1},
        {"order_count": 2},
        {"profile": HIGH},
        {"profile": HIGH, "scaling": SCALING, "frame_num_bits": 9},
        {"profile": HIGH_444, "scaling": [*SCALING, *[[2] * 64] * 4], "frame_num_bits": 7},
    ],
)
def test_parameters_of_many_kinds(options):
    bits = options.get("frame_num_bits", 4)
    references = References("h264", record(parameters(**options)))
    for number in range(12):
        assert references.follow(packet(slice_of(number, bits=bits)))
        assert references.follow(packet(slice_of(number + 1, needed=False, bits=bits))) is False
    assert references.is_intact


@pytest.mark.parametrize(
    "extradata",
    [
        b"",
        record(),
        record()[:5],
        record(parameters(gaps=1)),
        record(parameters(frames_only=0)),
        record(parameters(), parameters(frame_num_bits=5)),
        record(parameters()[:6]),
    ],
)
def test_nothing_is_spared_where_numbers_cannot_be_followed(extradata):
    references = References("h264", extradata)
    references.follow(IDR)
    assert references.follow(packet(SPARE))
    assert not references.is_intact


def test_parameters_may_come_with_the_pictures_and_change_with_idr_pictures_only():
    references, other = References("h264", b""), parameters(frame_num_bits=9)
    for bits, unit in ((4, parameters()), (9, other), (9, other), (4, parameters())):
        assert references.follow(with_start_codes(unit, slice_of(0, kind=5, bits=bits)))
        assert not references.follow(with_start_codes(slice_of(1, needed=False, bits=bits)))
    assert references.is_intact
    references.follow(with_start_codes(other, slice_of(1, bits=9)))
    assert not references.is_intact


def test_of_other_codecs_all_is_needed():
    assert References("hevc", b"").follow(packet(SPARE))


ENCODERS = {
    "pyramid": "bframes=3:b-pyramid=normal:keyint=40:scenecut=0",
    "open gop": "bframes=3:keyint=12:open-gop=1",
    "matrices": "bframes=2:cqm=jvt:keyint=250",
    "slices": "bframes=5:slices=4:aud=1:ref=16",
}


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_streams_of_x264_are_followed_to_their_end(encoder, container):
    video = numbered_video(90, container=container, codec_options={"x264-params": ENCODERS[encoder]})
    with av.open(io.BytesIO(video)) as file:
        references = References("h264", file.streams.video[0].codec_context.extradata or b"")
        packets = [bytes(data) for data in file.demux(video=0) if data.size]
    needed = [references.follow(data) for data in packets]
    assert references.is_intact
    length_size = 4 if container == "mp4" else 0
    slices = [[unit for unit in nal_units(data, length_size) if unit[0] & 0x1F in (1, 5)] for data in packets]
    assert needed == [any(unit[0] >> 5 for unit in units) for units in slices]
    assert 20 < sum(needed) < 70
