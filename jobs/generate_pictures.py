"""Generated clips for a person to look at: a film strip with a labelled row for each, and a video of all side by side.

In:   uint8 clips T H W 3 of one shape, RGB, each with a label; a title.
Out:  <stem>.png (a row per clip, up to 8 frames as columns) and <stem>.mp4 (up to 8 clips beside one another).
Cost: memory for the strip and one frame of the video.
Errors: UsageError when a file cannot be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UsageError
from pipeline.filmstrip import GAP_PIXELS, LABEL_PIXELS, MAX_COLUMNS, SMALL_PANEL_PIXELS, TITLE_PIXELS

LabelledClips = Sequence[tuple[str, np.ndarray]]

_PAPER, _INK, _FAINT_INK = (24, 24, 27), (236, 236, 236), (168, 168, 176)
_MAX_LABEL_LETTERS = 14


def write_clips(stem: Path, clips: LabelledClips, fps: float, title: str, subtitle: str) -> tuple[Path, Path]:
    """Write <stem>.mp4 and <stem>.png, and return their paths.

    Raises:
        UsageError: the directory cannot be made, or a file not be written.
    """
    video_path, strip_path = stem.with_name(f"{stem.name}.mp4"), stem.with_name(f"{stem.name}.png")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        draw_strip(clips, title, subtitle).save(strip_path)
        _write_video(video_path, [clip for _, clip in clips], fps)
    except OSError as error:
        raise UsageError(f"--output {stem.parent} cannot be written: {error}") from error
    return video_path, strip_path


def draw_strip(clips: LabelledClips, title: str, subtitle: str) -> Image.Image:
    """A row per clip; columns are frames, evenly from the first to the last. Small frames are enlarged whole times."""
    num_frames, height, width, _ = clips[0][1].shape
    picked = np.unique(np.linspace(0, num_frames - 1, MAX_COLUMNS).round().astype(int))
    factor = max(1, SMALL_PANEL_PIXELS // max(height, width))
    height, width = height * factor, width * factor
    font, small_font = ImageFont.load_default(18), ImageFont.load_default(15)
    text_right = 16 + int(max(font.getlength(title), small_font.getlength(subtitle)))
    right = max(LABEL_PIXELS + len(picked) * (width + GAP_PIXELS), text_right)
    strip = Image.new("RGB", (right, TITLE_PIXELS + len(clips) * (height + GAP_PIXELS)), _PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((8, 3), title, fill=_INK, font=font)
    pen.text((8, 25), subtitle, fill=_INK, font=small_font)
    for column, number in enumerate(picked):
        x = LABEL_PIXELS + column * (width + GAP_PIXELS)
        pen.text((x + width / 2, TITLE_PIXELS - 3), f"frame {number}", fill=_FAINT_INK, font=small_font, anchor="md")
        for row, (_, clip) in enumerate(clips):
            panel = Image.fromarray(clip[number]).resize((width, height), Image.Resampling.NEAREST)
            strip.paste(panel, (x, TITLE_PIXELS + row * (height + GAP_PIXELS)))
    for row, (label, _) in enumerate(clips):
        y = TITLE_PIXELS + row * (height + GAP_PIXELS) + height / 2
        pen.text((8, y), _short(label), fill=_INK, font=small_font, anchor="lm")
    return strip


def _write_video(path: Path, clips: Sequence[np.ndarray], fps: float) -> None:
    """Places that no clip fills stay black; both sides are even, as the codec needs them."""
    num_frames, height, width, _ = clips[0].shape
    columns = min(len(clips), MAX_COLUMNS)
    rows = -(-len(clips) // columns)
    canvas = np.zeros((rows * height + rows * height % 2, columns * width + columns * width % 2, 3), np.uint8)
    rate = Fraction(fps).limit_denominator(1001) if num_frames > 1 else Fraction(1)
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "16"})
        stream.height, stream.width = canvas.shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in range(num_frames):
            for number, clip in enumerate(clips):
                y, x = number // columns * height, number % columns * width
                canvas[y : y + height, x : x + width] = clip[frame]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(canvas, format="rgb24")))
        container.mux(stream.encode())


def _short(label: str) -> str:
    letters = "".join(letter if letter.isprintable() else "?" for letter in label)
    return letters if len(letters) <= _MAX_LABEL_LETTERS else f"{letters[: _MAX_LABEL_LETTERS - 3]}..."
