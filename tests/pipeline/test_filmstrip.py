from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.filmstrip import (
    GAP_PIXELS,
    LABEL_PIXELS,
    TITLE_PIXELS,
    amplified_error,
    draw_strip,
    film_strip,
    safe_stem,
    write_comparison,
)

KEYS = st.text(st.characters(exclude_categories=[]), max_size=120)


def grey_clip(num_frames: int, height: int, width: int, step: int = 1) -> np.ndarray:
    """Frame t is grey 60 + step * t all over."""
    levels = 60 + step * np.arange(num_frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def panel(strip: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    top, left = TITLE_PIXELS + row * (height + GAP_PIXELS), LABEL_PIXELS + column * (width + GAP_PIXELS)
    return strip[top : top + height, left : left + width]


def test_error_is_four_times_the_difference_both_ways_and_clipped() -> None:
    source, reconstruction = np.uint8([10, 10, 0, 255, 100]), np.uint8([13, 7, 255, 0, 164])
    assert amplified_error(source, reconstruction).tolist() == [12, 12, 255, 255, 255]


def test_video_shows_source_reconstruction_and_error_side_by_side(tmp_path: Path) -> None:
    source = grey_clip(7, 33, 41, step=10)
    video, strip = write_comparison(tmp_path / "deep" / "a.b", source, source + 20, Fraction(25), "a.b", "")
    assert (video, strip) == (tmp_path / "deep" / "a.b.mp4", tmp_path / "deep" / "a.b.png")
    assert strip.is_file()
    with av.open(video) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (124, 34)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 25
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 7
    for index, frame in enumerate(frames):
        shown = [frame[4:28, left : left + 30].mean() for left in (5, 46, 87)]
        assert shown == pytest.approx([60 + 10 * index, 80 + 10 * index, 80], abs=3)


def test_a_still_needs_no_fps_and_a_video_does(tmp_path: Path) -> None:
    still = grey_clip(1, 16, 16)
    video, _ = write_comparison(tmp_path / "still", still, still, 0, "still", "")
    with av.open(video) as container:
        assert len(list(container.decode(video=0))) == 1
    with pytest.raises(ValueError, match="positive fps, got 0"):
        write_comparison(tmp_path / "moving", grey_clip(2, 16, 16), grey_clip(2, 16, 16), 0, "moving", "")


def test_strip_has_three_rows_of_evenly_picked_frames_enlarged_by_a_whole_factor() -> None:
    height, width = 40 * 3, 64 * 3  # 192 // 64
    source = grey_clip(15, 40, 64, step=2)
    source[:, 0, 0] = 255
    strip = np.asarray(film_strip(source, source + np.uint8(9), "key", "PSNR 30 dB"))
    assert strip.shape == (TITLE_PIXELS + 3 * (height + GAP_PIXELS), LABEL_PIXELS + 8 * (width + GAP_PIXELS), 3)
    for column, frame in enumerate((0, 2, 4, 6, 8, 10, 12, 14)):
        for row, level in enumerate((60 + 2 * frame, 69 + 2 * frame, 36)):
            assert (panel(strip, row, column, height, width)[3:, 3:] == level).all()
        assert (panel(strip, 0, column, height, width)[:3, :3] == 255).all()
    gaps = strip[TITLE_PIXELS:, LABEL_PIXELS + width : LABEL_PIXELS + width + GAP_PIXELS]
    assert (gaps == strip[-1, -1]).all()


def test_strip_of_a_short_clip_has_a_column_per_frame_and_room_for_its_title() -> None:
    clip = grey_clip(3, 192, 192)
    bare = film_strip(clip, clip, "", "")
    assert bare.width == LABEL_PIXELS + 3 * (192 + GAP_PIXELS)
    titled = film_strip(clip, clip, "long/" * 30, "")
    assert titled.width > bare.width
    bright_columns = np.nonzero((np.asarray(titled)[:24] > 200).any(axis=(0, 2)))[0]
    assert bright_columns.max() < titled.width - 4
    assert film_strip(clip, clip, "long/" * 3000, "").width < 2 * titled.width


def test_strip_labels_rows_and_frames() -> None:
    black = np.zeros((2, 96, 96, 3), np.uint8)
    strip = np.asarray(film_strip(black, black, "key", "quality"))
    for row in range(3):
        top = TITLE_PIXELS + row * (192 + GAP_PIXELS)
        assert (strip[top : top + 192, :LABEL_PIXELS] > 200).any(), f"row {row} has no label"
    for column in range(2):
        left = LABEL_PIXELS + column * (192 + GAP_PIXELS)
        assert (strip[TITLE_PIXELS - 18 : TITLE_PIXELS, left : left + 192] > 120).any(), f"column {column}"
    assert (strip[:24] > 200).any()
    assert (strip[24:46] > 200).any()


def test_large_panels_are_reduced_by_averaging() -> None:
    clip = grey_clip(1, 600, 1000)
    clip[:, ::3] = 90
    strip = np.asarray(film_strip(clip, clip, "", ""))
    shown = panel(strip, 0, 0, 200, 334)  # 1000 / 3, rounded up
    assert strip.shape[:2] == (TITLE_PIXELS + 3 * (200 + GAP_PIXELS), LABEL_PIXELS + 334 + GAP_PIXELS)
    assert (shown == 70).all()


def test_titles_may_hold_any_character(tmp_path: Path) -> None:
    clip = grey_clip(1, 16, 16)
    _, strip = write_comparison(tmp_path / "any", clip, clip, 1, "a\nb\x00\ud800 日本", "\t")
    with Image.open(strip) as image:
        assert image.height == TITLE_PIXELS + 3 * (192 + GAP_PIXELS)


@pytest.mark.parametrize(
    ("source", "reconstruction", "message"),
    [
        (grey_clip(2, 8, 8), grey_clip(3, 8, 8), r"\(2, 8, 8, 3\) and \(3, 8, 8, 3\)"),
        (grey_clip(2, 8, 8)[..., :1], grey_clip(2, 8, 8)[..., :1], "one shape"),
        (grey_clip(2, 8, 8), grey_clip(2, 8, 8).astype(np.float32), "uint8 and float32"),
        (grey_clip(0, 8, 8), grey_clip(0, 8, 8), "one shape"),
    ],
)
def test_clips_that_do_not_match_are_refused(
    tmp_path: Path, source: np.ndarray, reconstruction: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path / "x", source, reconstruction, 24, "x", "")
    assert list(tmp_path.iterdir()) == []


@given(KEYS)
def test_stems_are_plain_file_names(key: str) -> None:
    stem = safe_stem(key)
    assert Path("folder", stem).parent == Path("folder")
    assert stem not in ("", ".", "..")
    assert stem[0] not in ".-"
    assert len(stem) <= 91
    assert stem.isascii()
    assert all(character.isalnum() or character in "._-" for character in stem)


@given(KEYS, KEYS)
def test_different_keys_have_different_stems(first: str, second: str) -> None:
    assert (safe_stem(first) == safe_stem(second)) == (first == second)


def test_known_stems() -> None:
    assert safe_stem("000012_shapes") == "000012_shapes"
    assert safe_stem("clip.v2") == "clip.v2"
    assert safe_stem("../a b").startswith("_a_b-")
    assert len({safe_stem(key) for key in ("a/b", "a_b", "a.b", "a//b", ".a_b", "a_b.", "", "sample")}) == 8
    imposter = safe_stem("a/b")
    assert safe_stem(imposter) != imposter


def test_labels_are_cut_to_their_column_and_may_hold_any_character() -> None:
    clip = np.zeros((1, 96, 96, 3), np.uint8)
    strip = np.asarray(draw_strip([("sixteen letters!", clip), ("a\nb\ud800", clip)], "", ""))
    for row in range(2):
        label = strip[TITLE_PIXELS + row * (192 + GAP_PIXELS) :][:192, :LABEL_PIXELS]
        assert (label > 200).any()
        assert (label[:, -3:] == strip[-1, -1]).all()
