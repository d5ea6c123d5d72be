"""How many cores this process may use, which in a container are fewer than the host has.

In:   the scheduler's affinity and, where there is one, cgroup v2's cpu.max.
Out:  a number, at least 1.
Cost: a system call and a small file.
Errors: none.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Those of the affinity mask, as far as the quota lets them run all the time."""
    quota = ""
    with contextlib.suppress(OSError):
        quota = _QUOTA.read_text()
    return within_quota(len(os.sched_getaffinity(0)), quota)


def within_quota(cores: int, quota: str) -> int:
    """`quota`: "max 100000", "150000 100000" (microseconds, of a period), or nothing. Pure."""
    limit, _, period = quota.partition(" ")
    return max(1, min(cores, int(limit) // int(period))) if limit.isdigit() else cores
