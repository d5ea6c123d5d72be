"""`latentmill bench train`: all loaders give the same clips, a small run writes what it says, goals come from it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.__main__ import main
from jobs.bench import train as bench_train
from jobs.bench.config import BenchTrain
from jobs.bench.train_child import LOADERS, measure
from jobs.bench.train_report import goals, to_markdown

SMALL = {"size": 32, "frames": 5, "batch_size": 2, "videos": 4, "video_height": 64, "video_frames": 30}


def cell(speed: float, waiting: float = 1.0) -> dict[str, float]:
    return {"clips_per_second": speed, "waiting_share": waiting, "step_seconds": 0.3, "cpu_seconds": 0.1}


def turn(ours: float, webdataset: float, loose: float, waiting: float) -> dict[str, Any]:
    cells = {"latentmill": cell(ours), "webdataset": cell(webdataset), "loose files": cell(loose)}
    stepped = {name: cell(13.0, waiting) for name in cells}
    return {"none": cells, "sleeping": stepped, "busy": stepped}


def test_goals_take_ratios_within_rounds_and_medians_over_them() -> None:
    about = {
        "command": "c",
        "date": "d",
        "commit": "abc",
        "hardware": "h",
        "versions": {"av": "18"},
        "repetitions": 3,
        "steps": 5,
    }
    about |= {"step_seconds": 0.3, "threads": 2, "workers": 2, "clips": "c"}
    rounds = [turn(200, 100, 250, 0.03), turn(100, 50, 125, 0.04), turn(50, 25, 40, 0.01)]
    result = {"about": about, "rounds": rounds}
    found = {goal.name: (goal.measured.median, goal.verdict) for goal in goals(result)}
    assert found == {
        "waiting, sleeping step": (0.03, "within the spread"),
        "waiting, busy step": (0.03, "yes"),
        "clips/s, ours / loose files": (0.8, "within the spread"),
        "clips/s, ours / webdataset": (2.0, "yes"),
    }
    assert "| loose files | sleeping | 3.0% (1.0% to 4.0%) |" in to_markdown(result)


def test_all_loaders_give_the_same_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "count_products", lambda *_: 1)
    command = BenchTrain(**SMALL, decode_workers=1, steps=1)  # type: ignore[arg-type]
    asked = bench_train._prepare(command, tmp_path)
    found = {}
    for name, loader in LOADERS.items():
        with loader(asked) as batches:
            found[name] = np.concatenate([batch.numpy() for batch in islice(batches, 10)]).astype(int)
    ours = found["latentmill"]
    assert ours.shape == (20, 5, 32, 32, 3)
    np.testing.assert_allclose(found["loose files"], ours, atol=16)
    for epoch in range(5):  # of four clips; webdataset has an order of its own
        clips = slice(4 * epoch, 4 * epoch + 4)
        distances = np.abs(found["webdataset"][clips, None] - ours[None, clips]).max(axis=(2, 3, 4, 5))
        assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) <= 16
    assert np.abs(ours[:4, None] - ours[None, :4]).max() > 64  # clips differ


def test_time_is_either_waiting_or_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "count_products", lambda *_: 1)
    command = BenchTrain(**SMALL, decode_workers=1, steps=5, step_seconds=0.05)  # type: ignore[arg-type]
    asked = dataclasses.replace(bench_train._prepare(command, tmp_path), warm_up=0)
    slept = measure(dataclasses.replace(asked, step="sleeping"))
    assert 0.05 <= slept["step_seconds"] < 0.5
    seconds = 5 * command.batch_size / slept["clips_per_second"]
    assert seconds * (1 - slept["waiting_share"]) == pytest.approx(5 * slept["step_seconds"])
    assert measure(asked)["waiting_share"] > 0.9


@pytest.mark.slow
def test_a_small_run_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "STEPS", ("none",))
    monkeypatch.setattr(bench_train, "to_markdown", lambda result: json.dumps(result["about"]["clips"]))
    monkeypatch.setattr(bench_train, "LOADERS", {"latentmill": LOADERS["latentmill"]})
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["bench", "train", "--output", str(tmp_path), "--hardware", "here", "--decode-workers", "1", *flags]
    assert main([*command, "--steps", "2", "--repetitions", "1", "--step-seconds", "0.01", "--threads", "1"]) == 0
    (path,) = tmp_path.glob("train_here_*.json")
    ((cells,),) = [list(turn.values()) for turn in json.loads(path.read_text())["rounds"]]
    assert cells["latentmill"]["clips_per_second"] > 0
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out


def test_what_is_missing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "train", "--output", str(tmp_path / "gone")]) == 2
    assert "--output" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "train", "--output", str(tmp_path)]) == 2
    assert "webdataset, which is not installed" in capsys.readouterr().err
