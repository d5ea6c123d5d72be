"""Clips for a person to look at, beside one another: a video and a film strip, which is a row of frames per clip.

In:   uint8 clips T H W 3 of one shape, RGB, each with a label; or a source clip and its reconstruction; two lines to
      print above them.
Out:  an mp4 of all at once, and an image of labelled rows, up to 8 frames as columns. Of a reconstruction: <stem>.mp4
      (source | reconstruction | error) and <stem>.png (the same as rows); the error is the absolute difference x 4:
      black is exact, white is off by 64 or more.
Cost: about 2 ms a frame of 256 x 144 and 0.2 s for the strip, on one core; memory for one frame and the strip.
Errors: ValueError for clips that do not match, or no fps; OSError when a file cannot be written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ERROR_GAIN = 4
MAX_COLUMNS = 8
GAP_PIXELS = 4
LABEL_PIXELS = 122  # the column of row labels
TITLE_PIXELS = 70  # the two title lines and the frame numbers
SMALL_PANEL_PIXELS, LARGE_PANEL_PIXELS = 192, 384  # panels are enlarged up to the one, reduced down to the other

LabelledClips = Sequence[tuple[str, np.ndarray]]

_LABEL_LETTERS = 14  # that fit into the column
_ROWS = ("source", "reconstruction", f"error x{ERROR_GAIN}")
_PAPER, _INK, _FAINT_INK = (24, 24, 27), (236, 236, 236), (168, 168, 176)


def write_comparison(
    stem: Path, source: np.ndarray, reconstruction: np.ndarray, fps: float | Fraction, key: str, quality_line: str
) -> tuple[Path, Path]:
    """Write <stem>.mp4 and <stem>.png, and return their paths. Nothing of `key` gets into a path: see `safe_stem`.

    Args:
        stem: the files' path without extension; its directory is made when it is not there.
        source: uint8 T H W 3, RGB.
        reconstruction: uint8, the same shape.
        fps: frames per second of both; a still (T = 1) is shown for a second whatever its fps.
        key: the sample, for the strip's title.
        quality_line: second line of the title, such as "PSNR 31.2 dB".

    Raises:
        ValueError: clips that are not uint8 T H W 3 of one shape, or a video without a positive fps.
        OSError: a file cannot be written.
    """
    if source.shape != reconstruction.shape or source.ndim != 4 or source.shape[3] != 3 or not source.size:
        raise ValueError(
            f"source and reconstruction are T H W 3 of one shape, got {source.shape} and {reconstruction.shape}"
        )
    if source.dtype != np.uint8 or reconstruction.dtype != np.uint8:
        raise ValueError(f"clips to compare are uint8, got {source.dtype} and {reconstruction.dtype}")
    if len(source) > 1 and fps <= 0:
        raise ValueError(f"a video of {len(source)} frames needs a positive fps, got {fps}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    video_path, strip_path = stem.with_name(f"{stem.name}.mp4"), stem.with_name(f"{stem.name}.png")
    pairs = zip(source, reconstruction, strict=True)
    moments = ((shown, made, amplified_error(shown, made)) for shown, made in pairs)
    write_video(video_path, moments, fps if len(source) > 1 else 1)
    film_strip(source, reconstruction, key, quality_line).save(strip_path)
    return video_path, strip_path


def safe_stem(key: str) -> str:
    """A file name without extension for a key with any characters: ASCII, at most 91 long, its own for every key.

    A key of letters, digits, `_`, `-` and inner dots stays as it is; any other gets a hash of the whole key at its end,
    and so does one that looks as if it had one already.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[:80].lstrip(".-").rstrip(".") or "sample"
    if name == key and not re.search(r"-[0-9a-f]{10}$", name):
        return name
    return f"{name}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def amplified_error(source: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Absolute difference x ERROR_GAIN, clipped to uint8; any shape."""
    difference = np.abs(source.astype(np.int16) - reconstruction.astype(np.int16))
    return np.asarray(np.minimum(difference * ERROR_GAIN, 255), np.uint8)


def film_strip(source: np.ndarray, reconstruction: np.ndarray, key: str, quality_line: str) -> Image.Image:
    """Rows source, reconstruction, error, as `draw_strip` draws them."""
    picked = _picked_frames(len(source))
    shown, made = source[picked], reconstruction[picked]
    rows = list(zip(_ROWS, (shown, made, amplified_error(shown, made)), strict=True))
    return _draw_rows(rows, picked, key, quality_line)


def draw_strip(clips: LabelledClips, title: str, subtitle: str) -> Image.Image:
    """A row per clip, T H W 3 of one shape; columns are up to MAX_COLUMNS frames, evenly from the first to the last.

    Panels are scaled by whole factors: small ones enlarged pixel by pixel, large ones reduced by averaging. Panel
    (row, column) has its corner at x = LABEL_PIXELS + column * (panel width + GAP_PIXELS), y alike from TITLE_PIXELS.
    """
    picked = _picked_frames(len(clips[0][1]))
    return _draw_rows([(label, clip[picked]) for label, clip in clips], picked, title, subtitle)


def write_video(path: Path, moments: Iterable[Sequence[np.ndarray]], fps: float | Fraction) -> None:
    """Write an H.264 mp4 that shows several clips at once, up to MAX_COLUMNS of them beside one another.

    `moments` holds the frames, uint8 H W 3 of one shape, that are seen together. Places without one stay black; both
    sides are even, as yuv420p needs them.
    """
    with av.open(path, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "16"})
        stream.pix_fmt = "yuv420p"
        for panels in moments:
            canvas = _tiled(panels)
            if not stream.codec_context.is_open:
                stream.height, stream.width = canvas.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(canvas, format="rgb24")))
        container.mux(stream.encode())


def _tiled(panels: Sequence[np.ndarray]) -> np.ndarray:
    height, width, _ = panels[0].shape
    columns = min(len(panels), MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    canvas = np.zeros((rows * height + rows * height % 2, columns * width + columns * width % 2, 3), np.uint8)
    for number, panel in enumerate(panels):
        y, x = number // columns * height, number % columns * width
        canvas[y : y + height, x : x + width] = panel
    return canvas


def _picked_frames(num_frames: int) -> np.ndarray:
    return np.unique(np.linspace(0, num_frames - 1, MAX_COLUMNS).round().astype(int))


def _draw_rows(rows: LabelledClips, numbers: np.ndarray, title: str, subtitle: str) -> Image.Image:
    """The strip of clips whose frames are all shown; `numbers` are the frames' in the whole clip."""
    panels = [[_panel(frame) for frame in clip] for _, clip in rows]
    width, height = panels[0][0].size
    title, subtitle = _printable(title), _printable(subtitle)
    font, small_font = ImageFont.load_default(18), ImageFont.load_default(15)
    right = LABEL_PIXELS + len(numbers) * (width + GAP_PIXELS)
    text_right = 16 + int(max(font.getlength(title), small_font.getlength(subtitle)))
    strip = Image.new("RGB", (max(right, text_right), TITLE_PIXELS + len(rows) * (height + GAP_PIXELS)), _PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((8, 3), title, fill=_INK, font=font)
    pen.text((8, 25), subtitle, fill=_INK, font=small_font)
    lefts = [LABEL_PIXELS + column * (width + GAP_PIXELS) for column in range(len(numbers))]
    for x, number in zip(lefts, numbers, strict=True):
        pen.text((x + width / 2, TITLE_PIXELS - 3), f"frame {number}", fill=_FAINT_INK, font=small_font, anchor="md")
    for row, (label, _) in enumerate(rows):
        y = TITLE_PIXELS + row * (height + GAP_PIXELS)
        pen.text((8, y + height / 2), _printable(label, _LABEL_LETTERS), fill=_INK, font=small_font, anchor="lm")
        for x, panel in zip(lefts, panels[row], strict=True):
            strip.paste(panel, (x, y))
    return strip


def _panel(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    longer = max(image.size)
    if longer > LARGE_PANEL_PIXELS:
        return image.reduce(-(-longer // LARGE_PANEL_PIXELS))
    factor = max(1, SMALL_PANEL_PIXELS // longer)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _printable(text: str, limit: int = 160) -> str:
    cut = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(character if character.isprintable() else "?" for character in cut)
