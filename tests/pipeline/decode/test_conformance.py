"""Every back end gives the answers that the checked-in table says, and the table is what people are shown."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.decode.backend import decode_windows, probe_media
from pipeline.decode.choice import checked_in_table
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from tests.clips import real_data
from tests.conformance import COMMAND, README, VIDEO_BACKENDS, as_markdown, ask_all
from tests.conformance_broken import BROKEN
from tests.conformance_cases import CASES

LIMITS = DecodeLimits()
TOLERANCE = 4.0  # of 255, in the mean: the back ends scale before, while or after they convert to RGB


def check_table(backend, folder):
    table = checked_in_table()
    expected = {
        row.name: (row.answers[backend].verdict, row.answers[backend].question)
        for row in table.rows
        if backend in row.answers
    }
    found = {name: (answer.verdict, answer.question) for name, answer in ask_all(backend, folder)}
    changed = [name for name in expected | found if expected.get(name) != found.get(name)]
    lines = "\n".join(f"{name}: {expected.get(name)} -> {found.get(name)}" for name in changed)
    assert not changed, f"run `{COMMAND}` and read its diff; {backend}, table of {dict(table.versions)}:\n{lines}"


@pytest.mark.parametrize("backend", ["pyav", "decord", "pillow"])
def test_answers_are_those_of_the_table(backend, tmp_path):
    check_table(backend, tmp_path)


@pytest.mark.slow
def test_answers_of_torchcodec_are_those_of_the_table(torchcodec_or_skip, tmp_path):
    check_table("torchcodec", tmp_path)


def test_the_table_has_a_row_for_every_case_and_no_other():
    rows = checked_in_table().rows
    assert [row.name for row in rows] == [case.name for case in (*CASES, *BROKEN)]
    for row, case in zip(rows, (*CASES, *BROKEN), strict=True):
        for_pillow = case.kind == "image" or case.container == "webp"
        assert set(row.answers) == ({"pillow"} if for_pillow else set(VIDEO_BACKENDS))


def test_pyav_is_exact_on_all_sound_videos_but_those_it_declines():
    declined = {row.name for row in checked_in_table().rows if not row.broken and _verdict(row, "pyav") != "exact"}
    assert declined == {"mkv vp8 alpha", "mkv vp9 alpha"}


def test_no_back_end_is_wrong_on_sound_videos():
    """They decline what they are not right on."""
    for row in checked_in_table().rows:
        if not row.broken:
            assert not {"wrong", "crash"} & {answer.verdict for answer in row.answers.values()}, row.name


def _verdict(row, backend):
    return row.answers[backend].verdict if backend in row.answers else "exact"


def test_the_readme_shows_the_table():
    assert as_markdown(checked_in_table()) in README.read_text(), f"run `{COMMAND}`"


def real_clips():
    return sorted((real_data() / "clips").glob("*.m*")) if real_data() else []


def check_real_clip(path, backend):
    source = MediaSource(str(path), 0, path.stat().st_size, "video", path.name)
    count = probe_media(source, LIMITS).num_frames
    windows = (Window(0, min(5, count)), Window(count // 2, 1), Window(count - 1, 1))
    request = DecodeRequest(source, Grid(), windows, ClipShape(144, 192), "pyav")
    ours = decode_windows(request, LIMITS)
    theirs = decode_windows(dataclasses.replace(request, decoder=backend), LIMITS)
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, DecodedClip):
            # Of the damaged clip, PyAV can jump to what lies behind the damage.
            assert b.reason.startswith("unsupported") or path.name == "corrupted.mp4", b
            continue
        assert isinstance(a, DecodedClip), a
        np.testing.assert_allclose(a.pts_seconds, b.pts_seconds, atol=0.0011)
        for x, y in zip(a.frames.astype(int), b.frames, strict=True):
            assert np.abs(x - y).mean() < TOLERANCE
    return isinstance(theirs[0], DecodedClip)


@pytest.mark.skipif(real_data() is None, reason="no real clips on this machine")
def test_decord_shows_the_same_real_frames_as_pyav_or_declines():
    claimed = {path.name for path in real_clips() if check_real_clip(path, "decord")}
    assert len(claimed) >= 6


@pytest.mark.slow
@pytest.mark.skipif(real_data() is None, reason="no real clips on this machine")
def test_torchcodec_shows_the_same_real_frames_as_pyav_or_declines(torchcodec_or_skip):
    claimed = {path.name for path in real_clips() if check_real_clip(path, "torchcodec")}
    assert len(claimed) >= 6
