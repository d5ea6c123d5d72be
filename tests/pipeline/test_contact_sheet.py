"""The contact sheet: which picture lies where, and what it says."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.contact_sheet import GAP_PIXELS, LABEL_PIXELS, NOTE_PIXELS, PANEL_PIXELS, TITLE_PIXELS, contact_sheet
from pipeline.evaluation import CodecResult, Evaluation, LatentResult, Rate, Scores, ShownClip

SCORES = Scores(30.0, 0.9, None, None)


def evaluation(shown: tuple[ShownClip, ...], num_codecs: int = 2) -> Evaluation:
    codecs = tuple(CodecResult(f"codec {number}", Rate(1, 16, 4), SCORES) for number in range(num_codecs))
    return Evaluation("somewhere", "vae", "f" * 64, codecs, LatentResult(), (), (), {}, None, shown)


def shown(key: str, side: int, *levels: int) -> ShownClip:
    """Flat pictures: the source's level, then one per codec."""
    source, *made = (np.full((side, side, 3), level, np.uint8) for level in levels)
    return ShownClip(key, 4, source, tuple(made), (SCORES,) * len(made))


def test_source_over_reconstruction_over_error() -> None:
    sheet = contact_sheet([evaluation((shown("a", 64, 100, 110, 90), shown("b", 64, 50, 50, 255)))])
    heights = 5 * PANEL_PIXELS + 3 * GAP_PIXELS + 2 * NOTE_PIXELS
    assert sheet.size == (LABEL_PIXELS + 2 * (PANEL_PIXELS + GAP_PIXELS), TITLE_PIXELS + heights)
    pictures = sheet.crop((LABEL_PIXELS, TITLE_PIXELS, sheet.width, sheet.height))
    step = PANEL_PIXELS + GAP_PIXELS
    rows = [0, step, 2 * step, 2 * step + PANEL_PIXELS + NOTE_PIXELS, 3 * step + PANEL_PIXELS + NOTE_PIXELS]
    levels = [[pictures.getpixel((column * step + 96, y + 96))[0] for y in rows] for column in (0, 1)]  # type: ignore[index]
    assert levels == [[100, 110, 40, 90, 40], [50, 50, 0, 255, 255]]


def test_large_pictures_are_reduced_and_small_ones_enlarged() -> None:
    large, small = (contact_sheet([evaluation((shown("a", side, 100, 110, 90),))]) for side in (500, 5))
    rows = {500: 192, 5: 190}
    for sheet, side in ((large, 500), (small, 5)):
        expected = TITLE_PIXELS + 5 * rows[side] + 3 * GAP_PIXELS + 2 * NOTE_PIXELS
        assert sheet.height == expected


def test_evaluations_lie_under_one_another() -> None:
    one = evaluation((shown("a", 64, 100, 110, 90),))
    sheet, alone = contact_sheet([one, one]), contact_sheet([one])
    assert sheet.size == (alone.width, 2 * alone.height)
    below = sheet.crop((0, alone.height, alone.width, 2 * alone.height))
    assert below.tobytes() == alone.tobytes()


def test_long_and_strange_names_do_not_break_it() -> None:
    sheet = contact_sheet([evaluation((shown("k" * 500 + "\n\x00", 64, 1, 2, 3),))])
    assert sheet.width < 2000


def test_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="no clip was reconstructed"):
        contact_sheet([evaluation(())])
