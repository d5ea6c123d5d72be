"""What a benchmark says of itself is what a reader needs to run it again."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from jobs.bench.about import about
from jobs.cores import usable_cores, within_quota


@pytest.mark.parametrize("program", [["latentmill"], ["/somewhere/jobs/__main__.py"]])
def test_the_command_can_be_run_again(program: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--output", "my results", "--repetitions", "3"]
    monkeypatch.setattr(sys, "argv", [*program, "bench", "encode", *flags])
    assert shlex.split(about("encode", ())["command"]) == ["latentmill", "bench", "encode", *flags]


def test_facts_and_the_versions_of_what_is_installed_are_told() -> None:
    told = about("decode", ("numpy", "no-such-library"), repetitions=3)
    assert set(told["versions"]) == {"python", "numpy"}
    assert told["repetitions"] == 3
    assert "cores, load" in told["hardware"]
    assert told["commit"]


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("", 16), ("max 100000\n", 16), ("800000 100000\n", 8), ("150000 100000\n", 1), ("50000 100000\n", 1),
        ("9900000 100000\n", 16),
    ],
)  # fmt: skip
def test_a_quota_leaves_whole_cores_and_no_more_than_there_are(quota: str, cores: int) -> None:
    assert within_quota(16, quota) == cores


def test_the_cores_are_those_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr("jobs.cores._QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 6
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert usable_cores() == 3
    assert ", 3 cores, load" in about("encode", ())["hardware"]
