"""The job's loop with an engine made of a list and a clock that only `wait` moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.controller import Controller, Policy
from pipeline.engine import Event, Interrupted, UnitDone, UnitFailed, WorkerLost, WorkerReady, run
from pipeline.errors import FailureLimitError, JobError, UnitError
from pipeline.plan import Unit
from tests.pipeline.test_controller import report, units


class FakeEngine:
    """Workers that finish a unit per `wait`; `fate` may say otherwise. `wait` moves the clock."""

    def __init__(self, fate: Callable[[str, Unit], Event | None] | None = None) -> None:
        self.fate = fate or (lambda worker, unit: UnitDone(worker, report(unit)))
        self.now, self.waits = 0.0, 0
        self.started: list[str] = []
        self.killed: list[tuple[float, str]] = []
        self.queues: dict[str, list[Unit]] = {}
        self.events: list[Event] = []
        self.seconds_per_wait = 1.0

    def clock(self) -> float:
        return self.now

    def start_worker(self) -> str:
        name = f"w{len(self.started)}"
        self.started.append(name)
        self.events.append(WorkerReady(name))
        return name

    def submit(self, worker: str, unit: Unit) -> None:
        self.queues.setdefault(worker, []).append(unit)

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        self.waits += 1
        assert self.waits < 10_000, "a busy loop"
        self.now += self.seconds_per_wait
        events, self.events = self.events, []
        for worker, queue in list(self.queues.items()):
            if queue and (event := self.fate(worker, queue[0])) is not None:
                queue.pop(0)
                events.append(event)
                if isinstance(event, WorkerLost):
                    del self.queues[worker]
        return events

    def kill_worker(self, worker: str) -> None:
        self.killed.append((self.now, worker))
        self.queues.pop(worker, None)
        self.events.append(WorkerLost(worker, "killed: it hangs"))

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        return {}

    def close(self) -> None:
        raise AssertionError("the caller closes the engine")


def drive(
    engine: FakeEngine,
    controller: Controller,
    num_workers: int = 2,
    timeout_seconds: float = 1e9,
    told: list[Event] | None = None,
) -> list[int]:
    """The units that were done at each tick; `told` takes the events of all."""
    ticks: list[int] = []

    def on_tick(events: Sequence[Event]) -> None:
        ticks.append(controller.progress.units)
        if told is not None:
            told.extend(events)

    run(
        controller,
        engine,
        num_workers=num_workers,
        unit_timeout_seconds=timeout_seconds,
        stop=threading.Event(),
        on_tick=on_tick,
        clock=engine.clock,
    )
    return ticks


def test_all_units_are_done_by_as_many_workers_as_asked_for() -> None:
    engine, controller = FakeEngine(), Controller(units(20), Policy())
    ticks = drive(engine, controller, 3)
    assert controller.progress.units == 20
    assert engine.started == ["w0", "w1", "w2"]
    assert ticks[-1] == 20


def test_no_units_start_no_worker() -> None:
    engine = FakeEngine()
    drive(engine, Controller([], Policy()), 0)
    drive(engine, Controller([], Policy()), 2)
    assert engine.started == []
    assert engine.waits == 0


def test_a_lost_worker_is_replaced_and_its_units_are_done() -> None:
    def fate(worker: str, unit: Unit) -> Event:
        return WorkerLost(worker, "signal 11") if worker in ("w0", "w1") else UnitDone(worker, report(unit))

    engine, controller = FakeEngine(fate), Controller(units(9), Policy())
    drive(engine, controller, 2)
    assert engine.started == ["w0", "w1", "w2", "w3"]
    assert controller.progress.units == 9


def test_a_hung_worker_is_killed_after_the_timeout_and_replaced() -> None:
    def fate(worker: str, unit: Unit) -> Event | None:
        return None if worker == "w0" else UnitDone(worker, report(unit))

    engine, controller = FakeEngine(fate), Controller(units(5), Policy(units_in_flight=2))
    drive(engine, controller, 1, timeout_seconds=30)
    assert engine.killed == [(62.0, "w0")]  # ready at 1 with two units, over 2 x 30 seconds later
    assert engine.started == ["w0", "w1"]
    assert controller.progress.units == 5


def test_a_worker_that_is_slow_to_die_is_not_killed_at_every_turn() -> None:
    class Slow(FakeEngine):
        def kill_worker(self, worker: str) -> None:
            self.killed.append((self.now, worker))

    def fate(worker: str, unit: Unit) -> Event | None:
        if worker == "w0":
            return WorkerLost(worker, "killed at last") if engine.now > 50 else None
        return UnitDone(worker, report(unit))

    engine = Slow(fate)
    drive(engine, Controller(units(1), Policy()), 1, timeout_seconds=30)
    assert engine.killed == [(32.0, "w0")]


def test_units_that_are_encoded_by_turns_have_their_time_each() -> None:
    """Three films of 25 seconds alone, by turns: all end after 75. Only the one that hangs alone for 30 is killed."""

    def fate(worker: str, unit: Unit) -> Event | None:
        hangs = unit.number == 3 and worker == "w0"
        return UnitDone(worker, report(unit)) if engine.now > 75 and not hangs else None

    engine = FakeEngine(fate)
    drive(engine, Controller(units(4), Policy(units_in_flight=3)), 1, timeout_seconds=30)
    last_event = 78.0  # one unit a turn, from 76 on
    assert engine.killed == [(last_event + 31, "w0")]


def test_all_of_many_workers_that_hang_are_killed_in_order() -> None:
    def fate(worker: str, unit: Unit) -> Event | None:
        return None if int(worker[1:]) < 3 else UnitDone(worker, report(unit))

    engine, controller = FakeEngine(fate), Controller(units(9), Policy(units_in_flight=1))
    engine.seconds_per_wait = 0.25
    drive(engine, controller, 3, timeout_seconds=30)
    assert [name for _, name in engine.killed] == ["w0", "w1", "w2"]
    assert all(30 < now <= 31.5 for now, _ in engine.killed)
    assert controller.progress.units == 9


def test_a_worker_that_reports_in_time_is_not_killed() -> None:
    engine, controller = FakeEngine(), Controller(units(50), Policy(units_in_flight=3))
    drive(engine, controller, 1, timeout_seconds=2)
    assert engine.killed == []


def test_an_idle_worker_that_gets_a_unit_late_has_its_full_time() -> None:
    """w1 has nothing for 100 seconds, then the units of w0, which is killed."""

    def fate(worker: str, unit: Unit) -> Event | None:
        if worker == "w0":
            return None if engine.now < 100 else WorkerLost(worker, "preempted", infrastructure=True)
        return UnitDone(worker, report(unit)) if engine.now > 120 else None

    engine = FakeEngine(fate)
    controller = Controller(units(1), Policy())
    drive(engine, controller, 2, timeout_seconds=100.5)
    assert engine.killed == []
    assert controller.progress.units == 1


def test_stop_interrupts() -> None:
    engine, stop = FakeEngine(), threading.Event()
    controller = Controller(units(100), Policy(units_in_flight=1))

    def on_tick(_: Sequence[Event]) -> None:
        if controller.progress.units >= 3:
            stop.set()

    with pytest.raises(Interrupted, match="the same command goes on") as caught:
        run(
            controller,
            engine,
            num_workers=1,
            unit_timeout_seconds=60,
            stop=stop,
            on_tick=on_tick,
            clock=engine.clock,
        )
    assert caught.value.exit_code == 130
    assert controller.progress.units == 3


def test_events_that_end_the_job_are_told_before() -> None:
    told: list[Event] = []
    controller = Controller(units(3), Policy(max_failed_share=0.1, min_clips_judged=1))
    engine = FakeEngine(lambda worker, unit: UnitDone(worker, report(unit, 0, crash=4)))
    with pytest.raises(FailureLimitError):
        drive(engine, controller, 1, told=told)
    assert [type(event) for event in told] == [WorkerReady, UnitDone]


def test_units_that_were_given_up_are_named_when_all_others_are_done() -> None:
    def fate(worker: str, unit: Unit) -> Event:
        if unit.number in (3, 5):
            return UnitFailed(worker, unit, UnitError("no route to host"))
        return UnitDone(worker, report(unit))

    controller = Controller(units(8), Policy())
    with pytest.raises(JobError, match=r"2 units were given up.*\n  9x32x32/000003: failed 3 times.*\n.*/000005"):
        drive(FakeEngine(fate), controller)
    assert controller.progress.units == 6


def test_the_list_of_units_that_were_given_up_is_bounded() -> None:
    controller = Controller(units(500), Policy(max_given_up=500))
    with pytest.raises(JobError) as caught:
        drive(FakeEngine(lambda worker, unit: UnitFailed(worker, unit, UnitError("no"))), controller)
    assert "and 480 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


def test_a_job_in_which_everything_fails_stops_early() -> None:
    controller = Controller(units(500), Policy(max_given_up=4))
    engine = FakeEngine(lambda worker, unit: UnitFailed(worker, unit, UnitError("no")))
    with pytest.raises(JobError, match="4 units were given up"):
        drive(engine, controller)
    assert engine.waits < 40


def test_a_sick_worker_uses_up_no_unit() -> None:
    """Whatever it is given fails at once, where the other takes ten turns for a unit."""
    turns: list[Unit] = []

    def fate(worker: str, unit: Unit) -> Event | None:
        if worker == "w0":
            return UnitFailed(worker, unit, UnitError("stale file handle"))
        turns.append(unit)
        return UnitDone(worker, report(unit)) if len(turns) % 10 == 0 else None

    engine, controller = FakeEngine(fate), Controller(units(30), Policy())
    drive(engine, controller)
    assert controller.progress.units == 30
    assert not controller.given_up
    assert engine.waits < 320


def test_failures_are_judged_at_the_end() -> None:
    controller = Controller(units(2), Policy(max_failed_share=0.1))
    with pytest.raises(FailureLimitError, match="2 of 10 clips failed"):
        drive(FakeEngine(lambda worker, unit: UnitDone(worker, report(unit, 4, crash=1))), controller)


def test_workers_that_cannot_start_stop_the_job() -> None:
    class Dying(FakeEngine):
        def start_worker(self) -> str:
            name = f"w{len(self.started)}"
            self.started.append(name)
            self.events.append(WorkerLost(name, "no CUDA device"))
            return name

    engine = Dying()
    with pytest.raises(JobError, match=r"11 encode workers died.*no CUDA device"):
        drive(engine, Controller(units(3), Policy()), 1)
    assert len(engine.started) == 11


def test_the_last_units_are_shared_among_the_workers() -> None:
    engine = FakeEngine()
    controller = Controller(units(4), Policy(units_in_flight=3))
    leased: list[int] = []
    engine.fate = lambda worker, unit: leased.append(len(engine.queues[worker])) or UnitDone(worker, report(unit))  # type: ignore[func-returns-value]
    run(
        controller, engine, num_workers=2, unit_timeout_seconds=60, stop=threading.Event(), on_tick=lambda _: None,
        clock=engine.clock,
    )  # fmt: skip
    assert leased == [2, 2, 1, 1]


class TimedEngine(FakeEngine):
    """Workers that take a unit's seconds for each, one after another; the clock jumps from event to event.

    The workers named in `lost` are preempted at that time.
    """

    def __init__(
        self, start_seconds: Sequence[float], unit_seconds: Sequence[float], lost: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.start_seconds, self.unit_seconds = start_seconds, unit_seconds
        self.lost = dict(lost or {})
        self.done: list[tuple[str, int]] = []
        self.free: dict[str, float] = {}
        self.coming: list[tuple[float, int, Event]] = []
        self.on_wait: Callable[[], None] = lambda: None

    def _come(self, when: float, event: Event) -> None:
        self.coming.append((when, len(self.started) + self.waits, event))

    def start_worker(self) -> str:
        name = f"w{len(self.started)}"
        self._come(self.now + self.start_seconds[len(self.started) % len(self.start_seconds)], WorkerReady(name))
        self.started.append(name)
        if name in self.lost:
            self._come(self.lost[name], WorkerLost(name, "preempted", infrastructure=True))
        return name

    def submit(self, worker: str, unit: Unit) -> None:
        self.free[worker] = max(self.now, self.free.get(worker, 0.0)) + self.unit_seconds[unit.number]
        self._come(self.free[worker], UnitDone(worker, report(unit)))

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        self.on_wait()
        self.waits += 1
        event = min(self.coming, key=lambda coming: coming[:2])
        self.coming.remove(event)
        self.now = max(self.now, event[0])
        if isinstance(event[2], WorkerLost):
            self.coming = [other for other in self.coming if other[2].worker != event[2].worker]
        elif isinstance(event[2], UnitDone):
            self.done.append((event[2].worker, event[2].report.unit.number))
        return [event[2]]


NEVER = 1e6


def test_units_are_left_for_a_worker_that_is_not_ready_yet() -> None:
    engine = TimedEngine(start_seconds=[1, 2], unit_seconds=[8, 8, 1])
    drive(engine, Controller(units(3), Policy()), 2)
    assert sorted(engine.done) == [("w0", 0), ("w0", 2), ("w1", 1)]
    assert engine.now == 10  # 18 when w0 leases two ahead


def test_what_was_left_for_a_worker_that_never_starts_is_taken_when_another_is_empty() -> None:
    engine = TimedEngine(start_seconds=[1, NEVER, NEVER], unit_seconds=[8, 8, 4, 2, 1])
    drive(engine, Controller(units(5), Policy()), 3)
    assert engine.done == [("w0", 0), ("w0", 3), ("w0", 4), ("w0", 1), ("w0", 2)]
    assert engine.now == 24  # never idle


def test_nothing_is_kept_for_workers_that_do_not_come_in_a_minute() -> None:
    """Four were asked for, one came. It leaves the others a unit each, and later has work in hand all the same."""
    engine = TimedEngine(start_seconds=[1, NEVER, NEVER, NEVER], unit_seconds=[20] * 8)
    controller = Controller(units(8), Policy(units_in_flight=3))
    held: dict[float, int] = {}
    engine.on_wait = lambda: held.update({engine.now: len(controller.leases_of("w0"))})
    drive(engine, controller, 4)
    assert held == {0: 0, 1: 3, 21: 3, 41: 3, 61: 3, 81: 3, 101: 3, 121: 2, 141: 1}


def test_units_are_kept_for_a_worker_that_replaces_another_late() -> None:
    """w1 is lost at 140 with two units, w0 has room at 141, and w2 is ready at 142."""
    engine = TimedEngine(start_seconds=[1, 1, 2], unit_seconds=[140, 300, 300, 300], lost={"w1": 140})
    drive(engine, Controller(units(4), Policy(units_in_flight=2)), 2)
    assert sorted(engine.done) == [("w0", 0), ("w0", 1), ("w0", 3), ("w2", 2)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_worker_idles_while_units_wait_and_each_is_done_once(data: st.DataObject) -> None:
    times = st.floats(0.1, 20)
    count, num_workers = data.draw(st.integers(0, 25)), data.draw(st.integers(1, 6))
    unit_seconds = sorted(data.draw(st.lists(times, min_size=count, max_size=count)), reverse=True)
    start_seconds = [*data.draw(st.lists(times | st.just(NEVER), max_size=num_workers - 1)), 1.0]
    lost = data.draw(st.dictionaries(st.sampled_from(["w0", "w1", "w2"]), times, max_size=3))
    controller = Controller(units(count), Policy(units_in_flight=data.draw(st.integers(1, 4))))
    engine = TimedEngine(start_seconds, unit_seconds, lost)
    ready: set[str] = set()

    def no_worker_idles() -> None:
        if any(not controller.leases_of(worker) for worker in ready):
            assert not controller.has_units()

    def on_tick(events: Sequence[Event]) -> None:
        ready.update(event.worker for event in events if isinstance(event, WorkerReady))
        ready.difference_update(event.worker for event in events if isinstance(event, WorkerLost))

    engine.on_wait = no_worker_idles
    run(
        controller, engine, num_workers=num_workers, unit_timeout_seconds=1e9, stop=threading.Event(), on_tick=on_tick,
        clock=engine.clock,
    )  # fmt: skip
    assert sorted(number for _, number in engine.done) == list(range(count))


def test_a_worker_that_was_refused_takes_what_another_gives_back() -> None:
    """There is nothing for w2 before w0 is lost; it need not wait for w3, which is started instead."""

    def fate(worker: str, unit: Unit) -> Event | None:
        if engine.now < (20 if worker == "w1" else 10):
            return None
        if worker == "w0":
            return WorkerLost(worker, "preempted", infrastructure=True)
        done.append((worker, unit.number))
        return UnitDone(worker, report(unit))

    done: list[tuple[str, int]] = []
    engine = FakeEngine(fate)
    drive(engine, Controller(units(2), Policy(units_in_flight=1)), 3)
    assert done == [("w2", 0), ("w1", 1)]


class Counting(Controller):
    """Counts what the loop asks about single workers."""

    asked = 0

    def lease(self, worker: str, reserved: int = 0) -> Unit | None:
        self.asked += 1
        return super().lease(worker, reserved)

    def has_room(self, worker: str) -> bool:
        self.asked += 1
        return super().has_room(worker)

    def leases_of(self, worker: str) -> tuple[Unit, ...]:
        self.asked += 1
        return super().leases_of(worker)


class OneByOne(FakeEngine):
    """Tells of one event at a time, as a large cluster does, a thousand times a second."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds_per_wait = 0.001

    def submit(self, worker: str, unit: Unit) -> None:
        self.events.append(UnitDone(worker, report(unit)))

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        self.now += self.seconds_per_wait
        return [self.events.pop(0)]


def test_a_turn_costs_what_happened_in_it_and_not_all_workers() -> None:
    asked = {}
    for num_workers in (2, 400):
        controller = Counting(units(2000), Policy())
        engine = OneByOne()
        drive(engine, controller, num_workers)
        assert controller.progress.units == 2000
        looks = (engine.now + 1) * num_workers  # at all workers for one that hangs, once a second
        asked[num_workers] = (controller.asked - looks) / 2000
    assert asked[400] < asked[2] + 3 < 12, "questions per unit grow with the number of workers"


def test_units_in_flight_are_not_counted_at_every_turn() -> None:
    """`finished` is asked every turn; at the end of a job nothing is left but what is in flight."""
    lookups = 0

    class Leases(dict[str, list[Unit]]):
        def values(self):  # type: ignore[no-untyped-def]
            nonlocal lookups
            lookups += 1
            return super().values()

    controller = Controller(units(6), Policy(units_in_flight=1))
    controller._leases = Leases()
    drive(FakeEngine(), controller, 3)
    assert controller.progress.units == 6
    assert lookups == 0
