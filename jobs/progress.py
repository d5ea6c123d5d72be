"""What a running job says: a line now and then, and a run log that holds what the store itself must not.

In:   the controller's Progress, and the events of its workers.
Out:  lines on stderr; `runs/<start>-<id>.json` in the store: host, device, versions, flags, rates, failures.
Cost: nothing that counts.
Errors: none of its own.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import platform
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jobs.flags import EngineFlags
from jobs.start_times import StartTimes
from pipeline.controller import Controller, Progress
from pipeline.engine import Event, UnitDone, WorkerLost, WorkerReady
from pipeline.errors import LatentmillError
from pipeline.price import format_bytes
from pipeline.storage import Storage
from pipeline.store import library_versions
from pipeline.unit_job import UnitReport

_PATIENCE_SECONDS = 60.0
_IDLE_DECODERS = 0.6  # share of the decode processes that are at work, under which it is not cores that are short
_BUSY_ENOUGH = 0.05  # an encoder that waits less than this share of its time is the limit itself
_BUSY_DECODERS = 0.9  # share of the decode processes that are at work, over which they are a limit as well


class Reporter:
    """Prints a line every `progress_seconds`, and writes the run log."""

    def __init__(
        self,
        storage: Storage,
        flags: EngineFlags,
        device: str,
        controller: Controller,
        clips_left: int,
        units_left: int,
        start_times: StartTimes,
        *,
        encoder_sleeps: bool = False,
    ) -> None:
        self._storage, self._flags, self._device, self._controller = storage, flags, device, controller
        self._has_own_device = encoder_sleeps or device != "cpu"
        self._start_times = start_times
        self._clips_left, self._units_left = clips_left, units_left
        self._start = dt.datetime.now(dt.UTC)
        self._started = self._printed = self._none_ready_since = time.monotonic()
        self._first_unit: UnitReport | None = None
        self._first_unit_seconds: float | None = None
        self._ready: set[str] = set()
        self._most_ready = 0
        self._name = f"runs/{self._start:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}.json"

    def tick(self, events: Sequence[Event]) -> None:
        """Called by the job's loop with what has happened since."""
        now, progress = time.monotonic(), self._controller.progress
        for event in events:
            if isinstance(event, WorkerReady):
                self._ready.add(event.worker)
                self._most_ready = max(self._most_ready, len(self._ready))
                self._start_times.reach("worker")
                _say(f"worker {event.worker} is ready after {format_seconds(now - self._started)}")
            elif isinstance(event, WorkerLost):
                self._ready.discard(event.worker)
                _say(f"worker {event.worker} died, another takes its units: {event.cause}")
            elif isinstance(event, UnitDone) and self._first_unit is None:
                self._first_unit, self._first_unit_seconds = event.report, now - self._started
                self._start_times.reach("first unit")
        if self._ready:
            self._none_ready_since = now
        elif now - self._none_ready_since >= _PATIENCE_SECONDS:
            self._none_ready_since = now
            _say("no worker is ready: does the cluster have the CPUs and GPUs for one? (`ray status`)")
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
        """Print the rates of the whole run and where its time went, and write the run log."""
        seconds = time.monotonic() - self._started
        progress = self._controller.progress
        _say(
            f"{outcome}: {progress.units} units, {progress.clips} clips in {format_seconds(seconds)} "
            f"({progress.clips / seconds:.1f} clips/s, {progress.frames / seconds:.0f} frames/s), "
            f"samples of {format_bytes(progress.sample_bytes)}, wrote {format_bytes(progress.bytes_written)}"
        )
        if self._first_unit is not None:
            _say(first_unit_line(self._start_times, self._first_unit))
            for line in time_lines(progress, has_own_device=self._has_own_device):
                _say(line)
            _say(advice(progress, self._most_ready, self._decode_processes(places)))
        try:
            self._storage.put(self._name, json.dumps(self._log(outcome, seconds, places), indent=2).encode())
        except LatentmillError as error:  # it must not hide how the job ended
            _say(f"no run log: {error}")

    def _decode_processes(self, places: dict[str, Any]) -> int:
        """Those that had enough to do, were it not for the flags; 0 when nobody knows."""
        if self._units_left < 2 * self._most_ready * self._flags.units_in_flight:
            return 0  # They were idle at the job's start and end, which is most of it.
        if self._flags.local:
            return self._flags.decode_processes
        return sum(place["decode_processes"] or 0 for place in places.values())

    def _log(self, outcome: str, seconds: float, places: dict[str, Any]) -> dict[str, Any]:
        progress = self._controller.progress
        return {
            "started": self._start.isoformat(),
            "seconds": seconds,
            "first_unit_seconds": self._first_unit_seconds,
            "start_seconds": self._start_times.steps,
            "outcome": outcome,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": self._device,
            "versions": library_versions(),
            "flags": dataclasses.asdict(self._flags),
            "workers": places,
            "progress": {**vars(progress), "failed": dict(progress.failed), "busy_share": progress.busy_share},
            "given_up": {unit.name: cause for unit, cause in self._controller.given_up.items()},
        }


def first_unit_line(start_times: StartTimes, report: UnitReport) -> str:
    """How long the first committed unit took, from the start of the process. Pure."""
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in start_times.steps.items())
    waited = report.start_seconds + report.starved_seconds
    return (
        f"first unit committed {format_seconds(start_times.total)} after the start: {steps} (of it waiting for frames "
        f"{waited:.1f}, encode {report.encode_seconds:.1f}, write {report.write_seconds:.1f})"
    )


def time_lines(progress: Progress, *, has_own_device: bool) -> tuple[str, str]:
    """Where the time went: the encoders' span by what they did, and the seconds of every stage. Pure.

    has_own_device: whether a call takes as long as it would with nothing else running. On cores that decode as well it
        takes longer, and nobody knows how long the bare encoder's would.
    """
    busy, span = progress.busy_share, progress.span_seconds or 1.0
    stages = {
        "wait for bytes or a core": progress.read_seconds,
        "decode": progress.decode_seconds,
        "wait for the first frames": progress.start_seconds,
        "wait for input": progress.starved_seconds,
        "batch": progress.batch_seconds,
        "encode": progress.encode_seconds,
        "rows": progress.rows_seconds + progress.copy_seconds,
        "wait for output": progress.blocked_seconds,
        "write and commit": progress.write_seconds,
    }
    whole = "the bare encoder's speed" if has_own_device else "what it would reach on these cores if it never waited"
    shares = (
        f"encoder busy {busy:.1%} of its span, so at {busy:.2f} of {whole}: starved for input "
        f"{progress.starved_seconds / span:.1%}, blocked on output {progress.blocked_seconds / span:.1%}, "
        f"copying {progress.copy_seconds / span:.1%}"
    )
    return shares, "stages: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())


def advice(progress: Progress, workers: int, processes: int = 0) -> str:
    """What would make this job faster, in one line. Pure.

    processes: that decode beside the workers; 0 when nobody knows how many.
    """
    if not progress.encode_seconds:
        return "nothing was encoded, so nothing is known of its speed; `latentmill status` says what failed"
    idle = 1 - progress.busy_share
    at_work = workers * (progress.decode_seconds + progress.read_seconds) / progress.span_seconds
    if idle < _BUSY_ENOUGH:
        busy = f"the encoders were busy {progress.busy_share:.0%} of the time"
        if processes and at_work > _BUSY_DECODERS * processes:
            return f"balanced: {busy}, and of {processes} decode processes {at_work:.1f}; more of both would help"
        return f"encode-bound: {busy}; more of them would help"
    waited = f"the encoders waited {idle:.0%} of the time, most of it"
    most = max(progress.starved_seconds, progress.blocked_seconds, progress.copy_seconds)
    if most == progress.blocked_seconds:
        return f"write-bound: {waited} for the store to take finished units"
    if most == progress.copy_seconds:
        return f"copy-bound: {waited} for their own thread to move frames and rows; more of them would share that"
    if progress.read_seconds > progress.decode_seconds:
        return f"read-bound: {waited} for frames, while decoding waited for bytes, or for cores that others used"
    # What decoding costs, over what encoding alone would take, less the cores that it had.
    wanted, had = (progress.decode_seconds / seconds for seconds in (progress.encode_seconds, progress.span_seconds))
    if at_work < _IDLE_DECODERS * processes:
        return (
            f"feed-bound: {waited} for frames, while of {processes} decode processes {at_work:.1f} were at work; a "
            "larger --window-mb or --units-in-flight gives them more to do at a time"
        )
    more = max(1, math.ceil(workers * (wanted - had)))
    cores = "core" if more == 1 else "cores"
    return f"decode-bound: {waited} for frames; about {more} more decode {cores} would keep them busy"


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
