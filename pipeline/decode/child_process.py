"""A child program with two pipes and shared memory: one message, one reply, and a time limit that holds.

In:   JSON messages; seconds.
Out:  JSON replies.
Cost: two system calls per message and reply besides the waiting.
Errors: ChildLost when the program ended, or was killed because its time was over; OSError when the system has no
      process, memory or descriptor for it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from pipeline.decode.frame_memory import SharedFrameMemory
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.wire import Json

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 120.0  # imports from a cold network file system
_END_SECONDS = 5.0  # from closing its pipe to its end
_PIPE_BYTES = 1 << 16
_LOOK_SECONDS = 0.1  # between looks at one that is late because it waits for a core
# Else glibc gives a decoder's memory back after each clip or frame and takes it anew: page faults were a tenth of the
# decode time. Frames up to 4K stay in the heap, which keeps what one decoder needs. (Setting one alone is worse: that
# ends glibc's own adjusting of the other.)
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(16 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""Of decode processes, where the user has set nothing else."""


class ChildLost(Exception):  # noqa: N818 (an event, told to the caller as a DecodeError)
    """The child ended, or must end, before it replied."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text


class ChildProcess:
    """A running child program with its pipes and the memory that both sides see."""

    def __init__(self, module: str, limits: DecodeLimits) -> None:
        self.memory = SharedFrameMemory()
        self.ready = False
        self.clips_served = 0
        command = [sys.executable, "-P", "-m", module, str(self.memory.fd), json.dumps(dataclasses.asdict(limits))]
        paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self.memory.fd,),
                process_group=0,  # Ctrl-C is for the parent; a child that it ended would count against a video
                env=MALLOC_ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        except BaseException:
            self.memory.close()
            raise
        self.pid = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)  # a child that hangs does not read, either

    def wait_until_ready(self) -> None:
        """Raises ChildLost when the program does not come up."""
        self._read(_START_SECONDS)
        self.ready = True

    def exchange(self, message: Json, seconds: float) -> Json:
        """Send one message and wait for its reply; the child is killed when the time is over.

        Raises:
            ChildLost: it ended, by itself or by the limit.
        """
        return self._read(seconds, json.dumps(message).encode() + b"\n")

    def _read(self, seconds: float, line: bytes = b"") -> Json:
        limit = _TimeLimit(self.pid, seconds)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            ready = _wait(self._stdout, self._stdin if line else None, limit.left_seconds())
            if not ready and limit.left_seconds() <= 0:
                self.kill()
                raise ChildLost("timeout", f"not done after {seconds:.0f} seconds")
            if self._stdin.fileno() in ready:
                line = self._written(line)
            if self._stdout.fileno() in ready:
                reply += self._received()
        fields: Json = json.loads(reply)
        return fields

    def _written(self, line: bytes) -> bytes:
        """What is left to write."""
        try:
            return line[os.write(self._stdin.fileno(), line) :]
        except BrokenPipeError:  # reading the reply will tell
            return b""

    def _received(self) -> bytes:
        data = os.read(self._stdout.fileno(), _PIPE_BYTES)
        if not data:
            raise ChildLost("crash", f"the decode process ended with {_ending(self._end())}")
        return data

    def _end(self) -> int:
        """The return code; a program that has closed its pipe and lives on is killed."""
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End the program; whoever waits for its reply is told."""
        self._process.kill()

    def release(self) -> None:
        """End the program and give its pipes, its memory and its process entry back."""
        self.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self.memory.close()


class _TimeLimit:
    """Seconds that a process may take. What it waits for a core is not counted: encoders may hold all for minutes."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._process, self._seconds = Path(f"/proc/{pid}"), seconds
        self._began, (self._ran, self._waited) = time.monotonic(), self._statistics()

    def left_seconds(self) -> float:
        """How long to wait until the next look; not positive when they are over."""
        ran, waited = self._statistics()
        left = self._seconds + waited - self._waited - (time.monotonic() - self._began)
        # A wait is counted when it ends: who would run now may have waited all the time.
        waits = left <= 0 and 0 < ran < self._ran + self._seconds and self._would_run()
        return _LOOK_SECONDS if waits else left

    def _statistics(self) -> tuple[float, float]:
        """Seconds that the process ran and waited for a core, in its life; zeros where the system does not tell."""
        try:
            ran, waited, _ = (self._process / "schedstat").read_text().split()
        except (OSError, ValueError):
            return 0.0, 0.0
        return int(ran) / 1e9, int(waited) / 1e9

    def _would_run(self) -> bool:
        """Whether the process runs, or would if there were a core."""
        try:
            return (self._process / "stat").read_text().rpartition(") ")[2].startswith("R")
        except OSError:
            return False


def _wait(source: IO[bytes], sink: IO[bytes] | None, seconds: float) -> set[int]:
    """The descriptors that can be read or written, once one can, or none after the time."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    if sink is not None:
        poll.register(sink, select.POLLOUT)
    return {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}


def _ending(return_code: int) -> str:
    return f"exit code {return_code}" if return_code >= 0 else signal.Signals(-return_code).name
