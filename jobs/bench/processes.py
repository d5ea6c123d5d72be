"""A command, watched: what it says and when, the CPU time and the peak memory of all its processes.

In:   a command line.
Out:  Watched.
Cost: a look at the machine's processes every quarter of a second, a millisecond or so each.
Errors: none; a command that runs past its time is killed, with all its processes, and has return code -9.

Processes are known by a mark in their environment, which they inherit, or by their parent, so that daemons which left
theirs count as well, and none of them outlives the command. CPU time is that of the last look at each process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_LOOK_SECONDS = 0.25
_MARK = "LATENTMILL_BENCH_RUN"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
_ERROR = re.compile(r"(latentmill: )?[\w.]*(Error|Exception): ")

Lines = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True)
class Watched:
    """A finished command.

    began: on the monotonic clock. stdout and stderr: lines, with seconds since then. peak_mib: of its largest process.
    cpu_seconds: of all processes.
    """

    returncode: int
    began: float
    seconds: float
    stdout: Lines
    stderr: Lines
    cpu_seconds: float
    peak_mib: float

    def when(self, pattern: str) -> float | None:
        """Seconds from the start to the first line that has the pattern."""
        return min(
            (seconds for seconds, line in (*self.stderr, *self.stdout) if re.search(pattern, line)), default=None
        )

    @property
    def cause(self) -> str:
        """Why it failed: the first error on stderr, of a chain its root; or else the last line there."""
        if self.returncode == -signal.SIGKILL:
            return f"killed after {self.seconds:.0f} s, for time or memory"
        said = [line.strip() for _, line in self.stderr if line.strip()]
        errors = [line for line in said if _ERROR.match(line)]
        return (errors[:1] or said[-1:] or [f"ended with {self.returncode}"])[0]


def watch(argv: Sequence[str], limit_seconds: float) -> Watched:
    """Run a command to its end, or to the limit."""
    mark = f"{_MARK}={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **_ENVIRONMENT, name: value},
    )
    began = time.monotonic()
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = _Reader(process.stdout, began), _Reader(process.stderr, began)
    processes = _Processes(mark)
    try:
        while process.poll() is None:
            processes.look()
            if time.monotonic() - began > limit_seconds:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
        seconds = time.monotonic() - began
    finally:
        processes.kill()
    said = out.lines(), err.lines()
    return Watched(process.returncode, began, seconds, *said, processes.cpu_seconds, processes.peak_mib)


class _Reader:
    """Reads a pipe in a thread, noting when each line came."""

    def __init__(self, pipe: IO[str], began: float) -> None:
        self._pipe, self._began = pipe, began
        self._lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe:
            self._lines.append((time.monotonic() - self._began, line))

    def lines(self) -> Lines:
        """All lines; every writer has ended."""
        self._thread.join()
        self._pipe.close()
        return tuple(self._lines)


class _Processes:
    """The processes that carry a mark."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._others: set[tuple[int, int]] = set()  # (pid, start) of processes without the mark
        self._pids: set[int] = set()
        self._cpu: dict[tuple[int, int], float] = {}
        self._peak: dict[tuple[int, int], float] = {}

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    @property
    def peak_mib(self) -> float:
        return max(self._peak.values(), default=0.0)

    def look(self) -> list[int]:
        """Note what they have used so far; the ids of those that live."""
        alive = []
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit() and int(directory.name) != os.getpid():
                with contextlib.suppress(OSError, ValueError, IndexError):  # it ended while we looked
                    if self._note(directory):
                        alive.append(int(directory.name))
        self._pids = set(alive)  # the id of a process that has ended may be given to anybody
        return alive

    def _note(self, directory: Path) -> bool:
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return False
        identity = (int(directory.name), int(fields[19]))
        if identity in self._others:
            return False
        parent = int(fields[1])
        if identity not in self._cpu and not self._is_marked(directory, parent):
            if parent != os.getpid():  # ours may not have called exec yet
                self._others.add(identity)
            return False
        self._pids.add(identity[0])
        self._cpu[identity] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
        peak = re.search(r"VmHWM:\s+(\d+) kB", (directory / "status").read_text())
        if peak:  # none while it ends
            self._peak[identity] = int(peak[1]) / 1024
        return True

    def _is_marked(self, directory: Path, parent: int) -> bool:
        # A process that sets its title writes over its environment, as Ray's workers do.
        return parent in self._pids or self._mark in (directory / "environ").read_bytes().split(b"\0")

    def kill(self) -> None:
        """End those that are left."""
        while left := self.look():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
