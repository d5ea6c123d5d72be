"""What the Ray engine makes of Ray's errors. (No cluster: `ray.get` is told what to raise.)"""

from __future__ import annotations

import functools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from jobs.flags import EngineFlags
from jobs.ray_engine import RayEngine, short_cause
from pipeline.engine import Event, UnitDone, UnitFailed, WorkerLost, WorkerReady
from pipeline.errors import JobError, LatentmillError, StoreError, UnitError, UsageError
from pipeline.plan import Unit
from tests.pipeline.test_controller import BUCKET, report

UNIT = Unit(BUCKET, 3)
LOW_MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node was 31 GB / 32 GB."


class Cluster:
    """What stands for Ray: one worker on the node "n", replies that are values or errors, and who was killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive, self.killed = True, []  # type: tuple[bool, list[str]]
        self.replies: dict[str, Any] = {}
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(ray, "kill", self.killed.append)
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "n", "Alive": self.alive}])
        spec: Any = SimpleNamespace(device="cpu", share=SimpleNamespace(cpus=1, decode_processes=1))
        self.engine = RayEngine(spec, EngineFlags(unit_timeout_seconds=90))
        self.engine._actors["w"] = "its actor"
        self.node("n")
        assert self.reply({"node": "n"}, unit=None) == WorkerReady("w")

    def _get(self, reference: str) -> Any:
        value = self.replies[reference]
        if isinstance(value, BaseException):
            raise value
        return value

    def node(self, told: str | Exception) -> None:
        """What the worker, not set up yet, says of its node."""
        future: Future[str] = Future()
        future.add_done_callback(functools.partial(self.engine._learn_node, "w"))
        future.set_exception(told) if isinstance(told, Exception) else future.set_result(told)

    def reply(self, value: Any, unit: Unit | None = UNIT) -> Event | None:
        reference = f"reference {len(self.replies)}"
        self.replies[reference] = value
        self.engine._pending[reference] = ("w", unit)
        return self.engine._settle(reference)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("encode", "Traceback: deep inside", cause, "ray::encode", 1, "10.0.0.1")


def died(message: str = "The worker was killed by signal 11.") -> ActorDiedError:
    context = ActorDiedErrorContext(
        error_message=message, class_name="EncodeActor", actor_id=b"\x11" * 16, name="encode-1", pid=7
    )
    return ActorDiedError(context)


def test_a_report_is_a_unit_done(cluster: Cluster) -> None:
    assert cluster.reply(report(UNIT)) == UnitDone("w", report(UNIT))


@pytest.mark.parametrize("error", [UnitError("no route to host"), StoreError("the disk is full")])
def test_our_own_errors_of_a_unit_fail_it_and_the_controller_judges(cluster: Cluster, error: LatentmillError) -> None:
    assert cluster.reply(task_error(error)) == UnitFailed("w", UNIT, error)
    assert not cluster.killed


def test_any_other_error_of_a_unit_stops_the_job(cluster: Cluster) -> None:
    with pytest.raises(JobError, match=r"an encode worker failed: [\s\S]*deep inside"):
        cluster.reply(task_error(KeyError("x")))


def test_a_worker_that_cannot_be_set_up_stops_the_job(cluster: Cluster) -> None:
    with pytest.raises(UsageError, match="the encoder is damaged"):
        cluster.reply(task_error(UsageError("the encoder is damaged")), unit=None)
    with pytest.raises(JobError, match="an encode worker failed"):
        cluster.reply(task_error(KeyError("x")), unit=None)


def test_a_store_that_is_silent_while_a_worker_is_set_up_costs_that_worker_only(cluster: Cluster) -> None:
    assert cluster.reply(task_error(UnitError("no answer")), unit=None) == WorkerLost("w", "no answer")
    assert cluster.killed == ["its actor"]
    assert cluster.reply(report(UNIT)) is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemoryError(LOW_MEMORY), LOW_MEMORY.replace("\n", " ")),
        (died(), "The actor died unexpectedly before finishing this task. The worker was killed by signal 11."),
        (ActorUnavailableError("rpc timed out", None), "The actor None is unavailable: rpc timed out. The task may "),
    ],
    ids=["out of memory", "died", "cannot be reached"],
)
def test_a_worker_that_is_lost_is_one_event_and_dead_for_good(cluster: Cluster, error: RayError, cause: str) -> None:
    lost = cluster.reply(error)
    assert isinstance(lost, WorkerLost)
    assert (lost.worker, lost.infrastructure) == ("w", False)
    assert lost.cause.startswith(cause)
    assert cluster.killed == ["its actor"]
    assert cluster.reply(error) is None
    assert cluster.engine.places == {}


def test_the_cluster_is_to_blame_for_a_node_that_is_gone_and_for_preemption(cluster: Cluster) -> None:
    cluster.alive = False
    lost = cluster.reply(died())
    assert isinstance(lost, WorkerLost)
    assert lost.infrastructure
    cluster.engine._actors["w"] = "another actor"
    lost = cluster.reply(died(), unit=None)
    assert isinstance(lost, WorkerLost)
    assert not lost.infrastructure  # it never said where it was
    cluster.engine._actors["w"] = "a third one"
    cluster.node("n")
    lost = cluster.reply(died(), unit=None)  # while it was set up
    assert isinstance(lost, WorkerLost)
    assert lost.infrastructure
    cluster.alive = True
    cluster.engine._actors["w"] = "a fourth one"
    cluster.node(died())
    preempted = died()
    preempted._preempted = True
    lost = cluster.reply(preempted)
    assert isinstance(lost, WorkerLost)
    assert lost.infrastructure


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeEnvSetupError("no such image"), "Failed to set up runtime environment. no such image"),
        (ActorUnschedulableError("the node is gone"), "The actor is not schedulable: the node is gone"),
    ],
    ids=str,
)
def test_what_no_other_worker_would_escape_stops_the_job(cluster: Cluster, error: RayError, cause: str) -> None:
    with pytest.raises(JobError, match=f"an encode worker cannot run on this cluster: {cause}"):
        cluster.reply(error)


def test_a_worker_that_was_killed_for_hanging_says_by_which_flag(cluster: Cluster) -> None:
    cluster.engine.kill_worker("w")
    lost = cluster.reply(died("ray.kill was called."))
    assert isinstance(lost, WorkerLost)
    assert lost.cause == "killed: silent for longer than --unit-timeout-seconds 90 per unit it held"


def test_a_long_cause_is_cut_in_its_middle() -> None:
    cause = short_cause(died(f"first {'x' * 2000} last"))
    assert cause.startswith("The actor died unexpectedly before finishing this task. first xxx")
    assert cause.endswith("xxx last")
    assert len(cause) < 620
