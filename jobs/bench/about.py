"""What every benchmark says of itself, and the order in which contenders take turns.

In:   a benchmark's name, the libraries that matter.
Out:  command, date, commit, hardware and versions, as JSON; a rotated order.
Cost: a call of git.
Errors: none; what is not known is left out or said to be unknown.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cores import usable_cores


def about(name: str, libraries: Sequence[str], **facts: object) -> dict[str, Any]:
    """Of this run, before it measures: `latentmill bench NAME` with its flags, the day, the code, the machine."""
    versions = {"python": platform.python_version()}
    for library in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "command": f"latentmill bench {name} {shlex.join(sys.argv[3:])}",
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "commit": _commit(),
        "hardware": f"{_cpu_name()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "versions": versions,
        **facts,
    }


def device_name(device: str) -> str:
    """`cpu`, or `cuda` and what the GPU is called."""
    if device != "cuda":
        return device
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


def rotated(names: Sequence[str], number: int) -> Sequence[str]:
    """The order of a round: each name comes first once in a while, and follows each of its neighbours."""
    first = number % len(names)
    order = [*names[first:], *names[:first]]
    return order if number // len(names) % 2 == 0 else order[::-1]


def _cpu_name() -> str:
    """What /proc/cpuinfo calls this processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The code's commit, where it runs from a checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    argv = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
