"""`latentmill bench decode`: a small run writes what it says, and the goals are computed from it."""

from __future__ import annotations

import json

import pytest

from jobs.__main__ import main
from jobs.bench_decode_child import measure
from jobs.bench_decode_report import goals, to_markdown


def cell(seconds, frames=16):
    return {"frames": frames, "wall_seconds": seconds, "cpu_seconds": seconds, "peak_mib": 50.0}


RESULT = {
    "about": {"command": "c", "date": "d", "hardware": "h", "versions": {"av": "18"}, "repetitions": 1, "frames": 30},
    "rows": [
        {
            "codec": "h264",
            "height": 360,
            "wanted": wanted,
            "cells": {"auto": cell(1.0), "pyav": cell(best), "decord": {"error": "no"}, "loop: x": cell(loop)},
        }
        for wanted, best, loop in (("few", 1.1, 3.0), ("all", 0.8, 2.0))
    ],
    "long": {"minutes": 10, "height": 720, "four windows": {"auto": cell(0.5)}, "all": cell(20.0)},
    "memory": [
        {"minutes": minutes, "four windows": cell(1), "all in pieces": cell(1) | {"peak_mib": peak}}
        for minutes, peak in ((1, 50.0), (60, 60.0))
    ],
    "handover": [{"height": 360, "in_process": 1.0, "decode_process": 1.02}],
}


def test_goals_take_the_worst_row():
    found = {name: (round(value, 3), met) for name, value, _, met in goals(RESULT)}
    assert list(found.values()) == [(0.8, False), (2.0, True), (40.0, True), (0.2, False), (0.02, True)]
    assert "| h264 | 360p | few | 16, 50 MiB | 15, 50 MiB | - (no) |" in to_markdown(RESULT)


def test_every_method_decodes_the_wanted_frames_or_says_why_not(tmp_path):
    from jobs.bench_videos import texture_video

    path = texture_video(tmp_path, "h264", 96, 30)
    for method in ("auto", "pyav", "decord", "loop: decord get_batch", "loop: PyAV all, torch resize", "stream"):
        found = measure(method, str(path), [(3, 4), (20, 6)], 32)
        assert found["frames"] == 10, method
        assert found["cpu_seconds"] > 0
        assert found["peak_mib"] > 10
    assert "past_end" in measure("auto", str(path), [(28, 9)], 32)["error"]


def test_a_small_run_writes_its_result(tmp_path, capsys):
    flags = "--codecs h264 --heights 96 --frames 75 --side 32 --repetitions 1 --long-minutes 0.5 --long-height 96"
    command = ["bench", "decode", "--output", str(tmp_path), "--hardware", "here", *flags.split()]
    assert main([*command, "--memory-minutes", "2"]) == 0
    (markdown,) = tmp_path.glob("decode_here_*.md")
    assert markdown.read_text() in capsys.readouterr().out
    result = json.loads(markdown.with_suffix(".json").read_text())
    assert [row["wanted"] for row in result["rows"]] == ["few", "all"]
    assert result["rows"][1]["cells"]["pyav"]["frames"] == 75
    assert all(value > 0 for _, value, _, _ in goals(result)[:3])


def test_a_wrong_directory_and_a_wrong_bench_are_told(tmp_path, capsys):
    assert main(["bench", "decode", "--output", str(tmp_path / "gone")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["bench", "cakes"]) == 2
    with pytest.raises(SystemExit):
        main(["bench", "decode", "--help"])
