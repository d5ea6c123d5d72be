"""One picture of an evaluation: a column per clip, source over reconstruction over error, for every way to keep it.

In:   Evaluations with their shown clips, one frame each.
Out:  an RGB image. The error is the absolute difference x 4, as in film strips.
Cost: about 10 ms a panel; memory for the image.
Errors: ValueError when no evaluation has a clip to show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation import Evaluation, Scores
from pipeline.filmstrip import ERROR_GAIN, amplified_error

PANEL_PIXELS = 192  # images are enlarged by whole factors up to this side, or reduced to it
GAP_PIXELS = 4
LABEL_PIXELS = 132
TITLE_PIXELS = 56  # an evaluation's title and its clips' names
NOTE_PIXELS = 22  # the quality under a reconstruction
_PAPER, _INK, _FAINT_INK = (24, 24, 27), (236, 236, 236), (168, 168, 176)
_LABEL_LETTERS, _KEY_LETTERS, _TITLE_LETTERS = 17, 20, 100


@dataclasses.dataclass(frozen=True)
class _Row:
    """A label, and of every clip an image; below them, where there are any, the notes."""

    label: str
    images: tuple[Image.Image, ...]
    notes: tuple[str, ...] = ()


def contact_sheet(evaluations: Sequence[Evaluation]) -> Image.Image:
    """The evaluations under one another, each as a title and rows: source, then a picture and an error per codec.

    Raises:
        ValueError: there is no clip to show.
    """
    blocks = [_draw(evaluation) for evaluation in evaluations if evaluation.shown]
    if not blocks:
        raise ValueError("a contact sheet shows clips, and no clip was reconstructed")
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height for block in blocks)), _PAPER)
    y = 0
    for block in blocks:
        sheet.paste(block, (0, y))
        y += block.height
    return sheet


def _draw(evaluation: Evaluation) -> Image.Image:
    """One evaluation. Its panels are as large as its largest image; smaller ones lie at their panel's top left."""
    rows, font, small = list(_rows(evaluation)), ImageFont.load_default(18), ImageFont.load_default(14)
    panel_width = max(max(image.width for row in rows for image in row.images) + GAP_PIXELS, 160)
    heights = [max(image.height for image in row.images) + (NOTE_PIXELS if row.notes else GAP_PIXELS) for row in rows]
    title = _printable(f"{evaluation.encoder} {evaluation.fingerprint[:12]}, {evaluation.source}", _TITLE_LETTERS)
    width = max(LABEL_PIXELS + len(evaluation.shown) * panel_width, 16 + int(font.getlength(title)))
    block = Image.new("RGB", (width, TITLE_PIXELS + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((8, 4), title, fill=_INK, font=font)
    columns = [LABEL_PIXELS + number * panel_width for number in range(len(evaluation.shown))]
    for x, clip in zip(columns, evaluation.shown, strict=True):
        name = clip.key + (f" window {clip.window}" if clip.window else "")
        draw.text((x, TITLE_PIXELS - 4), _printable(name, _KEY_LETTERS), fill=_FAINT_INK, font=small, anchor="ld")
    y = TITLE_PIXELS
    for row, height in zip(rows, heights, strict=True):
        draw.text((8, y + height / 2), row.label, fill=_INK, font=small, anchor="lm")
        for x, image in zip(columns, row.images, strict=True):
            block.paste(image, (x, y))
        for x, note in zip(columns, row.notes, strict=False):
            draw.text((x, y + height - 4), note, fill=_FAINT_INK, font=small, anchor="ld")
        y += height
    return block


def _rows(evaluation: Evaluation) -> Iterator[_Row]:
    shown = evaluation.shown
    yield _Row("source", tuple(_scaled(clip.source) for clip in shown))
    for number, codec in enumerate(evaluation.codecs):
        made = [clip.reconstructions[number] for clip in shown]
        errors = [amplified_error(clip.source, image) for clip, image in zip(shown, made, strict=True)]
        notes = tuple(_quality(clip.scores[number]) for clip in shown)
        yield _Row(_printable(codec.name, _LABEL_LETTERS), tuple(map(_scaled, made)))
        yield _Row(f"error x{ERROR_GAIN}", tuple(map(_scaled, errors)), notes)


def _quality(scores: Scores) -> str:
    return f"{scores.psnr:.1f} dB, SSIM {scores.ssim:.3f}"


def _scaled(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    if max(image.size) > PANEL_PIXELS:
        image.thumbnail((PANEL_PIXELS, PANEL_PIXELS), Image.Resampling.BOX)
        return image
    factor = PANEL_PIXELS // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _printable(text: str, limit: int) -> str:
    """The text, or its end, where names differ, without what a font cannot show."""
    cut = text if len(text) <= limit else f"...{text[3 - limit :]}"
    return "".join(character if character.isprintable() else "?" for character in cut)
