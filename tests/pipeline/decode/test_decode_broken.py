"""Broken, hostile and foreign inputs: a reason and a sentence for each, and nothing else happens."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.decode.backend import decode_pieces, decode_windows, probe_media
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.errors import DecodeError, ShardError
from tests.clips import audio_only, numbered_image, numbered_video, read_number, real_data, stored

LIMITS = DecodeLimits()
FAST_START = {"movflags": "faststart"}


def decode(source, *windows, limits=LIMITS):
    request = DecodeRequest(source, Grid(), tuple(Window(*window) for window in windows), ClipShape(64, 64))
    return decode_windows(request, limits)


def probe_reason(source, limits=LIMITS):
    with pytest.raises(DecodeError) as error:
        probe_media(source, limits)
    assert source.key in str(error.value)
    return error.value.reason


NOT_MEDIA = {
    "empty": b"",
    "random": np.random.default_rng(0).bytes(20_000),
    "text": b"a caption, by mistake\n" * 50,
    "html": b"<!doctype html><html><body>404</body></html>",
    "header only": numbered_video(5)[:40],
    "no moov": numbered_video(30)[:1500],
    "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 20,
    "picture": numbered_image(format="png"),
}


@pytest.mark.parametrize("name", NOT_MEDIA)
def test_what_is_no_video_is_refused(name, tmp_path):
    source = stored(tmp_path, NOT_MEDIA[name], key=name)
    assert probe_reason(source) == "not_media"
    assert [outcome.reason for outcome in decode(source, (0, 1), (3, 2))] == ["not_media", "not_media"]


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{path}</BaseURL></MPD>",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 49170 RTP/AVP 96\r\n",
    ],
)
def test_a_playlist_cannot_open_another_file(playlist, tmp_path):
    other = tmp_path / "other.ts"
    other.write_bytes(numbered_video(10, container="mpegts"))
    source = stored(tmp_path, playlist.format(path=other).encode(), key="playlist")
    assert probe_reason(source) == "not_media"
    assert decode(source, (0, 1))[0].reason == "not_media"


def test_sound_alone_has_no_video_stream(tmp_path):
    assert probe_reason(stored(tmp_path, audio_only())) == "no_video_stream"


def test_a_missing_file_is_the_shards_fault(tmp_path):
    with pytest.raises(ShardError, match=r"gone\.tar"):
        decode(MediaSource(str(tmp_path / "gone.tar"), 0, 10, "video"), (0, 1))


def test_a_mp4_cut_between_packets_says_how_short_it_is(tmp_path):
    """FFmpeg reports no error there: only the header's count tells."""
    video = numbered_video(60, container_options=FAST_START)
    with av.open(io.BytesIO(video)) as container:
        cut = container.streams.video[0].index_entries[35].pos
    source = stored(tmp_path, video[:cut])
    assert probe_media(source, LIMITS).num_frames == 60
    early, late = decode(source, (2, 8), (50, 10))
    assert [read_number(frame) for frame in early.frames] == list(range(2, 10))
    assert str(late) == "short_video: clip: decoded 35 of 60 frames"
    request = DecodeRequest(source, Grid(Fraction(25)), (Window(2, 8), Window(30, 10)), ClipShape(64, 64))
    early, late = decode_windows(request, LIMITS)
    assert isinstance(early, DecodedClip)
    assert late.reason == "short_video"


@pytest.mark.parametrize("share", [0.6, 0.7, 0.9])
def test_a_truncated_mp4_keeps_its_complete_windows(share, tmp_path):
    video = numbered_video(60, container_options=FAST_START, codec_options={"qp": "10"})
    early, late = decode(stored(tmp_path, video[: int(len(video) * share)]), (2, 8), (50, 10))
    assert [read_number(frame) for frame in early.frames] == list(range(2, 10))
    assert late.reason in {"decode_error", "corrupt_frame"}


@pytest.mark.parametrize(("num_bytes", "reason"), [(1, "corrupt_frame"), (30, "decode_error")])
def test_damaged_bytes_fail_the_windows_that_need_them_only(num_bytes, reason, tmp_path):
    video = bytearray(numbered_video(60, container_options=FAST_START, codec_options={"qp": "10"}))
    start = len(video) * 3 // 4
    video[start : start + num_bytes] = bytes(255 - value for value in video[start : start + num_bytes])
    early, late, behind = decode(stored(tmp_path, bytes(video)), (0, 12), (30, 25), (50, 10))
    assert [read_number(frame) for frame in early.frames] == list(range(12))
    assert late.reason in {reason, "decode_error"}
    assert [read_number(frame) for frame in behind.frames] == list(range(50, 60))  # begins at a key frame of its own


def test_a_size_change_in_mid_stream_is_told(tmp_path):
    joined = numbered_video(20, container="mpegts", start_ms=0) + numbered_video(
        20, container="mpegts", start_ms=2000, size=(160, 96)
    )
    early, late = decode(stored(tmp_path, joined), (0, 10), (18, 10))
    assert isinstance(early, DecodedClip)
    assert late.reason == "size_change"
    assert "160x96" in str(late)


def test_too_large_is_refused_before_it_is_decoded(tmp_path):
    limits = dataclasses.replace(LIMITS, max_pixels=96 * 96 - 1)
    assert probe_reason(stored(tmp_path, numbered_video(3)), limits) == "too_large"
    assert probe_reason(stored(tmp_path, numbered_image(), kind="image"), limits) == "too_large"
    wide = stored(tmp_path, numbered_video(3, size=(400, 4)))
    request = DecodeRequest(wide, Grid(), (Window(0, 1),), ClipShape(64, 64))
    for decoder in ("pyav", "decord"):
        asked = dataclasses.replace(request, decoder=decoder)
        assert decode_windows(asked, dataclasses.replace(LIMITS, max_pixels=64 * 64))[0].reason == "too_large", decoder


def test_a_count_of_packets_has_a_limit(tmp_path):
    source = stored(tmp_path, numbered_video(20, container="matroska"))
    assert probe_reason(source, dataclasses.replace(LIMITS, max_frames=19)) == "too_large"


@pytest.mark.parametrize("data", [b"", b"no picture", numbered_video(3)])
def test_what_is_no_image_is_refused(data, tmp_path):
    assert probe_reason(stored(tmp_path, data, kind="image")) == "not_media"


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heix"])
def test_heic_is_refused_with_what_to_do(brands, tmp_path):
    data = (len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands + bytes(100)
    source = stored(tmp_path, data, kind="image")
    assert probe_reason(source) == "unsupported_heic"
    assert "convert it" in str(decode(source, (0, 1))[0])
    avif = stored(tmp_path, numbered_image(format="avif"), kind="image")
    assert isinstance(decode(avif, (0, 1))[0], DecodedClip)


def test_an_animated_webp_is_a_video_and_a_still_one_is_none(tmp_path):
    moving = numbered_video(12, codec="libwebp_anim", container="webp", pixel_format="bgra")
    source = stored(tmp_path, moving)
    assert probe_media(source, LIMITS).num_frames == 12
    early, late, beyond = decode(source, (2, 3), (11, 1), (11, 2))
    assert [read_number(frame) for frame in (*early.frames, *late.frames)] == [2, 3, 4, 11]
    assert beyond.reason == "past_end"
    whole = DecodeRequest(source, Grid(), (Window(1, 7),), ClipShape(64, 64))
    pieces = [read_number(frame) for piece in decode_pieces(whole, LIMITS, 3) for frame in piece.frames]
    assert pieces == [1, 2, 3, 4, 5, 6, 7]
    assert probe_reason(source, dataclasses.replace(LIMITS, max_frames=11)) == "too_large"
    assert probe_reason(stored(tmp_path, numbered_image(format="webp"))) == "not_media"
    assert probe_reason(stored(tmp_path, moving[: len(moving) // 2])) in {"decode_error", "not_media"}


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_a_truncated_image_is_a_decode_error(codec, tmp_path):
    data = numbered_image(format=codec, size=(300, 300))
    (outcome,) = decode(stored(tmp_path, data[: len(data) // 2], kind="image"), (0, 1))
    assert outcome.reason in {"decode_error", "not_media"}
    assert "0x" not in str(outcome)


def test_a_decompression_bomb_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "png")
    assert len(buffer.getvalue()) < 100_000
    assert probe_reason(stored(tmp_path, buffer.getvalue(), kind="image")) == "too_large"


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "gif"])
def test_no_damage_gets_past_the_outcomes(container, tmp_path):
    """Random damage: every window is an outcome, and the messages repeat."""
    codec = {"gif": "gif"}.get(container, "libx264")
    video = numbered_video(
        12, codec=codec, container=container, size=(32, 32), pixel_format="rgb8" if codec == "gif" else "yuv420p"
    )
    rng = np.random.default_rng(1)
    for _ in range(25):
        broken = bytearray(video[: rng.integers(1, len(video) + 1)])
        for position in rng.integers(0, len(broken), rng.integers(0, 12)):
            broken[position] = rng.integers(256)
        source = stored(tmp_path, bytes(broken))
        first, again = (decode(source, (0, 2), (4, 8)) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert isinstance(a, (DecodedClip, DecodeError))
            if isinstance(a, DecodeError):
                assert str(a) == str(b)
            else:
                assert np.array_equal(a.frames, b.frames)


@pytest.mark.skipif(real_data() is None, reason="no real clips on this machine")
def test_every_real_clip_decodes_and_the_corrupt_one_says_so():
    clips = sorted((real_data() / "clips").glob("*.m*"))
    assert len(clips) == 11
    for path in clips:
        source = MediaSource(str(path), 0, path.stat().st_size, "video", path.name)
        info = probe_media(source, LIMITS)
        first, last = decode(source, (0, 3), (info.num_frames - 2, 2))
        assert isinstance(first, DecodedClip), first
        if path.name == "corrupted.mp4":
            assert str(last) == "decode_error: corrupted.mp4: Invalid data found when processing input"
        else:
            assert isinstance(last, DecodedClip), last
