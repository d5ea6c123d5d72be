"""`latentmill bench decode`: a small run writes what it says, and the goals are computed from it."""

from __future__ import annotations

import itertools
import json

import pytest

from jobs.__main__ import main
from jobs.bench import decode as bench_decode
from jobs.bench.about import rotated
from jobs.bench.decode_child import measure
from jobs.bench.decode_report import Goal, Spread, against, goals, to_markdown


def cell(*rounds, frames=16):
    seconds = sorted(rounds)[len(rounds) // 2]
    return {
        "frames": frames,
        "wall_seconds": seconds,
        "cpu_seconds": seconds,
        "peak_mib": 50.0,
        "rounds": list(rounds),
    }


RESULT = {
    "about": {
        "command": "c",
        "date": "d",
        "commit": "abc",
        "hardware": "h",
        "versions": {"av": "18"},
        "repetitions": 1,
        "frames": 30,
    },
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
    "handover": [{"height": 360, "in_process": [1.0, 2.0], "decode_process": [1.02, 2.04]}],
}


def test_goals_take_the_worst_row():
    found = [(round(goal.measured.median, 3), goal.verdict) for goal in goals(RESULT)]
    assert found == [(0.8, "no"), (2.0, "yes"), (40.0, "yes"), (0.2, "no"), (0.02, "yes")]
    assert "| h264 | 360p | few | 16, 50 MiB | 15, 50 MiB | - (no) | 5, 50 MiB | 1.10 (1.10 to 1.10) |" in to_markdown(
        RESULT
    )


def test_ratios_are_taken_within_rounds():
    """A machine that slows down for everybody from round to round changes no ratio."""
    row = {"cells": {"auto": cell(1.0, 2.0, 4.0), "pyav": cell(1.1, 2.2, 4.4), "decord": cell(9.0, 9.0, 9.0)}}
    assert against(row, ("pyav", "decord", "gone")) == Spread.of([1.1 / 1.0, 2.2 / 2.0, 4.4 / 4.0])
    assert against(row | {"cells": row["cells"] | {"loop": {"error": "no"}}}, ["loop"]).median == float("inf")


def test_a_goal_inside_the_spread_is_neither_met_nor_missed():
    rows = [Spread(1.2, 1.1, 1.3), Spread(0.98, 0.9, 1.01)]
    assert Goal.at_least("g", 1.0, rows) == Goal("g", rows[1], 1.0, "within the spread")
    assert Goal.at_least("g", 1.0, [*rows, Spread(0.97, 0.96, 0.99)]).verdict == "no"
    assert Goal.at_most("g", 0.95, rows) == Goal("g", rows[0], 0.95, "no")
    assert Goal.at_most("g", 1.0, rows[1:]).verdict == "within the spread"
    assert Goal.at_most("g", 1.01, rows[1:]).verdict == "yes"


def test_a_goal_shows_the_row_that_decides_it():
    decided, lower = Spread(0.96, 0.95, 0.99), Spread(0.95, 0.9, 1.01)
    assert Goal.at_least("g", 1.0, [decided, lower]) == Goal("g", decided, 1.0, "no")
    assert Goal.at_most("g", -1.0, [decided.negated, lower.negated]) == Goal("g", decided.negated, -1.0, "no")


def test_auto_that_cannot_decode_is_the_worst_row():
    assert against({"cells": {"auto": {"error": "no"}, "pyav": cell(1.0)}}, ["pyav"]) == Spread.of([0.0])


def test_every_method_comes_first_and_after_its_neighbours():
    orders = [tuple(rotated("abc", number)) for number in range(6)]
    assert {order[0] for order in orders} == set("abc")
    assert {pair for order in orders for pair in itertools.pairwise(order)} == set(itertools.permutations("abc", 2))


def test_every_method_decodes_the_wanted_frames_or_says_why_not(tmp_path):
    from jobs.bench.videos import texture_video

    path = texture_video(tmp_path, "h264", 96, 30)
    for method in ("auto", "pyav", "decord", "loop: decord get_batch", "loop: PyAV all, torch resize", "stream"):
        found = measure(method, str(path), [(3, 4), (20, 6)], 32)
        assert found["frames"] == 10, method
        assert found["cpu_seconds"] > 0
        assert found["peak_mib"] > 10
    assert "past_end" in measure("auto", str(path), [(28, 9)], 32)["error"]


def test_a_small_run_writes_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_decode, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(bench_decode, "BACK_ENDS", ("pyav", "decord"))  # torchcodec takes seconds to import
    flags = "--codecs h264 --heights 96 --frames 75 --side 32 --repetitions 1 --long-minutes 0.5 --long-height 96"
    command = ["bench", "decode", "--output", str(tmp_path), "--hardware", "here", *flags.split()]
    assert main([*command, "--memory-minutes", "2"]) == 0
    (markdown,) = tmp_path.glob("decode_here_*.md")
    assert markdown.read_text() in capsys.readouterr().out
    result = json.loads(markdown.with_suffix(".json").read_text())
    assert [row["wanted"] for row in result["rows"]] == ["few", "all"]
    assert result["rows"][1]["cells"]["pyav"]["frames"] == 75
    assert all(goal.measured.low > 0 for goal in goals(result)[:3])


def test_a_wrong_directory_and_a_wrong_bench_are_told(tmp_path, capsys):
    assert main(["bench", "decode", "--output", str(tmp_path / "gone")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["bench", "decode", "--output", str(tmp_path), "--codecs", "h264", "theora"]) == 2
    assert "--codecs theora: there is h264" in capsys.readouterr().err
    for flag, value in (("--repetitions", "0"), ("--frames", "56"), ("--memory-minutes", "1")):
        assert main(["bench", "decode", flag, value]) == 2
        assert flag in capsys.readouterr().err
    assert main(["bench", "cakes"]) == 2
    with pytest.raises(SystemExit):
        main(["bench", "decode", "--help"])
