"""Jumping to windows gives bit for bit what decoding everything gives, and decodes little more than the windows."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.decode import proof, seek_pyav
from pipeline.decode.backend import decode_windows, decode_with
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pyav import PyAVBackend
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, Window
from pipeline.decode.seek import KeyFrame, KeyFrames, Target, is_clean_start, targets
from pipeline.errors import DecodeError
from tests.clips import numbered_video, read_number, stored, trimmed_video
from tests.conformance_broken import patched

LIMITS = DecodeLimits()
SHAPE = ClipShape(48, 48)
NUM_FRAMES = 200
OPEN_X264 = {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"}
LONG_GOP = {"x264-params": "bframes=3:b-pyramid=normal:keyint=250:scenecut=0:b-adapt=0"}
OPEN_X265 = {"x265-params": "open-gop=1:bframes=4:keyint=12:min-keyint=12:scenecut=0"}
CLOSED_X265 = {"x265-params": "open-gop=0:keyint=12:min-keyint=12"}
SQUEEZED = {"pixel_aspect": Fraction(4, 3)}
UNEVEN_MS = [sum(20 + (k * 37) % 60 for k in range(i)) for i in range(NUM_FRAMES)]


def trimmed(skip, **options):
    return trimmed_video(numbered_video(NUM_FRAMES + skip, **options), skip=skip)


# kind: (how to make it, whether frames may be left out)
KINDS = {
    "h264 mp4": (lambda: numbered_video(NUM_FRAMES), True),
    "h264 mov": (lambda: numbered_video(NUM_FRAMES, container="mov"), True),
    "h264 pyramid": (lambda: numbered_video(NUM_FRAMES, codec_options={"bf": "7", "b-pyramid": "normal"}), True),
    "h264 long gop": (lambda: numbered_video(NUM_FRAMES, codec_options=LONG_GOP), False),
    "h264 long gop mpegts": (lambda: numbered_video(NUM_FRAMES, container="mpegts", codec_options=LONG_GOP), False),
    "h264 long gop vfr": (lambda: numbered_video(NUM_FRAMES, pts_ms=UNEVEN_MS, codec_options=LONG_GOP), False),
    "h264 open gop": (lambda: numbered_video(NUM_FRAMES, codec_options=OPEN_X264), True),
    "h264 intra refresh": (lambda: numbered_video(NUM_FRAMES, codec_options={"intra-refresh": "1"}), False),
    "h264 vfr": (lambda: numbered_video(NUM_FRAMES, pts_ms=UNEVEN_MS), True),
    "h264 start": (lambda: numbered_video(NUM_FRAMES, start_ms=5000), True),
    "h264 edit list": (lambda: trimmed(15), True),
    "h264 open gop edit list": (lambda: trimmed(15, codec_options=OPEN_X264), True),
    "h264 aspect in the stream": (lambda: numbered_video(NUM_FRAMES, **SQUEEZED).replace(b"pasp", b"free"), True),
    "h264 turned": (lambda: numbered_video(NUM_FRAMES, size=(128, 96), rotation_degrees=90), True),
    "h264 false size": (lambda: patched(numbered_video(NUM_FRAMES), b"avc1", 24, b"\x00\x40\x00\x40"), True),
    "h264 fragmented": (lambda: numbered_video(NUM_FRAMES, container_options={"movflags": "frag_keyframe"}), True),
    "h264 mkv": (lambda: numbered_video(NUM_FRAMES, container="matroska"), True),
    "h264 open gop mkv": (lambda: numbered_video(NUM_FRAMES, container="matroska", codec_options=OPEN_X264), True),
    "h264 flv": (lambda: numbered_video(NUM_FRAMES, container="flv"), True),
    "h264 mpegts": (lambda: numbered_video(NUM_FRAMES, container="mpegts", start_ms=900), True),
    "h264 avi": (lambda: numbered_video(NUM_FRAMES, container="avi"), False),
    "hevc mp4": (lambda: numbered_video(NUM_FRAMES, codec="libx265", codec_options=CLOSED_X265), True),
    "hevc open gop": (lambda: numbered_video(NUM_FRAMES, codec="libx265", codec_options=OPEN_X265), True),
    "hevc open gop mkv": (
        lambda: numbered_video(NUM_FRAMES, codec="libx265", codec_options=OPEN_X265, container="matroska"),
        True,
    ),
    "vp8 webm": (lambda: numbered_video(NUM_FRAMES, codec="libvpx", container="webm"), True),
    "vp9 webm": (lambda: numbered_video(NUM_FRAMES, codec="libvpx-vp9", container="webm"), True),
    "vp9 mp4": (lambda: numbered_video(NUM_FRAMES, codec="libvpx-vp9"), True),
    "av1 mp4": (lambda: numbered_video(NUM_FRAMES, codec="libsvtav1"), True),
    "mpeg4 mp4": (lambda: numbered_video(NUM_FRAMES, codec="mpeg4", codec_options={"bf": "2"}), True),
    "mpeg2 mpegts": (lambda: numbered_video(NUM_FRAMES, codec="mpeg2video", container="mpegts"), True),
    "gif": (lambda: numbered_video(NUM_FRAMES, codec="gif", container="gif", pixel_format="rgb8"), False),
}


class Sequential:
    """PyAV without its jumps: what it knows is right."""

    name = "pyav"

    def __init__(self):
        self.probe, self.frames = PyAVBackend().probe, PyAVBackend().frames


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    make, leaves_out = KINDS[request.param]
    return request.param, stored(tmp_path_factory.mktemp("seek"), make()), leaves_out


def request_of(source, *windows, grid=Grid()):  # noqa: B008 (frozen)
    return DecodeRequest(source, grid, tuple(Window(*window) for window in windows), SHAPE, "pyav")


def assert_same(ours, plain):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert type(a) is type(b), (a, b)
        if isinstance(a, DecodedClip):
            assert np.array_equal(a.frames, b.frames)
            assert np.array_equal(a.pts_seconds, b.pts_seconds)
        else:
            assert str(a) == str(b)


@pytest.fixture
def decoded(monkeypatch):
    """How many frames came out of a decoder that jumps."""
    count = []
    proven = seek_pyav.proven_frames

    def counted(*arguments):
        for index, frame in proven(*arguments):
            count.append(frame.pts)
            yield index, frame

    monkeypatch.setattr(seek_pyav, "proven_frames", counted)
    return count


GRIDS = {
    "frames": (Grid(), 1),
    "every 3rd": (Grid(frame_step=3), 1 / 3),
    "24 fps": (Grid(Fraction(24)), 24 / 25),
    "60 fps": (Grid(Fraction(60)), 60 / 25),
    "1 fps": (Grid(Fraction(1)), 1 / 25),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_jumping_changes_no_bit(grid, kind):
    _, source, _ = kind
    grid, scale = GRIDS[grid]
    rng = np.random.default_rng(7)
    requests = [[(190, 9), (0, 2), (61, 3), (70, 4), (66, 1)], [(199, 1), (150, 1)], [(130, 9), (196, 9)]]
    requests += [[(int(start), 1 + int(start) % 4)] for start in rng.integers(1, NUM_FRAMES, 6)]
    for windows in requests:
        scaled = [(int(start * scale), max(1, int(count * scale))) for start, count in windows]
        request = request_of(source, *scaled, grid=grid)
        assert_same(decode_windows(request, LIMITS), decode_with(Sequential(), request, LIMITS))


def test_little_more_than_the_windows_is_decoded(kind, decoded):
    name, source, leaves_out = kind
    (late, later) = decode_windows(request_of(source, (192, 5), (100, 2)), LIMITS)
    offset = 15 if "edit list" in name else 0
    assert [read_number(frame) - offset for frame in late.frames] == list(range(192, 197))
    assert [read_number(frame) - offset for frame in later.frames] == [100, 101]
    if leaves_out:
        assert 7 <= len(decoded) < 60  # and never from the start again, which this would not count
    else:
        assert len(decoded) in (0, 1) or len(decoded) > 60


@pytest.mark.parametrize("container", ["mp4", "mpegts", "flv", "matroska"])
def test_half_of_the_frames_on_the_way_to_a_window_are_left_out(container, tmp_path, decoded):
    source = stored(tmp_path, numbered_video(NUM_FRAMES, container=container, codec_options=LONG_GOP))
    for request, num_windows in ((request_of(source, (161, 4)), 1), (request_of(source, (160, 3), (80, 3)), 2)):
        decoded.clear()
        assert_same(decode_windows(request, LIMITS), decode_with(Sequential(), request, LIMITS))
        if container == "matroska":  # which does not tell when packets are decoded
            assert len(decoded) >= 160
        else:
            assert 80 <= len(decoded) < 90 + 4 * num_windows


def test_nothing_is_left_out_before_a_decoder_has_begun(tmp_path, monkeypatch):
    """Until its first frame after a jump its complaints do not count, so each frame that is heard then matters."""
    left_out = []
    leave_out = proof._Due.leave_out
    monkeypatch.setattr(proof._Due, "leave_out", lambda due, pts: (left_out.append(pts), leave_out(due, pts)))
    # I P b, where two frames are to be held back: the third packet brings out the first frame.
    video = numbered_video(NUM_FRAMES, codec_options={"x264-params": "bframes=3:b-pyramid=normal:b-adapt=0:keyint=3"})
    (clip,) = decode_windows(request_of(stored(tmp_path, video), (140, 1)), LIMITS)
    assert [read_number(frame) for frame in clip.frames] == [140]
    assert left_out == []


def test_damage_where_nothing_is_decoded_fails_the_windows_that_show_it_and_no_other(tmp_path):
    video = bytearray(numbered_video(NUM_FRAMES, codec_options=LONG_GOP | {"qp": "10"}))
    with av.open(io.BytesIO(bytes(video))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][99]
        shown_at = round(packet.pts * packet.time_base * 25)
        entry = container.streams.video[0].index_entries[99]
        assert video[entry.pos + 4] == 1  # a slice that no other refers to
        video[entry.pos + 12 : entry.pos + entry.size] = bytes(entry.size - 12)
    source = stored(tmp_path, bytes(video))
    for windows in ([(shown_at + 20, 4)], [(shown_at + 20, 4), (shown_at - 2, 4), (20, 3)]):
        after, *others = decode_windows(request_of(source, *windows), LIMITS)
        assert [read_number(frame) for frame in after.frames] == list(range(shown_at + 20, shown_at + 24))
        assert [isinstance(outcome, DecodedClip) for outcome in others] in ([], [False, True])


class AllNeeded:
    """PyAV with its jumps, and nothing left out on the way."""

    name = "pyav"

    def __init__(self):
        self.probe, self.frames = PyAVBackend().probe, PyAVBackend().frames

    def wanted_frames(self, *arguments):
        return PyAVBackend()._proven_frames(*arguments, leaves_out=False)


def test_a_lost_picture_does_not_lead_back_to_the_start(tmp_path, monkeypatch):
    video = numbered_video(NUM_FRAMES, codec_options={"x264-params": "bframes=3:keyint=50:scenecut=0:b-adapt=0"})
    with av.open(io.BytesIO(video)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    lost = next(place for place, packet in enumerate(packets) if place >= 165 and packet[4] >> 5 == 2)
    source = stored(tmp_path, trimmed_video(video, without=lost))
    requests = [request_of(source, *windows) for windows in ([(190, 3)], [(190, 3), (20, 2)], [(185, 2), (140, 2)])]
    expected = [decode_with(AllNeeded(), request, LIMITS) for request in requests]

    def from_the_start(*_):
        raise AssertionError
        yield

    monkeypatch.setattr(PyAVBackend, "frames", from_the_start)
    for request, outcomes in zip(requests, expected, strict=True):
        assert_same(decode_windows(request, LIMITS), outcomes)


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_a_lost_picture_is_noticed_where_those_predicted_from_it_are_left_out(container, tmp_path):
    video = numbered_video(60, codec_options=LONG_GOP)
    with av.open(io.BytesIO(video)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    lost = next(place for place, packet in enumerate(packets) if place >= 12 and packet[4] >> 5 == 2)
    source = stored(tmp_path, trimmed_video(video, without=lost, container=container))
    for windows in ([(20, 3)], [(40, 3)], [(50, 3), (30, 1)]):
        request = request_of(source, *windows)
        outcomes = decode_windows(request, LIMITS)
        assert_same(outcomes, decode_with(Sequential(), request, LIMITS))
        assert all(isinstance(outcome, DecodeError) for outcome in outcomes)


def test_a_late_window_of_an_mp4_decodes_nothing_before_its_key_frame(tmp_path, decoded):
    (late,) = decode_windows(request_of(stored(tmp_path, numbered_video(NUM_FRAMES)), (192, 5)), LIMITS)
    assert [read_number(frame) for frame in late.frames] == list(range(192, 197))
    assert decoded[0] > 0
    assert len(decoded) < 12 + 5


def test_damage_fails_the_windows_that_need_it_and_no_other(tmp_path):
    video = bytearray(numbered_video(NUM_FRAMES, codec_options={"qp": "10"}))
    with av.open(io.BytesIO(bytes(video))) as container:
        entry = container.streams.video[0].index_entries[102]
        video[entry.pos + 8 : entry.pos + entry.size] = bytes(entry.size - 8)
    source = stored(tmp_path, bytes(video))
    outcomes = decode_windows(request_of(source, (150, 4), (98, 8), (20, 4), (101, 2), (104, 3)), LIMITS)
    assert [outcome.reason if isinstance(outcome, DecodeError) else "" for outcome in outcomes[::2]] == ["", "", ""]
    assert all(isinstance(outcome, DecodeError) for outcome in outcomes[1::2])
    assert [read_number(frame) for frame in outcomes[0].frames] == [150, 151, 152, 153]
    for window, outcome in zip(((98, 8), (150, 4)), (outcomes[1], outcomes[0]), strict=True):
        (alone,) = decode_windows(request_of(source, window), LIMITS)
        assert str(alone) == str(outcome) if isinstance(alone, DecodeError) else isinstance(outcome, DecodedClip)


def test_a_packet_that_gives_no_frame_is_damage(tmp_path):
    """Else every later frame would be taken for the one before it."""
    video = bytearray(numbered_video(40))
    with av.open(io.BytesIO(bytes(video))) as container:
        entry = container.streams.video[0].index_entries[9]
        video[entry.pos + 4] = 0x0C  # a NAL unit of filler data
    early, late = decode_windows(request_of(stored(tmp_path, bytes(video)), (0, 3), (10, 5)), LIMITS)
    assert isinstance(early, DecodedClip)
    assert late.reason in {"lost_frame", "decode_error", "corrupt_frame"}


def test_a_frame_that_is_not_the_expected_one_leads_back_to_the_start(tmp_path, monkeypatch):
    source, broken_from = stored(tmp_path, numbered_video(NUM_FRAMES)), []
    proven = seek_pyav.proven_frames

    def failing(video, packets, start_pts, *rest):
        for number, (index, frame) in enumerate(proven(video, packets, start_pts, *rest)):
            if start_pts is not None and number == 2:
                broken_from.append(frame.pts)
                raise seek_pyav.NotExactError
            yield index, frame

    monkeypatch.setattr(seek_pyav, "proven_frames", failing)
    for grid in (Grid(), Grid(Fraction(30))):
        request = request_of(source, (160, 8), (80, 9), grid=grid)
        assert_same(decode_windows(request, LIMITS), decode_with(Sequential(), request, LIMITS))
    assert len(broken_from) == 2


IDR, NON_IDR, RECOVERY, RECOVERY_LATE = b"\x65\x88", b"\x41\x9a", b"\x06\x06\x01\xc4\x80", b"\x06\x06\x01\x24\x80"


@pytest.mark.parametrize(
    ("codec", "units", "clean"),
    [
        ("h264", [b"\x06\x05\x01\x00\x80", IDR], True),
        ("h264", [RECOVERY, NON_IDR], True),
        ("h264", [b"\x06\x05\x02\xaa\xbb\x06\x01\xc4\x80", NON_IDR], True),
        ("h264", [RECOVERY_LATE, NON_IDR], False),
        ("h264", [NON_IDR], False),
        ("hevc", [b"\x2a\x01\xac"], True),
        ("hevc", [b"\x02\x01\xd0"], False),
        ("theora", [b"\x00"], False),
        ("vp9", [b"\x82"], True),
    ],
)
def test_clean_starts_are_told_by_their_nal_units(codec, units, clean):
    assert is_clean_start(codec, b"".join(len(unit).to_bytes(4, "big") + unit for unit in units), 4) is clean
    assert is_clean_start(codec, b"".join(b"\x00\x00\x00\x01" + unit for unit in units), 0) is clean
    assert not is_clean_start("h264", b"\x00\x00\x00", 4)


def test_targets_and_the_key_frames_before_them():
    assert list(targets(Grid(frame_step=3), [range(2), range(5, 6)])) == [Target(k, None) for k in (0, 3, 15)]
    assert [target.seconds for target in targets(Grid(Fraction(2)), [range(3)])] == [0, Fraction(1, 2), 1]
    keys = [KeyFrame(100, 0), KeyFrame(300, 10), KeyFrame(500, 20)]
    assert list(KeyFrames(keys).up_to(Target(15, None), 100, Fraction(1, 100))) == keys[1::-1]
    assert list(KeyFrames(keys).up_to(Target(None, Fraction(4)), 100, Fraction(1, 100))) == keys[::-1]
    assert list(KeyFrames(keys).up_to(Target(None, Fraction(3)), 100, Fraction(1, 100))) == keys[1::-1]
