"""What the entry point does when nobody reads what it tells, as with `latentmill status ... | head -1`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs import __main__ as entry

PROGRAM = [sys.executable, "-m", "jobs"]


@contextmanager
def unread_pipe() -> Iterator[int]:
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("line", ["--help", "encode --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_the_command_without_a_traceback(line: str, unbuffered: str) -> None:
    with unread_pipe() as stdout:
        done = subprocess.run(
            [*PROGRAM, *line.split()],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (141, "")  # as a shell tells of SIGPIPE


def test_an_error_that_nobody_reads_ends_the_command() -> None:
    with unread_pipe() as stderr:
        done = subprocess.run([*PROGRAM, "enocde"], stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    assert (done.returncode, done.stdout) == (141, "")


def test_a_stream_that_is_closed_from_the_start_is_no_error() -> None:
    line = 'exec "$0" -m jobs --help >&-'
    done = subprocess.run(["/bin/sh", "-c", line, sys.executable], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_is_none_of_the_standard_streams_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        raise BrokenPipeError("the decode process is gone")

    monkeypatch.setattr(entry, "run", run)
    with pytest.raises(BrokenPipeError, match="the decode process is gone"):
        entry.main(["status", "--store", "x"])


def test_the_process_ends_without_a_last_look_for_garbage() -> None:
    program = (
        "import atexit, gc, sys; atexit.register(lambda: print('FROZEN', gc.get_freeze_count() > 1000))\n"
        "from jobs.__main__ import main; sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("FROZEN True\n")
