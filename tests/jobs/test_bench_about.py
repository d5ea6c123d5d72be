"""What a benchmark says of itself is what a reader needs to run it again."""

from __future__ import annotations

import shlex
import sys

import pytest

from jobs.bench.about import about


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
