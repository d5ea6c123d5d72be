"""`latentmill bench scale`: goals follow from the numbers, steps measure what they say, a small run writes it all."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._common.utils import get_default_ray_temp_dir, get_default_system_temp_dir
from ray._private.ray_constants import DEFAULT_OBJECT_PREFIX

from jobs.__main__ import main
from jobs.bench import scale as bench_scale
from jobs.bench import scale_jobs as bench_scale_jobs
from jobs.bench.config import BenchScale
from jobs.bench.scale_child import STEPS, UNIT_ROWS
from jobs.bench.scale_memory import MemoryWatch, role_of
from jobs.bench.scale_report import goals, growth_of, to_markdown
from pipeline.ledger import listed_units
from pipeline.plan import load_plan
from pipeline.storage import LocalStorage
from pipeline.store import open_header


def in_process(step: str, directory: Path, units: int, workers: int = 0) -> dict[str, Any]:
    return STEPS[step](directory, units, workers)


def controller_row(units: int, workers: int, seconds_per_unit: float, loop_mib: float) -> dict[str, Any]:
    measured = {"seconds_per_unit": seconds_per_unit, "loop_mib": loop_mib, "load_seconds": 0.5, "plan_mib": 9.0}
    return {"units": units, "workers": workers, "lines": 3, **measured}


def memory_row(*peaks: dict[str, float], spilled: int | None = 0, engine: str = "ray") -> dict[str, Any]:
    cells = [
        {"amount": amount, "seconds": 1.0, "peak_mib": peak, "spilled_files": spilled}
        for amount, peak in zip((60, 600), peaks, strict=True)
    ]
    return {"what": "video seconds", "engine": engine, "encoder": "e", "cells": cells}


RESULT: dict[str, Any] = {
    "about": {"command": "c", "date": "d", "commit": "abc", "hardware": "h", "versions": {"av": "18"}},
    "controller": [
        controller_row(1000, 1, 1e-5, 1.0),
        controller_row(10**6, 1, 2e-5, 7.0),
        controller_row(20_000, 1000, 4e-3, 90.0),
    ],
    "books": [{"units": 1000, "seconds_per_unit": {"count": 0.001, "close": 0.0015}, "books_mib": 4.0}],
    "memory": [
        memory_row({"driver": 100.0, "decode": 50.0}, {"driver": 105.0, "decode": 60.0, "decode task": 1.0}),
        memory_row({"driver": 100.0}, {"driver": 99.0}, spilled=2),
    ],
    "start": [
        {
            "engine": engine,
            "encoder": "e",
            "seconds": seconds,
            "cpu_seconds": 3.0,
            "parts": {"index": seconds / 2, "books": seconds / 2},
        }
        for engine, seconds in (("local", 9.0), ("local", 10.0), ("local", 16.0), ("ray", 40.0))
    ],
}


def test_goals_take_the_worst_row() -> None:
    found = [(round(goal.measured.median, 3), goal.verdict) for goal in goals(RESULT)]
    assert found == [(4.0, "no"), (6.0, "no"), (2.5, "yes"), (0.2, "no"), (2, "no"), (10.0, "within the spread")]
    assert growth_of(RESULT["memory"][0]) == pytest.approx({"driver": 0.05, "decode": 0.2})
    text = to_markdown(RESULT)
    assert "| ray | e | 60 to 600 video seconds | driver: 100 to 105 (+5.0%); decode: 50 to 60 (+20.0%) | 0 |" in text
    assert "| local, e | index 5.00; books 5.00 | 3.00 (3.00 to 3.00) | 10.00 (9.00 to 16.00) |" in text
    assert "| 20000 | 3 | 1000 | 0.50 | 9.0 | 4000.0 | 90.0 |" in text


def test_what_one_measurement_cannot_show_is_no_goal() -> None:
    local = memory_row({"driver": 100.0}, {"driver": 99.0}, spilled=None, engine="local")
    result = {"about": RESULT["about"], "controller": RESULT["controller"][:1], "memory": [local]}
    assert [goal.name for goal in goals(result)] == [
        "controller, CPU ms per unit",
        "growth of peak memory, any process seen with both",
    ]
    assert "| local | e | 60 to 600 video seconds | driver: 100 to 99 (-1.0%) |  |" in to_markdown(result)


def test_parts_that_were_not_measured_are_left_out() -> None:
    only = {"about": RESULT["about"], "books": RESULT["books"]}
    assert [goal.name for goal in goals(only)] == ["books, CPU ms per unit, all passes"]
    assert "Start-up" not in to_markdown(only)


def test_the_steps_make_what_they_measure(tmp_path: Path) -> None:
    assert in_process("plan", tmp_path, 40) == {"lines": 3}  # 40 x 64 clips, 1000 a shard
    driven = in_process("drive", tmp_path, 40, 7)
    assert 0 < driven["seconds_per_unit"] < 0.1
    in_process("ledger", tmp_path, 40)
    storage = LocalStorage(tmp_path)
    plan = load_plan(storage, open_header(storage).recipe)
    assert len(list(listed_units(storage, plan))) == 40
    books = in_process("books", tmp_path, 40)
    assert list(books["seconds_per_unit"]) == ["count", "list", "close", "count again"]
    assert open_header(storage).statistics["rows"] == 40 * UNIT_ROWS


def test_roles_are_told_from_command_lines(tmp_path: Path) -> None:
    lines = {
        "python -m jobs encode a.tar --store s": "driver",
        "python -m pipeline.decode.child ": "decode",
        "ray::EncodeActor.setup": "encode worker",
        "ray::encode 17x64x64/000000": "encode worker",
        "ray::decode": "decode task",
        "/lib/ray/core/src/ray/raylet/raylet --store": "raylet",
        "ray::IDLE": None,
        "python -m jobs bench scale": None,
    }
    assert {line: role_of(line) for line in lines} == lines


def test_peaks_of_a_process_below_and_what_ray_spills(tmp_path: Path) -> None:
    temporary = get_default_ray_temp_dir()  # where Ray itself would keep its sessions
    spilled = tmp_path / Path(temporary).relative_to(get_default_system_temp_dir()) / "session_latest"
    with MemoryWatch(tmp_path) as memory:
        pass
    assert memory.spilled_files is None
    spilled = spilled / f"{DEFAULT_OBJECT_PREFIX}_1"
    spilled.mkdir(parents=True)
    program = "import time; data = bytearray(80 << 20); data[::4096] = data[::4096]; del data; time.sleep(0.5)"
    with MemoryWatch(tmp_path) as memory:
        (spilled / "object").touch()
        subprocess.run([sys.executable, "-c", program, "-m jobs encode "], check=True)
        (spilled / "object").unlink()
    assert 80 < memory.peak_mib["driver"] < 130
    assert memory.spilled_files == 1


@pytest.mark.slow
def test_a_small_run_writes_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real job for start-up; the steps run in this process, and the jobs for memory are left out."""
    monkeypatch.setattr(bench_scale, "_child", in_process)
    monkeypatch.setattr(bench_scale, "measure_memory", lambda _: RESULT["memory"])
    sizes = "--units 20 --workers 3 --worker-units 30 --books-units 20 --start-clips 4 --repetitions 1"
    jobs = "--engines local --encoders rehearsal:4x8x8x16@50"
    flags = ["--output", str(tmp_path), "--hardware", "here", *sizes.split(), *jobs.split()]
    assert main(["bench", "scale", *flags]) == 0
    (markdown,) = tmp_path.glob("scale_here_*.md")
    assert markdown.read_text() in capsys.readouterr().out
    result = json.loads(markdown.with_suffix(".json").read_text())
    assert [(row["units"], row["workers"]) for row in result["controller"]] == [(20, 1), (30, 3)]
    (start,) = result["start"]
    assert list(start["parts"]) == [
        "imports", "index", "plan", "encoder", "worker", "first unit", "other units, books, exit",
    ]  # fmt: skip
    assert sum(start["parts"].values()) == pytest.approx(start["seconds"])
    assert min(start["parts"].values()) >= 0
    assert start["cpu_seconds"] > 0.5


def test_memory_compares_sets_that_differ_in_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pretend(argv: list[str], _: float) -> SimpleNamespace:
        commands.append(argv)
        time.sleep(0.2)  # two looks
        return SimpleNamespace(returncode=0, seconds=1.0)

    monkeypatch.setattr(bench_scale_jobs, "watch", pretend)
    monkeypatch.setattr(MemoryWatch, "peak_mib", {"driver": 100.0})
    monkeypatch.setattr(MemoryWatch, "_look", lambda memory: setattr(memory, "spilled_files", 0))
    sizes = "--video-seconds 10 20 --video-height 48 --videos 3 --clips 5 250 --encoders rehearsal:4x8x8x16@50"
    assert main(["bench", "scale", "--output", str(tmp_path), "--parts", "memory", *sizes.split()]) == 0
    tars = [[word for word in argv if word.endswith(".tar")] for argv in commands]
    assert [len(names) for names in tars] == [1, 1, 1, 3] * 2
    assert ["--local" in argv for argv in commands] == [True] * 4 + [False] * 4
    assert ["uniform" in argv for argv in commands] == [True, True, False, False] * 2


def test_tars_hold_as_many_samples_as_asked(tmp_path: Path) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"video")
    bench = bench_scale_jobs.Bench(BenchScale(), tmp_path, tmp_path)
    for count, per_tar, sizes in ((250, 100, [100, 100, 50]), (100, 100, [100]), (5, 100, [5]), (300, 300, [300])):
        found = []
        for path in bench.tars(f"{count} clips", video, count, per_tar):
            with tarfile.open(path) as tar:
                found.append(len(tar.getnames()))
        assert found == sizes


def test_a_session_of_ray_that_nobody_saw_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale_jobs, "watch", lambda *_: SimpleNamespace(returncode=0, seconds=1.0))
    sizes = "--video-seconds 10 20 --video-height 48 --videos 1 --engines ray --encoders rehearsal:4x8x8x16@50"
    with pytest.raises(RuntimeError, match="nobody knows what it spilled"):
        main(["bench", "scale", "--output", str(tmp_path), "--parts", "memory", *sizes.split()])


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", "--output", str(tmp_path / "gone")]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert main(["bench", "scale", "--output", str(tmp_path), "--encoders", "wan"]) == 2
    assert "--encoders wan: use rehearsal:TxHxWxC@MEGAPIXELS or tiny-vae" in capsys.readouterr().err
    assert main(["bench", "scale", "--clips", "0", "10"]) == 2
    assert "--clips must be positive" in capsys.readouterr().err
    assert main(["bench", "scale", "--video-seconds", "600", "60"]) == 2
    assert "--video-seconds must be a smaller and a larger number" in capsys.readouterr().err


def test_a_job_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, cause="latentmill: disk full")
    monkeypatch.setattr(bench_scale_jobs, "watch", lambda *_: failed)
    flags = ["--parts", "start", "--engines", "local", "--encoders", "rehearsal:4x8x8x16@50"]
    with pytest.raises(RuntimeError, match="latentmill: disk full"):
        main(["bench", "scale", "--output", str(tmp_path), *flags])
