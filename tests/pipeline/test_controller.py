"""The controller under random events, and its rules of blame one by one."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.buckets import Bucket
from pipeline.controller import Controller, Policy, judge_failures
from pipeline.errors import FailureLimitError, JobError, StoreError, UnitError
from pipeline.plan import Unit
from pipeline.worker import UnitReport

BUCKET = Bucket(9, 32, 32)


def units(count: int) -> list[Unit]:
    return [Unit(BUCKET, number) for number in range(count)]


def report(unit: Unit, written: int = 4, **failed: int) -> UnitReport:
    failures = tuple(("k", name, "") for name in failed)
    seconds = {"encode_seconds": 2.0, "starved_seconds": 1.0, "blocked_seconds": 1.0, "write_seconds": 1.0}
    return UnitReport(unit, written, failed, failures, 36, 10, 20, True, **seconds)


def suspect(controller: Controller, unit: Unit, deaths: int) -> None:
    for _ in range(deaths):
        assert controller.lease("w") == unit
        controller.lost("w", "killed", infrastructure=False)


events = st.lists(
    st.tuples(st.sampled_from(["lease", "done", "failed", "lost", "preempted"]), st.integers(0, 3), st.integers(0, 9)),
    max_size=150,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), events)
def test_random_events_lose_no_unit_and_lease_none_twice(
    count: int, in_flight: int, steps: list[tuple[str, int, int]]
) -> None:
    controller = Controller(units(count), Policy(units_in_flight=in_flight, max_lost_workers=10**6))
    held: dict[str, list[Unit]] = {f"w{number}": [] for number in range(4)}
    done: set[Unit] = set()
    deaths: Counter[Unit] = Counter()
    unlucky: set[str] = set()  # workers on which units failed: they may have to leave these to others

    def lease(worker: str, reserved: int = 0) -> Unit | None:
        unit = controller.lease(worker, reserved)
        may_wait = bool(held[worker]) or worker in unlucky or not controller.has_units()
        assert unit is not None or may_wait, "an empty worker starves"
        if unit is not None:
            assert unit not in done | controller.given_up.keys()
            assert all(unit not in others for others in held.values())
            alone = [other for other in [*held[worker], unit] if deaths[other] >= 2]
            assert not alone or not held[worker], "a suspect shares a worker"
            held[worker].append(unit)
        assert len(held[worker]) <= in_flight
        assert controller.leases_of(worker) == tuple(held[worker])
        return unit

    for event, number, choice in steps:
        worker = f"w{number}"
        unit = held[worker][choice % len(held[worker])] if held[worker] else None
        if event == "lease":
            lease(worker, reserved=choice)
        elif event == "done" and unit:
            controller.done(worker, report(unit))
            held[worker].remove(unit)
            done.add(unit)
        elif event == "failed" and unit:
            controller.failed(worker, unit, UnitError("passing"))
            held[worker].remove(unit)
            unlucky.add(worker)
        elif event in ("lost", "preempted"):
            controller.lost(worker, "cause", infrastructure=event == "preempted")
            deaths.update(held[worker] if event == "lost" else [])
            held[worker].clear()
        assert controller.in_flight == sum(map(len, held.values()))
    while not controller.finished():
        for worker in held:
            while lease(worker) is not None:
                pass
        assert controller.in_flight, "units are left and no worker gets any"
        for worker, leased in held.items():
            for unit in leased:
                controller.done(worker, report(unit))
            done.update(leased)
            leased.clear()
    assert done | controller.given_up.keys() == set(units(count))
    assert not done & controller.given_up.keys()
    assert controller.progress.units == len(done)


def test_a_unit_runs_alone_from_its_second_death_and_is_given_up_after_two_more() -> None:
    first, second, third, fourth = units(4)
    controller = Controller([first, second, third, fourth], Policy(units_in_flight=2))
    for _ in range(2):
        assert {controller.lease("a"), controller.lease("a")} == {first, second}
        controller.lost("a", "killed", infrastructure=False)
    assert controller.lease("a") == first
    assert controller.lease("a") is None, "a suspect shares its worker"
    assert controller.lease("b") == second
    controller.done("b", report(second))
    assert controller.lease("b") == third
    assert controller.lease("a") is None, "a fresh unit joins a suspect"
    controller.lost("a", "killed", infrastructure=False)
    assert controller.lease("b") is None, "a busy worker waits for the suspect"
    assert controller.lease("a") == first
    controller.lost("a", "signal 9", infrastructure=False)
    assert controller.given_up == {first: "killed its worker 2 times while alone on it: signal 9"}
    assert controller.lease("b") == fourth
    for unit in (third, fourth):
        controller.done("b", report(unit))
    assert controller.finished()


def test_a_worker_leases_ahead_only_beyond_the_units_that_are_reserved() -> None:
    first, second, third, fourth, fifth = units(5)
    controller = Controller([first, second, third, fourth, fifth], Policy(units_in_flight=3))
    assert controller.lease("a", reserved=2) == first
    assert controller.lease("a", reserved=2) == fourth
    assert controller.lease("a", reserved=3) is None
    assert controller.lease("b", reserved=3) == second
    assert controller.lease("b", reserved=1) == fifth
    assert controller.lease("b", reserved=1) is None
    assert controller.lease("c", reserved=1) == third


def test_nothing_is_reserved_while_there_is_enough_for_all_who_may_come() -> None:
    first, second, third, *rest = units(8)
    controller = Controller([first, second, third, *rest], Policy(units_in_flight=3))
    assert [controller.lease("a", reserved=2) for _ in range(3)] == [first, second, rest[1]]


def test_units_that_come_back_are_leased_first_and_in_their_order() -> None:
    first, second, third, fourth = units(4)
    controller = Controller([first, second, third, fourth], Policy())
    assert [controller.lease("a", reserved=1) for _ in range(3)] == [first, third, fourth]
    controller.lost("a", "preempted", infrastructure=True)
    assert [controller.lease("b") for _ in range(3)] == [first, third, fourth]
    controller.failed("b", third, UnitError("passing"))
    assert controller.lease("c") == third


def test_no_more_units_are_drawn_than_are_leased_or_reserved() -> None:
    drawn: list[Unit] = []
    controller = Controller((drawn.append(unit) or unit for unit in units(100)), Policy(units_in_flight=5))  # type: ignore[func-returns-value]
    for _ in range(5):
        controller.lease("a", reserved=7)
    assert len(drawn) == 5 + 7 * 5
    assert controller.has_units(more_than=39)
    assert len(drawn) == 5 + 40
    assert not controller.has_units(more_than=95)
    assert controller.has_units(more_than=94)


def test_losses_of_the_cluster_cost_nothing() -> None:
    (unit,) = units(1)
    controller = Controller([unit], Policy(max_lost_workers=0))
    for _ in range(50):
        assert controller.lease("w") == unit
        controller.lost("w", "the node is gone", infrastructure=True)
    assert controller.lease("w") == unit
    controller.done("w", report(unit))
    assert controller.finished()
    assert not controller.given_up


def test_an_idle_worker_may_be_lost() -> None:
    controller = Controller([], Policy())
    controller.lost("unknown", "killed", infrastructure=False)
    assert controller.finished()


def test_too_many_lost_workers_stop_the_job() -> None:
    controller = Controller(units(9), Policy(units_in_flight=1, max_lost_workers=2))
    for number in range(2):
        controller.lease(f"w{number}")
        controller.lost(f"w{number}", "killed", infrastructure=False)
    controller.lease("w")
    with pytest.raises(JobError, match="3 encode workers died, at most 2 may; the last one with: no driver"):
        controller.lost("w", "no driver", infrastructure=False)


def test_a_unit_is_tried_three_times() -> None:
    (unit,) = units(1)
    controller = Controller([unit], Policy())
    for _ in range(3):
        assert not controller.finished()
        assert controller.lease("w") == unit
        controller.failed("w", unit, UnitError("no route to host"))
    assert controller.finished()
    assert controller.given_up == {unit: "failed 3 times, at last: no route to host"}


def test_a_unit_that_failed_goes_to_another_worker() -> None:
    first, second, third = units(3)
    controller = Controller([first, second, third], Policy(units_in_flight=2))
    assert [controller.lease(worker) for worker in ("sick", "well")] == [first, second]
    controller.failed("sick", first, UnitError("stale file handle"))
    assert controller.lease("sick") == third
    assert controller.lease("sick") is None
    assert controller.lease("well") == first
    controller.failed("well", first, UnitError("stale file handle"))
    assert controller.lease("sick") == first, "all have failed it, so any may try"
    controller.lost("sick", "signal 9", infrastructure=True)
    controller.failed("well", second, UnitError("stale file handle"))
    assert controller.lease("well") == second, "nobody else is left"


def test_a_worker_that_fails_unit_after_unit_waits_for_others() -> None:
    controller = Controller(units(9), Policy(units_in_flight=1))
    busy = controller.lease("well")
    assert busy
    for _ in range(3):
        unit = controller.lease("sick")
        assert unit
        controller.failed("sick", unit, UnitError("stale file handle"))
    assert controller.lease("sick") is None
    controller.done("well", report(busy))
    unit = controller.lease("sick")
    assert unit
    controller.done("sick", report(unit))
    assert controller.lease("well")
    assert controller.lease("sick"), "it is well again"


def test_a_worker_by_itself_does_not_wait() -> None:
    controller = Controller(units(4), Policy())
    for _ in range(4 * 3):
        unit = controller.lease("w")
        assert unit
        controller.failed("w", unit, UnitError("no route to host"))
    assert controller.finished()


def test_a_job_error_stops_at_once() -> None:
    (unit,) = units(1)
    controller = Controller([unit], Policy())
    controller.lease("w")
    with pytest.raises(StoreError, match="disk is full"):
        controller.failed("w", unit, StoreError("the disk is full"))


def test_events_for_units_that_are_not_leased_are_refused() -> None:
    first, second = units(2)
    controller = Controller([first, second], Policy(units_in_flight=1))
    controller.lease("w")
    with pytest.raises(RuntimeError, match="not leased to it"):
        controller.done("w", report(second))
    with pytest.raises(RuntimeError, match="not leased to it"):
        controller.failed("v", first, UnitError("late"))


def test_the_failed_share_is_judged_from_enough_clips_on() -> None:
    controller = Controller(units(9), Policy(units_in_flight=9, max_failed_share=0.5, min_clips_judged=8))
    leased = [controller.lease("w") for _ in range(9)]
    assert None not in leased
    first, second, third = (unit for unit in leased[:3] if unit)
    controller.done("w", report(first, 0, crash=4))
    with pytest.raises(FailureLimitError, match=r"4 of 4 clips failed \(100%\), more than .* 0.5 allows: crash 4"):
        controller.judge()
    controller.done("w", report(second, 4))
    with pytest.raises(FailureLimitError, match=r"6 of 11 clips failed .* crash 4, timeout 2"):
        controller.done("w", report(third, 1, timeout=2))


def test_clips_of_earlier_runs_are_judged_with_this_runs() -> None:
    (unit,) = units(1)
    failing = Controller([unit], Policy(max_failed_share=0.5, min_clips_judged=10), 6, {"crash": 4})
    failing.lease("w")
    with pytest.raises(FailureLimitError, match=r"6 of 10 clips failed \(60%\).* allows: crash 4, timeout 2"):
        failing.done("w", report(unit, 2, timeout=2))
    (unit,) = units(1)
    well = Controller([unit], Policy(max_failed_share=0.1, min_clips_judged=20), 96, {"crash": 4})
    well.lease("w")
    well.done("w", report(unit, 2, timeout=2))  # half of this run's
    well.judge()
    with pytest.raises(FailureLimitError, match="10 of 100 clips"):
        judge_failures(100, {"crash": 10}, 0.09)
    judge_failures(100, {"crash": 29}, 0.29)


def test_nothing_encoded_is_no_failure() -> None:
    controller = Controller([], Policy(max_failed_share=0.0))
    controller.judge()
    assert controller.finished()


def test_progress_adds_up() -> None:
    first, second = units(2)
    controller = Controller([first, second], Policy())
    names = [field.name for field in dataclasses.fields(UnitReport) if field.name.endswith("_seconds")]
    seconds: dict[str, Any] = {name: 2.0**number for number, name in enumerate(names)}
    for unit in (first, second):
        controller.lease("w")
        controller.done("w", dataclasses.replace(report(unit, 3, crash=1), **seconds))
    progress = controller.progress
    assert {name: getattr(progress, name) for name in seconds} == {name: 2 * value for name, value in seconds.items()}
    assert (progress.sample_bytes, progress.bytes_written) == (20, 40)
    assert (progress.units, progress.written, progress.clips, progress.frames) == (2, 6, 8, 72)
    assert progress.failures == [("k", "crash", "")] * 2
    span = ("encode", "copy", "starved", "blocked")
    assert progress.span_seconds == 2 * sum(seconds[f"{name}_seconds"] for name in span)
    assert progress.busy_share == 2 * seconds["encode_seconds"] / progress.span_seconds


@pytest.mark.parametrize(("field", "value"), [("max_failed_share", 1.5), ("units_in_flight", 0)])
def test_policies_check_themselves(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Policy(**{field: value})


def test_many_units_cost_little_and_leave_nothing() -> None:
    def drive(count: int) -> None:
        controller = Controller((Unit(BUCKET, number) for number in range(count)), Policy())
        while (unit := controller.lease("w")) is not None:
            controller.lease("v")
            for worker in "wv":
                for leased in controller.leases_of(worker):
                    controller.done(worker, report(leased, 4, crash=1))
            assert unit
        assert controller.finished()

    count = 100_000
    started = time.perf_counter()
    drive(count)
    micros = (time.perf_counter() - started) / count * 1e6
    print(f"{micros:.1f} us per unit")  # noqa: T201 (the figure is wanted)
    assert micros < 200
    peaks = []
    for few in (500, 5_000):
        tracemalloc.start()
        drive(few)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000
