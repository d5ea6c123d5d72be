"""The way to a job's first committed unit, in seconds since this process was started: what a small job waits for.

In:   the name of each step, when it is done.
Out:  seconds per step.
Cost: nothing that counts.
Errors: OSError on a system without /proc.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

_START_FIELD = 19  # of /proc/self/stat, counted behind the command's name: clock ticks after boot (proc(5))


def process_seconds() -> float:
    """The age of this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")


class StartTimes:
    """When each step was done; a step counts the first time."""

    def __init__(self, clock: Callable[[], float] = process_seconds) -> None:
        self._clock = clock
        self._reached: dict[str, float] = {}

    def reach(self, step: str) -> None:
        """The step is done now, unless it was before."""
        self._reached.setdefault(step, self._clock())

    @property
    def total(self) -> float:
        """Seconds from the process's start to the last step."""
        return max(self._reached.values(), default=0.0)

    @property
    def steps(self) -> dict[str, float]:
        """Seconds that each step took, in order."""
        ends = [0.0, *self._reached.values()]
        return {step: end - start for step, (start, end) in zip(self._reached, pairwise(ends), strict=True)}
