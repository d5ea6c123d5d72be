"""Sizes, turns, pixel aspects, colours and pictures: what a frame looks like when it comes out."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.decode.backend import decode_windows, probe_media
from pipeline.decode.fit import FrameFitter, Orientation
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodeRequest, Grid, MediaSource, Window
from tests.clips import numbered_image, numbered_picture, numbered_video, read_number, real_data, stored

LIMITS = DecodeLimits()


def decode_one(source, shape, decoder="auto"):
    (clip,) = decode_windows(DecodeRequest(source, Grid(), (Window(0, 1),), shape, decoder), LIMITS)
    return clip.frames[0]


def fit(picture, shape, pixel_aspect=Fraction(1)):
    height, width = picture.shape[:2]
    fitter = FrameFitter(shape, width, height, pixel_aspect, Orientation(), LIMITS.max_pixels)
    return fitter(av.VideoFrame.from_ndarray(picture, format="rgb24"))


def smooth_picture(height, width):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    channels = [np.sin(x / 17) + np.cos(y / 11), np.sin((x + y) / 23), np.cos(x / 9)]
    return (127 + 60 * np.stack(channels, axis=-1)).astype(np.uint8)


def area(picture, factor):
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    return picture.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("kernel", ["area", "bicubic"])
@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_scaling_down_agrees_with_means_over_areas(factor, kernel):
    picture = smooth_picture(60 * factor, 90 * factor)
    scaled = fit(picture, ClipShape(60, 90, filter=kernel))
    assert scaled.shape == (60, 90, 3)
    assert np.abs(scaled - area(picture, factor)).mean() < 1


def test_area_means_the_whole_area():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    scaled = fit(np.repeat(checks[..., None], 3, axis=2), ClipShape(16, 16))
    assert np.abs(scaled.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (61, 97), (200, 20)])
def test_crop_keeps_the_centre_and_the_aspect(size):
    height, width = size
    picture = smooth_picture(height * 2, width * 2)
    side = min(height, width)
    top, left = (height - side) // 2 * 2, (width - side) // 2 * 2
    expected = area(picture[top : top + 2 * side, left : left + 2 * side], 2)
    assert np.abs(fit(picture, ClipShape(side, side)) - expected).mean() < 1.5


def test_stretch_scales_each_side_by_itself():
    picture = smooth_picture(80, 120)
    expected = picture.reshape(40, 2, 40, 3, 3).mean(axis=(1, 3))
    assert np.abs(fit(picture, ClipShape(40, 40, fit="stretch")) - expected).mean() < 1


def test_scaling_up_does_not_shift():
    picture = smooth_picture(32, 32)
    for kernel in ("area", "bicubic"):
        up = fit(picture, ClipShape(96, 96, filter=kernel))
        assert np.abs(area(up, 3) - picture).mean() < 4


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_videos_come_out_upright(degrees, container, tmp_path):
    source = stored(tmp_path, numbered_video(4, size=(128, 96), rotation_degrees=degrees, container=container))
    info = probe_media(source, LIMITS)
    assert (info.width, info.height, info.rotation_degrees) == (128, 96, degrees)
    (clip,) = decode_windows(DecodeRequest(source, Grid(), (Window(1, 3),), ClipShape(48, 64)), LIMITS)
    assert [read_number(frame) for frame in clip.frames] == [1, 2, 3]
    red = clip.frames[0, ..., 0].astype(int)
    assert red[:, -4:].mean() > red[:, :4].mean() + 50  # the ramp runs from left to right
    request = DecodeRequest(source, Grid(), (Window(1, 1),), ClipShape(48, 64), "decord")
    (clip,) = decode_windows(request, LIMITS)
    if container == "matroska" and degrees:
        assert clip.reason == "unsupported_by_decord"
    else:
        assert read_number(clip.frames[0]) == 1


def test_mirrored_and_turned_pictures_follow_their_matrix():
    picture = np.arange(6).reshape(2, 3, 1).repeat(3, axis=2)
    turned = Orientation(transposed=True, mirror_x=True, clockwise_degrees=90).upright(picture)
    assert np.array_equal(turned, np.rot90(picture, -1))
    assert np.array_equal(Orientation(mirror_x=True).upright(picture), picture[:, ::-1])
    assert np.array_equal(Orientation(mirror_y=True).upright(picture), picture[::-1])
    turns = [(False, False, False), (True, True, False), (False, True, True), (True, False, True)]
    assert not any(Orientation(*turn).mirrored for turn in turns)
    mirrors = [(False, True, False), (False, False, True), (True, False, False), (True, True, True)]
    assert all(Orientation(*mirror).mirrored for mirror in mirrors)


@pytest.mark.skipif(real_data() is None, reason="no real clips on this machine")
def test_the_real_turned_clip_looks_as_decord_shows_it():
    path = real_data() / "clips" / "rotated_90.mov"
    source = MediaSource(str(path), 0, path.stat().st_size, "video")
    shape = ClipShape(142, 80)
    ours, theirs = decode_one(source, shape), decode_one(source, shape, "decord")
    assert np.abs(ours.astype(int) - theirs).mean() < 2
    assert np.abs(ours[::-1, ::-1].astype(int) - theirs).mean() > 10


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(3, 4), Fraction(128, 117)])
def test_pixels_that_are_not_square_are_made_square(aspect, container, tmp_path):
    source = stored(tmp_path, numbered_video(2, size=(96, 96), pixel_aspect=aspect, container=container))
    info = probe_media(source, LIMITS)
    assert (info.width, info.height) == (round(96 * aspect), 96)
    for decoder in ("pyav", "decord"):
        assert read_number(decode_one(source, ClipShape(64, 64), decoder)) == 0


@pytest.mark.parametrize(
    ("colorspace", "color_range", "pixel_format"),
    [(1, 1, "yuv420p"), (5, 1, "yuv420p"), (1, 2, "yuv420p"), (5, 2, "yuvj420p"), (9, 1, "yuv420p10le")],
)
def test_colours_follow_the_frames_tags(colorspace, color_range, pixel_format):
    """Against the matrices of BT.601, BT.709 and BT.2020."""
    kr, kb = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[colorspace]
    red, green, blue = 200 / 255, 80 / 255, 40 / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    scale = 4 if pixel_format.endswith("10le") else 1
    low, span, chroma_span = (0, 255, 255) if color_range == 2 else (16, 219, 224)
    values = [low + span * luma, *(128 + chroma_span * c for c in chroma)]
    frame = av.VideoFrame(32, 32, pixel_format)
    for plane, value in zip(frame.planes, values, strict=True):
        dtype = np.uint16 if scale == 4 else np.uint8
        plane.update(np.full(plane.buffer_size // np.dtype(dtype).itemsize, round(value * scale), dtype).tobytes())
    frame.colorspace, frame.color_range = colorspace, color_range
    fitter = FrameFitter(ClipShape(16, 16), 32, 32, Fraction(1), Orientation(), LIMITS.max_pixels)
    assert np.abs(fitter(frame).astype(int) - np.array([200, 80, 40])).max() <= 3


def test_transparent_videos_are_laid_over_black():
    frame = av.VideoFrame(32, 32, "rgba")
    frame.planes[0].update(
        np.tile(np.array([200, 100, 255, 128], np.uint8), (32, frame.planes[0].line_size // 4)).tobytes()
    )
    fitter = FrameFitter(ClipShape(16, 16), 32, 32, Fraction(1), Orientation(), LIMITS.max_pixels)
    assert np.abs(fitter(frame).astype(int) - np.array([100, 50, 128])).max() <= 1


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
def test_images_are_clips_of_one_frame(codec, tmp_path):
    source = stored(tmp_path, numbered_image(7, format=codec, size=(120, 90)), kind="image")
    info = probe_media(source, LIMITS)
    assert (info.kind, info.codec, info.width, info.height) == ("image", codec, 120, 90)
    assert (info.num_frames, info.duration_seconds, info.fps) == (1, 0.0, 0.0)
    for grid in (Grid(), Grid(Fraction(16))):
        request = DecodeRequest(source, grid, (Window(0, 1), Window(0, 2)), ClipShape(64, 64))
        clip, beyond = decode_windows(request, LIMITS)
        assert read_number(clip.frames[0]) == 7
        assert (clip.pts_seconds.tolist(), clip.decoder) == ([0.0], "pillow")
        assert beyond.reason == "past_end"


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_exif_orientation_puts_images_upright(orientation, degrees, tmp_path):
    data = numbered_image(7, format="jpeg", size=(120, 90), exif_orientation=orientation)
    source = stored(tmp_path, data, kind="image")
    info = probe_media(source, LIMITS)
    assert (info.width, info.height, info.rotation_degrees) == (120, 90, degrees)
    assert read_number(decode_one(source, ClipShape(45, 60))) == 7


def test_alpha_is_laid_over_black(tmp_path):
    opaque = decode_one(stored(tmp_path, numbered_image(7), kind="image"), ClipShape(96, 96))
    half = decode_one(stored(tmp_path, numbered_image(7, alpha=128), kind="image"), ClipShape(96, 96))
    assert np.abs(half - opaque * (128 / 255)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "I;16"])
def test_image_modes_become_rgb(mode, tmp_path):
    buffer = io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray((numbered_picture(7)[..., 0].astype(np.uint16) << 8) + 37)
    else:
        image = Image.fromarray(numbered_picture(7)).convert(mode)
    image.save(buffer, format="jpeg" if mode == "CMYK" else "png")
    frame = decode_one(stored(tmp_path, buffer.getvalue(), kind="image"), ClipShape(96, 96))
    assert frame.shape == (96, 96, 3)
    assert read_number(frame) == 7
