"""Who encodes what next, and what follows when something breaks. Pure: no Ray, no threads, no clock of its own.

In:   the units left, and events: done, failed, lost.
Out:  leases; a decision to go on or a JobError to stop with; Progress.
Cost: microseconds per event; memory for what is in flight, reserved or broke before, not for all units.
Errors: FailureLimitError when too many clips failed; JobError when units or workers cannot be saved.

Blame. A lost worker gives its units back; each is suspected once more, unless the loss was the cluster's (preemption, a
lost node). From its second suspicion on a unit runs alone on a worker, so that the next death proves it. After
`_DEATHS_ALONE` deaths alone, or `_UNIT_TRIES` failures of its own, the unit is given up and the job ends with an error.
A unit that failed goes to another worker, and a worker on which one unit after another fails, on a node that has lost
its disk for instance, gets no more than one for each that the others commit: it alone uses up no unit's tries.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from pipeline.errors import FailureLimitError, JobError
from pipeline.plan import Unit
from pipeline.unit_job import UnitReport

_ALONE_FROM = 2
_DEATHS_ALONE = 2
_UNIT_TRIES = 3
_FAILURES_IN_A_ROW = 3
_SHUNNED_AT_MOST = 64  # units that are looked past for one that a worker has not failed
_FAILURES_TOLD = 20
_SECONDS = ("encode", "copy", "batch", "rows", "start", "starved", "blocked", "write", "decode", "read")
_SUMMED = ("frames", "sample_bytes", "bytes_written", *(f"{stage}_seconds" for stage in _SECONDS))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Bounds of a job. The first two are flags."""

    units_in_flight: int = 3
    """Units leased to a worker at a time: one encoding, one decoding ahead, one being written."""
    max_failed_share: float = 0.2
    """Share of the clips (and of the samples at planning) that may fail before the job stops."""
    min_clips_judged: int = 50
    """The share is judged while the job runs from this many clips on, and always at its end."""
    max_lost_workers: int = 10
    """Encode workers that may die, in all, before the job stops."""
    max_given_up: int = 20
    """Units that are given up before the job stops: with so many it is no unit's fault."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share lies in 0..1, got {self.max_failed_share}")
        if self.units_in_flight < 1:
            raise ValueError(f"units_in_flight must be at least 1, got {self.units_in_flight}")


@dataclasses.dataclass
class Progress:
    """Sums over the units committed in this run."""

    units: int = 0
    written: int = 0
    failed: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    frames: int = 0
    sample_bytes: int = 0
    bytes_written: int = 0
    encode_seconds: float = 0.0
    copy_seconds: float = 0.0
    batch_seconds: float = 0.0
    rows_seconds: float = 0.0
    start_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0
    write_seconds: float = 0.0
    decode_seconds: float = 0.0
    read_seconds: float = 0.0

    @property
    def clips(self) -> int:
        return self.written + self.failed.total()

    @property
    def span_seconds(self) -> float:
        """From their first frames on, what encoders encoded, copied, starved for input or were blocked on output."""
        return self.encode_seconds + self.copy_seconds + self.starved_seconds + self.blocked_seconds

    @property
    def busy_share(self) -> float:
        """Encode time over the encoders' span: their speed, as a share of what they would reach if they never waited.

        That is the bare encoders' speed where each has its device for itself; on cores that decode as well, calls take
        longer than a bare encoder's.
        """
        return self.encode_seconds / self.span_seconds if self.span_seconds else 0.0

    def add(self, report: UnitReport) -> None:
        self.units += 1
        self.written += report.written
        self.failed.update(report.failed)
        self.failures += report.failures[: _FAILURES_TOLD - len(self.failures)]
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(report, name))


class Controller:
    """Leases units to workers and keeps score.

    `clips_before` and those of them that failed, by reason, are of the units committed before this run: a store is
    judged whole, however many runs made it.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        policy: Policy,
        clips_before: int = 0,
        failed_before: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.policy = policy
        self._clips_before, self._failed_before = clips_before, Counter(failed_before)
        self.progress = Progress()
        self.given_up: dict[Unit, str] = {}
        self._fresh: Iterator[Unit] = iter(units)
        self._waiting: deque[Unit] = deque()  # those given back, and the first of the fresh ones
        self._suspects: deque[Unit] = deque()  # given back, and to run alone
        self._leases: dict[str, list[Unit]] = {}  # of the workers that hold any
        self._in_flight = 0
        self._suspicion: Counter[Unit] = Counter()  # of units that are not done
        self._tries: Counter[Unit] = Counter()  # likewise
        self._failed_on: dict[Unit, set[str]] = {}  # likewise: the workers
        self._workers: set[str] = set()  # that have asked for a unit and are not lost
        self._in_a_row: dict[str, tuple[int, int]] = {}  # by worker: failures since its last commit, all commits then
        self._lost_workers = 0

    def lease(self, worker: str, reserved: int = 0) -> Unit | None:
        """The next unit for a worker, or None when it has enough or nothing is left for it.

        Args:
            worker: its name.
            reserved: how many workers are soon to come. Once all that waits has room with them, a worker that holds
                units leaves each of them one, from the first on.
        """
        self._workers.add(worker)
        if not self.has_room(worker) or self._rests(worker):
            return None
        unit = self._next_ahead(worker, reserved) if worker in self._leases else self._next(worker)
        if unit is not None:
            self._leases.setdefault(worker, []).append(unit)
            self._in_flight += 1
        return unit

    def has_room(self, worker: str) -> bool:
        """Whether a worker may hold another unit."""
        held = self._leases.get(worker, ())
        return len(held) < self.policy.units_in_flight and not any(self._is_alone(unit) for unit in held)

    def _rests(self, worker: str) -> bool:
        """Whether a worker that fails unit after unit has to wait until another one commits one."""
        failures, commits = self._in_a_row.get(worker, (0, 0))
        others_hold = len(self._leases) > (worker in self._leases)
        return failures >= _FAILURES_IN_A_ROW and commits == self.progress.units and others_hold

    def _next(self, worker: str) -> Unit | None:
        return self._suspects.popleft() if self._suspects else self._take(worker, 0)

    def _take(self, worker: str, first: int) -> Unit | None:
        """Of those that wait, from the `first` on: one that did not fail on this worker, or did on all others."""
        place = first
        while place < first + _SHUNNED_AT_MOST and self.has_units(place):
            failed_on = self._failed_on.get(self._waiting[place], set())
            if worker not in failed_on or self._workers <= failed_on:
                unit = self._waiting[place]
                del self._waiting[place]
                return unit
            place += 1
        return None

    def _next_ahead(self, worker: str, reserved: int) -> Unit | None:
        if self._suspects:
            return None  # A suspect waits for this worker to be empty.
        if self.has_units(reserved * self.policy.units_in_flight):
            reserved = 0  # There is enough for all who may come.
        return self._take(worker, reserved)

    def _is_alone(self, unit: Unit) -> bool:
        return self._suspicion[unit] >= _ALONE_FROM

    def leases_of(self, worker: str) -> tuple[Unit, ...]:
        """The units a worker holds."""
        return tuple(self._leases.get(worker, ()))

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def has_units(self, more_than: int = 0) -> bool:
        """Whether more than that many units are left to lease."""
        missing = more_than + 1 - len(self._suspects) - len(self._waiting)
        if missing > 0:
            self._waiting.extend(itertools.islice(self._fresh, missing))
        return len(self._suspects) + len(self._waiting) > more_than

    def finished(self) -> bool:
        """Whether nothing is leased and nothing is left to lease."""
        return not self.has_units() and not self._in_flight

    def done(self, worker: str, report: UnitReport) -> None:
        """A unit is committed.

        Raises:
            FailureLimitError: too many clips have failed by now.
        """
        self._release(worker, report.unit)
        self._suspicion.pop(report.unit, None)
        self._forget_failures(report.unit)
        self._in_a_row.pop(worker, None)
        self.progress.add(report)
        if self._clips_before + self.progress.clips >= self.policy.min_clips_judged:
            self.judge()

    def failed(self, worker: str, unit: Unit, error: Exception) -> None:
        """A unit failed for a cause that may pass; it is tried again, a bounded number of times.

        Raises:
            JobError: at once, when the error says that no retry can help.
        """
        self._release(worker, unit)
        if isinstance(error, JobError):
            raise error
        self._in_a_row[worker] = (self._in_a_row.get(worker, (0, 0))[0] + 1, self.progress.units)
        self._tries[unit] += 1
        self._failed_on.setdefault(unit, set()).add(worker)
        if self._tries[unit] >= _UNIT_TRIES:
            self.given_up[unit] = f"failed {_UNIT_TRIES} times, at last: {error}"
            self._forget_failures(unit)
        else:
            self._take_back([unit])

    def _forget_failures(self, unit: Unit) -> None:
        self._tries.pop(unit, None)
        self._failed_on.pop(unit, None)

    def lost(self, worker: str, cause: str, infrastructure: bool) -> None:
        """A worker died with its leases.

        Raises:
            JobError: too many workers died.
        """
        units = self._leases.pop(worker, [])
        self._workers.discard(worker)
        self._in_a_row.pop(worker, None)
        self._in_flight -= len(units)
        if infrastructure:
            self._take_back(units)
            return
        self._suspect(units, cause)
        self._lost_workers += 1
        if self._lost_workers > self.policy.max_lost_workers:
            raise JobError(
                f"{self._lost_workers} encode workers died, at most {self.policy.max_lost_workers} may; the last one "
                f"with: {cause}. Mend the cause; the same command goes on."
            )

    def _suspect(self, units: Sequence[Unit], cause: str) -> None:
        self._suspicion.update(units)
        for unit in units:
            if self._suspicion[unit] >= _ALONE_FROM + _DEATHS_ALONE:
                self.given_up[unit] = f"killed its worker {_DEATHS_ALONE} times while alone on it: {cause}"
        self._take_back([unit for unit in units if unit not in self.given_up])

    def _take_back(self, units: Sequence[Unit]) -> None:
        """Units that broke or were lost go first: what is left to do with them is not known."""
        self._suspects.extend(unit for unit in units if self._is_alone(unit))
        self._waiting.extendleft(unit for unit in reversed(units) if not self._is_alone(unit))

    def _release(self, worker: str, unit: Unit) -> None:
        held = self._leases.get(worker, [])
        if unit not in held:
            raise RuntimeError(f"{worker} reports {unit.name}, which is not leased to it")
        held.remove(unit)
        if not held:
            del self._leases[worker]
        self._in_flight -= 1

    def judge(self) -> None:
        """Compare the store's failures with what the job allows.

        Raises:
            FailureLimitError: the share is above the limit.
        """
        judge_failures(
            self._clips_before + self.progress.clips,
            self._failed_before + self.progress.failed,
            self.policy.max_failed_share,
        )


def judge_failures(clips: int, failed: Mapping[str, int], max_failed_share: float) -> None:
    """Compare a store's failed clips, by reason, with the share that may fail.

    Raises:
        FailureLimitError: more failed.
    """
    total = sum(failed.values())
    if clips and total / clips > max_failed_share:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(failed).most_common(5))
        raise FailureLimitError(
            f"{total} of {clips} clips failed ({total / clips:.0%}), more than --max-failed-share "
            f"{max_failed_share:g} allows: {reasons}. What is committed stays; see `latentmill status`."
        )
