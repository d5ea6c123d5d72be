"""The job's loop: keep workers alive and fed until no unit is left. Two engines stand behind it: in-process and Ray.

In:   a Controller and an Engine (start a worker, submit a unit, wait for events).
Out:  every unit committed or given up.
Cost: microseconds per event, and once a second per worker; the loop sleeps in `Engine.wait`.
Errors: JobError from the controller, or for units that were given up; Interrupted when `stop` was set.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.controller import Controller
from pipeline.errors import JobError
from pipeline.plan import Unit
from pipeline.unit_job import UnitReport

_TICK_SECONDS = 1.0
_COMING_SECONDS = 60.0  # a worker that takes longer to start may never come: too small a cluster
_GIVEN_UP_TOLD = 20


class Interrupted(JobError):  # noqa: N818 (it is no error, but ends the job like one)
    """The user asked the job to stop; the same command goes on."""

    exit_code = 130


@dataclasses.dataclass(frozen=True)
class WorkerReady:
    """A worker has its encoder loaded."""

    worker: str


@dataclasses.dataclass(frozen=True)
class UnitDone:
    """A unit is committed."""

    worker: str
    report: UnitReport


@dataclasses.dataclass(frozen=True)
class UnitFailed:
    """A unit failed and its worker lives."""

    worker: str
    unit: Unit
    error: Exception


@dataclasses.dataclass(frozen=True)
class WorkerLost:
    """A worker died; `infrastructure` when the cluster took it and nobody is to blame."""

    worker: str
    cause: str
    infrastructure: bool = False


Event = WorkerReady | UnitDone | UnitFailed | WorkerLost


class Engine(Protocol):
    """Where workers live."""

    def start_worker(self) -> str:
        """Start a worker and return its name; WorkerReady follows."""
        ...

    def submit(self, worker: str, unit: Unit) -> None:
        """Queue a unit on a ready worker."""
        ...

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        """What happened since the last call; waits for the first event at most that long."""
        ...

    def kill_worker(self, worker: str) -> None:
        """End a worker that hangs; WorkerLost follows."""
        ...

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        """Process id and node of every ready worker, for the run log."""
        ...

    def close(self) -> None:
        """Stop all workers. Units in flight are left not done."""
        ...


class _Run:
    """The state of one loop: which workers are starting, ready, empty or hungry, and since when units are out."""

    def __init__(
        self,
        controller: Controller,
        engine: Engine,
        num_workers: int,
        unit_timeout_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.controller, self.engine, self.clock = controller, engine, clock
        self.num_workers, self.unit_timeout_seconds = num_workers, unit_timeout_seconds
        self.starting: set[str] = set()
        self.coming: dict[str, float] = {}  # those starting that were started lately, and when
        self.ready: set[str] = set()
        self.empty: set[str] = set()  # those ready that hold no unit
        self.hungry: set[str] = set()  # those ready that hold units, and may hold another
        self.busy_since: dict[str, float] = {}  # a ready worker's last event, or its first lease after it was empty
        self.looked_at = clock()  # when all workers were last looked at for one that hangs

    def repair(self) -> None:
        while len(self.starting) + len(self.ready) < self.num_workers:
            worker = self.engine.start_worker()
            self.starting.add(worker)
            self.coming[worker] = self.clock()

    def feed(self) -> None:
        """Lease units: first to workers that hold none, then ahead, by turns: of the last few, no worker gets all.

        Each worker that was started lately will hold none: of the last units, as many, the longest, are kept for them.
        """
        if self.empty and self.controller.has_units():
            for worker in sorted(self.empty):
                self._feed_one(worker)
        reserved = self._num_coming()
        turn = sorted(self.hungry) if self.hungry and self.controller.has_units(reserved) else []
        while turn:
            turn = [worker for worker in turn if self._feed_one(worker, reserved)]

    def _num_coming(self) -> int:
        """How many workers are starting, and not for too long."""
        began = self.clock() - _COMING_SECONDS
        while self.coming and self.coming[oldest := next(iter(self.coming))] < began:
            del self.coming[oldest]
        return len(self.coming)

    def _feed_one(self, worker: str, reserved: int = 0) -> bool:
        """Whether the worker took a unit."""
        unit = self.controller.lease(worker, reserved)
        if unit is None:
            if not self.controller.has_room(worker):
                self.hungry.discard(worker)
            return False
        if worker in self.empty:
            self.busy_since[worker] = self.clock()
            self.empty.discard(worker)
            self.hungry.add(worker)
        self.engine.submit(worker, unit)
        return True

    def handle(self, event: Event) -> None:
        worker = event.worker
        self.busy_since[worker] = self.clock()
        self.coming.pop(worker, None)
        if isinstance(event, WorkerReady):
            self.starting.discard(worker)
            self.ready.add(worker)
            self.empty.add(worker)
        elif isinstance(event, UnitDone):
            self.controller.done(worker, event.report)
            self._has_room(worker)
        elif isinstance(event, UnitFailed):
            self.controller.failed(worker, event.unit, event.error)
            self._has_room(worker)
        else:
            for workers in (self.starting, self.ready, self.empty, self.hungry):
                workers.discard(worker)
            del self.busy_since[worker]
            self.controller.lost(worker, event.cause, event.infrastructure)

    def _has_room(self, worker: str) -> None:
        """A worker gave a unit back."""
        if self.controller.leases_of(worker):
            self.hungry.add(worker)
        else:
            self.hungry.discard(worker)
            self.empty.add(worker)

    def kill_hung(self) -> None:
        """Look at all workers, once a second at most."""
        now = self.clock()
        if now - self.looked_at < _TICK_SECONDS:
            return
        self.looked_at = now
        for worker in sorted(worker for worker in self.ready if self._hangs(worker, now)):
            self.busy_since[worker] = now
            self.engine.kill_worker(worker)

    def _hangs(self, worker: str, now: float) -> bool:
        """Whether a worker is silent for longer than its units may take, which it may encode by turns."""
        allowed_seconds = self.unit_timeout_seconds * len(self.controller.leases_of(worker))
        return 0 < allowed_seconds < now - self.busy_since[worker]


def run(
    controller: Controller,
    engine: Engine,
    *,
    num_workers: int,
    unit_timeout_seconds: float,
    stop: threading.Event,
    on_tick: Callable[[Sequence[Event]], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Drive the job to its end.

    Args:
        controller: knows the units that are left.
        engine: where workers live; the caller closes it.
        num_workers: how many workers to keep alive.
        unit_timeout_seconds: a worker that holds n units and reports nothing for n times as long is killed and
            replaced: long clips are encoded by turns, and several units end together.
        stop: ends the job between two events.
        on_tick: told, at least once a second, what has happened since.
        clock: seconds that never go back.

    Raises:
        Interrupted: `stop` was set. JobError: the job cannot go on, or units were given up.
    """
    state = _Run(controller, engine, num_workers, unit_timeout_seconds, clock)
    while not controller.finished() and len(controller.given_up) < controller.policy.max_given_up:
        if stop.is_set():
            raise Interrupted("stopped; what is committed stays, the same command goes on")
        state.repair()
        state.feed()
        events = engine.wait(_TICK_SECONDS)
        try:
            for event in events:
                state.handle(event)
        finally:
            on_tick(events)
        state.kill_hung()
    _require_all(controller.given_up)
    controller.judge()


def _require_all(given_up: Mapping[Unit, str]) -> None:
    if not given_up:
        return
    told = [f"{unit.name}: {cause}" for unit, cause in sorted(given_up.items())[:_GIVEN_UP_TOLD]]
    if len(given_up) > len(told):
        told.append(f"and {len(given_up) - len(told)} more")
    lines = "\n  ".join(told)
    raise JobError(f"{len(given_up)} units were given up; the same command tries them again:\n  {lines}")
