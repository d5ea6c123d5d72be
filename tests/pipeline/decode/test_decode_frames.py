"""Which frame comes out for which grid position, over containers and codecs."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.decode.backend import decode_windows, probe_media
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, Window
from pipeline.errors import DecodeError
from tests.clips import numbered_video, read_number, stored, trimmed_video

LIMITS = DecodeLimits()
SHAPE = ClipShape(64, 64)

KINDS = {
    "h264 mp4": {},
    "h264 mkv": {"container": "matroska"},
    "h264 open gop": {"codec_options": {"x264-params": "open-gop=1:bframes=3"}},
    "h264 fragmented": {"container_options": {"movflags": "frag_keyframe"}},
    "h264 mpegts": {"container": "mpegts"},
    "h264 flv": {"container": "flv"},
    "h264 start": {"start_ms": 5000},
    "h264 mpegts start": {"container": "mpegts", "start_ms": 5000},
    "h264 odd": {"size": (131, 97), "pixel_format": "yuv444p"},
    "h264 avi": {"container": "avi"},
    "mpeg2 mpegts": {"codec": "mpeg2video", "container": "mpegts"},
    "mpeg4 avi": {"codec": "mpeg4", "container": "avi"},
    "hevc mp4": {"codec": "libx265"},
    "hevc 10 bit": {"codec": "libx265", "pixel_format": "yuv420p10le"},
    "vp8 webm": {"codec": "libvpx", "container": "webm"},
    "vp9 webm": {"codec": "libvpx-vp9", "container": "webm"},
    "av1 mkv": {"codec": "libsvtav1", "container": "matroska"},
    "gif": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
}


def video_of(kind, num_frames=30):
    return numbered_video(num_frames, **KINDS[kind])


def decode(source, *windows, grid=Grid(), shape=SHAPE, decoder="auto"):  # noqa: B008 (frozen)
    request = DecodeRequest(source, grid, tuple(Window(*window) for window in windows), shape, decoder)
    return decode_windows(request, LIMITS)


def numbers(clip):
    assert isinstance(clip, DecodedClip), clip
    return [read_number(frame) for frame in clip.frames]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_exactly_their_frames(kind, tmp_path):
    source = stored(tmp_path, video_of(kind))
    late, first, overlapping, last, beyond = decode(source, (20, 7), (0, 5), (3, 9), (29, 1), (28, 3))
    assert numbers(late) == list(range(20, 27))
    assert numbers(first) == list(range(5))
    assert numbers(overlapping) == list(range(3, 12))
    assert numbers(last) == [29]
    np.testing.assert_allclose(late.pts_seconds, np.arange(20, 27) / 25, atol=0.0011)
    assert isinstance(beyond, DecodeError)
    assert beyond.reason == "past_end"


@pytest.mark.parametrize("kind", KINDS)
def test_probe_counts_frames_and_seconds(kind, tmp_path):
    info = probe_media(stored(tmp_path, video_of(kind)), LIMITS)
    assert info.num_frames == 30
    assert info.duration_seconds == pytest.approx(1.2, abs=0.005)
    assert info.fps == pytest.approx(25)
    assert info.codec in {"h264", "mpeg2video", "mpeg4", "hevc", "vp8", "vp9", "av1", "gif"}
    assert (info.kind, info.num_video_streams, info.rotation_degrees) == ("video", 1, 0)


def test_a_frame_step_skips_frames(tmp_path):
    source = stored(tmp_path, numbered_video(30))
    (clip,) = decode(source, (1, 4), grid=Grid(frame_step=7))
    assert numbers(clip) == [7, 14, 21, 28]
    (beyond,) = decode(source, (1, 5), grid=Grid(frame_step=7))
    assert beyond.reason == "past_end"


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(Fraction(25, 2), [0, 2, 4, 6]), (Fraction(50), [0, 0, 1, 1]), (Fraction(30000, 1001), [0, 0, 1, 2])],
)
def test_fps_grids_sample_up_and_down(fps, expected, tmp_path):
    (clip,) = decode(stored(tmp_path, numbered_video(30)), (0, 4), grid=Grid(fps))
    assert numbers(clip) == expected


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_every_position_of_an_fps_grid_is_there_and_no_more(container, tmp_path):
    source = stored(tmp_path, numbered_video(30, container=container))
    grid, info = Grid(Fraction(60)), probe_media(source, LIMITS)
    length = grid.length(info.num_frames, info.duration_seconds)
    whole, tail, beyond = decode(source, (0, length), (length - 1, 1), (length - 1, 2), grid=grid)
    assert length == 72
    assert numbers(whole) == [k * 25 // 60 for k in range(72)]
    assert numbers(tail) == [29]
    assert beyond.reason == "past_end"


def test_rounded_timestamps_do_not_shift_a_grid_of_the_same_rate(tmp_path):
    source = stored(tmp_path, numbered_video(30, container="matroska", fps=30))  # 0, 33, 67, 100 ms ...
    (clip,) = decode(source, (0, 30), grid=Grid(Fraction(30)))
    assert numbers(clip) == list(range(30))


def test_a_fragmented_mp4_is_counted_to_its_end(tmp_path):
    """With a segment index, as in DASH, FFmpeg knows the fragments that were read so far only."""
    source = stored(tmp_path, numbered_video(400, container_options={"movflags": "frag_keyframe+dash+global_sidx"}))
    info = probe_media(source, LIMITS)
    assert (info.num_frames, info.duration_seconds) == (400, pytest.approx(16.0))
    assert numbers(decode(source, (397, 3))[0]) == [397, 398, 399]


def naive_fps_grid(video, fps, length):
    """Decode everything, then search: the last frame whose pts is not later than k / fps."""
    with av.open(io.BytesIO(video)) as container:
        frames = [
            (frame.pts * frame.time_base, read_number(frame.to_ndarray(format="rgb24")))
            for frame in container.decode(video=0)
        ]
        half_tick = container.streams.video[0].time_base / 2
    start = frames[0][0]
    return [max(n for n, (pts, _) in enumerate(frames) if pts - start - half_tick <= k / fps) for k in range(length)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.integers(5, 200), min_size=4, max_size=12),
    fps=st.fractions(2, 90, max_denominator=1001),
    container=st.sampled_from(["mp4", "matroska", "mpegts"]),
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_fps_grids_agree_with_a_search_over_variable_frame_rates(gaps, fps, container, starts, tmp_path):
    pts = [sum(gaps[:i]) for i in range(len(gaps))]
    video = numbered_video(len(pts), pts_ms=pts, container=container)
    length = max(2, int(pts[-1] * fps / 1000))  # up to the last frame's time, which every container agrees on
    windows = [(start % (length - 1), 1 + start % 3) for start in starts]
    windows = [(start, min(count, length - 1 - start)) for start, count in windows]
    expected = naive_fps_grid(video, fps, length)
    for (start, count), clip in zip(windows, decode(stored(tmp_path, video), *windows, grid=Grid(fps)), strict=True):
        if isinstance(clip, DecodedClip):
            assert numbers(clip) == expected[start : start + count]
        else:  # the header of a short mp4 may promise less time than its frames take
            assert clip.reason == "past_end"
            info = probe_media(stored(tmp_path, video), LIMITS)
            assert start + count > Grid(fps).length(info.num_frames, info.duration_seconds)


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    source = stored(tmp_path, trimmed_video(numbered_video(40), skip=15))
    info = probe_media(source, LIMITS)
    assert (info.num_frames, info.duration_seconds) == (25, 1.0)
    (clip,) = decode(source, (0, 25))
    assert numbers(clip) == list(range(15, 40))
    assert clip.pts_seconds[0] == 0


def test_hidden_vp8_frames_do_not_count(tmp_path):
    video = numbered_video(20, codec="libvpx", container="webm")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format="webm") as output:
        copy = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size == 0:
                continue
            data = bytearray(bytes(packet))
            if number == 19:
                data[0] &= ~0x10
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, copy
            output.mux(changed)
    source = stored(tmp_path, buffer.getvalue())
    assert probe_media(source, LIMITS).num_frames == 19
    assert numbers(decode(source, (0, 19))[0]) == list(range(19))


def test_the_best_video_stream_is_taken_and_cover_pictures_are_not(tmp_path):
    video, cover = numbered_video(12), io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(cover, "w", format="mp4") as output:
        picture = output.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 320, 240, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        copy = output.add_stream_from_template(source.streams.video[0])
        frame = av.VideoFrame(320, 240, "yuvj420p")
        frame.pts = 0
        output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                output.mux(packet)
    source = stored(tmp_path, cover.getvalue())
    assert numbers(decode(source, (0, 12))[0]) == list(range(12))
    assert probe_media(source, LIMITS).num_video_streams == 1


def test_decoding_stops_after_the_last_wanted_frame(tmp_path, monkeypatch):
    taken = []
    from pipeline.decode import pyav

    checked = pyav._checked
    monkeypatch.setattr(pyav, "_checked", lambda *video: (taken.append(1) or frame for frame in checked(*video)))
    source = stored(tmp_path, numbered_video(40))
    assert numbers(decode(source, (4, 6))[0]) == list(range(4, 10))
    assert len(taken) == 10


def test_no_windows_cost_nothing(tmp_path):
    assert decode(stored(tmp_path, b"not opened")) == ()


@pytest.mark.parametrize(
    "kind",
    [
        "h264 mp4",
        "h264 mkv",
        "h264 open gop",
        "h264 fragmented",
        "h264 start",
        "mpeg4 avi",
        "vp8 webm",
        "vp9 webm",
        "h264 odd",
        "hevc mp4",
        "h264 mpegts",
        "gif",
    ],
)
def test_decord_agrees_with_pyav_or_declines(kind, tmp_path):
    source = stored(tmp_path, video_of(kind))
    windows = [(20, 7), (3, 9)]
    for grid in (Grid(), Grid(Fraction(20))):
        windows = [(13, 6), (3, 9)]
        ours, theirs = (decode(source, *windows, grid=grid, decoder=name) for name in ("pyav", "decord"))
        for a, b in zip(ours, theirs, strict=True):
            if kind in {"mpeg4 avi", "hevc mp4", "h264 mpegts", "gif"}:
                assert b.reason == "unsupported_by_decord"
                continue
            assert numbers(a) == numbers(b)
            # decord converts to RGB before it is scaled, PyAV while it is.
            assert np.abs(a.frames.astype(int) - b.frames).mean() < 2
            np.testing.assert_allclose(a.pts_seconds, b.pts_seconds, atol=1e-6)
            assert (a.decoder, b.decoder) == ("pyav", "decord")


def test_decord_declines_edit_lists(tmp_path):
    source = stored(tmp_path, trimmed_video(numbered_video(40), skip=15))
    assert decode(source, (0, 5), decoder="decord")[0].reason == "unsupported_by_decord"


def test_probing_an_mp4_reads_its_header_and_one_packet(tmp_path):
    video = bytearray(numbered_video(20))
    with av.open(io.BytesIO(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    whole = probe_media(stored(tmp_path, bytes(video)), LIMITS)
    for offset, size in packets[1:]:
        video[offset : offset + size] = bytes(size)
    assert probe_media(stored(tmp_path, bytes(video)), LIMITS) == whole
