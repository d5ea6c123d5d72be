"""The heap of processes that compute on CPUs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.heap import HEAP_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
# Twenty times what a layer does, in a thread as the encoder's is: 48 MB, used and freed.
PROGRAM = """
import resource, sys, threading
if "keep" in sys.argv:
    from pipeline.heap import keep_freed_memory
    keep_freed_memory()
if "command" in sys.argv: import jobs.__main__
def use(): b"x" * int("48000000")  # no constant, which Python would make once
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20): use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""


def page_faults(*argv: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        check=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "MALLOC" not in name} | environment,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_memory_that_is_freed_is_used_again() -> None:
    pages = 48_000_000 // os.sysconf("SC_PAGESIZE")
    assert page_faults() > 15 * pages
    assert page_faults("keep") < 3 * pages
    assert page_faults("command") < 3 * pages
    assert page_faults(**HEAP_ENVIRONMENT) < 3 * pages
