"""The peak memory of each kind of process below this one, while something runs; and what Ray spills meanwhile.

In:   RAY_TMPDIR of the processes below.
Out:  MiB by role: driver, encode worker, decode; Ray's own processes by name; spilled files.
Cost: a look at the machine's processes ten times a second, a millisecond or so each.
Errors: none.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

_LOOK_SECONDS = 0.1
_ROLES = (
    ("driver", re.compile(r"-m jobs encode ")),
    ("decode", re.compile(r"pipeline\.decode\.child")),
    ("encode worker", re.compile(r"^ray::(EncodeActor|encode )")),
    ("decode task", re.compile(r"^ray::(decode|index|_decode|_index)")),
    ("raylet", re.compile(r"/raylet ")),
    ("gcs_server", re.compile(r"/gcs_server ")),
)


def role_of(command_line: str) -> str | None:
    """What a process does for a job; None for one that Ray keeps beside it, or that waits for work."""
    return next((role for role, pattern in _ROLES if pattern.search(command_line)), None)


class MemoryWatch:
    """Within `with`: the largest peak of each role, and the most files that Ray held as spilled objects.

    spilled_files: None where no session of Ray was seen.
    """

    def __init__(self, ray_tmpdir: Path) -> None:
        self.spilled_files: int | None = None
        self._session = ray_tmpdir / "ray" / "session_latest"
        self._peaks: dict[int, float] = {}
        self._roles: dict[int, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_mib(self) -> dict[str, float]:
        """Of the largest process of each role."""
        peaks: dict[str, float] = {}
        for pid, role in self._roles.items():
            peaks[role] = max(peaks.get(role, 0.0), self._peaks.get(pid, 0.0))
        return peaks

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        for pid in parents:
            if _descends(pid, os.getpid(), parents):
                with contextlib.suppress(OSError):  # it ended while we looked
                    self._note(pid)
        if self._session.exists():
            spilled = sum(1 for _ in self._session.glob("ray_spilled_objects*/*"))
            self.spilled_files = max(self.spilled_files or 0, spilled)

    def _note(self, pid: int) -> None:
        # A Ray worker is idle before and after what it does: its title then says nothing.
        role = role_of(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " "))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        if role is not None:
            self._roles[pid] = role
        if peak is not None:
            self._peaks[pid] = int(peak[1]) / 1024


def _parent(directory: Path) -> int:
    with contextlib.suppress(OSError):
        return int((directory / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor
