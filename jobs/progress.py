"""What a running job says: a line now and then, and a run log that holds what the store itself must not.

In:   the controller's Progress.
Out:  lines on stderr; `runs/<start>-<id>.json` in the store: host, versions, flags, rates, failures.
Cost: nothing that counts.
Errors: none of its own.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import platform
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jobs.flags import EngineFlags
from pipeline.controller import Controller, Progress
from pipeline.engine import Event, WorkerLost, WorkerReady
from pipeline.price import format_bytes
from pipeline.storage import Storage
from pipeline.store import library_versions

_PATIENCE_SECONDS = 60.0
_BUSY_ENOUGH = 0.05  # an encoder that waits less than this share of its time is the limit itself


class Reporter:
    """Prints a line every `progress_seconds`, and writes the run log."""

    def __init__(
        self, storage: Storage, flags: EngineFlags, controller: Controller, clips_left: int, units_left: int
    ) -> None:
        self._storage, self._flags, self._controller = storage, flags, controller
        self._clips_left, self._units_left = clips_left, units_left
        self._start = dt.datetime.now(dt.UTC)
        self._started = self._printed = time.monotonic()
        self._first_unit_seconds: float | None = None
        self._ready = False
        self._name = f"runs/{self._start:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}.json"

    def tick(self, events: Sequence[Event]) -> None:
        """Called by the job's loop with what has happened since."""
        now, progress = time.monotonic(), self._controller.progress
        for event in events:
            if isinstance(event, WorkerReady):
                self._ready = True
                _say(f"worker {event.worker} is ready after {format_seconds(now - self._started)}")
            elif isinstance(event, WorkerLost):
                _say(f"worker {event.worker} died, another takes its units: {event.cause}")
        if self._first_unit_seconds is None and progress.units:
            self._first_unit_seconds = now - self._started
        if not self._ready and now - self._printed >= _PATIENCE_SECONDS:
            self._printed = now
            _say("no worker is ready yet: does the cluster have the CPUs and GPUs for one? (`ray status`)")
        if now - self._printed >= self._flags.progress_seconds and progress.units:
            self._printed = now
            _say(self._line(progress, now - self._started))

    def _line(self, progress: Progress, seconds: float) -> str:
        rate = progress.clips / seconds
        eta = format_seconds((self._clips_left - progress.clips) / rate) if rate else "unknown"
        return (
            f"{progress.units} of {self._units_left} units, {progress.clips} of {self._clips_left} clips, "
            f"{rate:.1f} clips/s, {progress.frames / seconds:.0f} frames/s, encoder busy {progress.busy_share:.0%}, "
            f"failed {progress.failed.total()}, ETA {eta}"
        )

    def finish(self, outcome: str, places: dict[str, Any]) -> None:
        """Print the rates of the whole run and write the run log."""
        seconds = time.monotonic() - self._started
        progress = self._controller.progress
        _say(
            f"{outcome}: {progress.units} units, {progress.clips} clips in {format_seconds(seconds)} "
            f"({progress.clips / seconds:.1f} clips/s, {progress.frames / seconds:.0f} frames/s), "
            f"encoder busy {progress.busy_share:.0%}, starved {progress.starved_seconds:.1f} s, "
            f"blocked {progress.blocked_seconds:.1f} s, read {format_bytes(progress.bytes_read)}, "
            f"wrote {format_bytes(progress.bytes_written)}"
        )
        if progress.units:
            _say(advice(progress))
        self._storage.put(self._name, json.dumps(self._log(outcome, seconds, places), indent=2).encode())

    def _log(self, outcome: str, seconds: float, places: dict[str, Any]) -> dict[str, Any]:
        progress = {**vars(self._controller.progress), "failed": dict(self._controller.progress.failed)}
        return {
            "started": self._start.isoformat(),
            "seconds": seconds,
            "first_unit_seconds": self._first_unit_seconds,
            "outcome": outcome,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": library_versions(),
            "flags": dataclasses.asdict(self._flags),
            "workers": places,
            "progress": progress,
            "given_up": {unit.name: cause for unit, cause in self._controller.given_up.items()},
        }


def advice(progress: Progress) -> str:
    """What would make this job faster, in one line. Pure."""
    idle = 1 - progress.busy_share
    if idle < _BUSY_ENOUGH:
        return f"encode-bound: the encoders were busy {progress.busy_share:.0%} of the time; more of them would help"
    if progress.starved_seconds >= progress.blocked_seconds:
        more = 1 / max(progress.busy_share, 0.01)
        return (
            f"decode-bound: the encoders waited {idle:.0%} of the time, most of it for frames; about {more:.1f} "
            "times the decode cores would keep them busy"
        )
    return f"write-bound: the encoders waited {idle:.0%} of the time, most of it for the store to take finished units"


def _say(text: str) -> None:
    print(f"encode: {text}", file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """As in 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
