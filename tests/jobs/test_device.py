"""What `--device` means on this machine, and on a cluster that need not be started to be asked."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import ray_cluster
from jobs.device import cluster_device, job_device, local_device
from jobs.flags import EngineFlags
from pipeline.errors import JobError


@pytest.mark.parametrize(
    ("name", "is_there", "device"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu")],
)
def test_the_device_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: Any, is_there: bool, device: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: is_there)
    assert local_device(name) == device


@pytest.fixture
def cluster_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the cluster has, which no test needs to start."""
    resources = {"GPU": 0.0}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "connect", lambda flags: None)
    monkeypatch.setattr(ray_cluster, "cluster_resource", lambda name: resources[name])
    return resources


@pytest.mark.parametrize(
    ("flag", "gpus", "device"), [("auto", 0, "cpu"), ("auto", 8, "cuda"), ("cuda", 8, "cuda"), ("cpu", 8, "cpu")]
)
def test_the_cluster_says_what_auto_means(cluster_gpus: dict[str, float], flag: Any, gpus: int, device: str) -> None:
    cluster_gpus["GPU"] = float(gpus)
    assert cluster_device(flag, EngineFlags()) == device


def test_a_gpu_may_still_come_to_a_cluster_that_is_joined_but_not_to_this_machine(
    cluster_gpus: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JobError, match=r"--device cuda: Ray finds no GPU on this machine; .*--ray-address"):
        cluster_device("cuda", EngineFlags())
    assert cluster_device("cuda", EngineFlags(ray_address="head:6379")) == "cuda"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_device("cuda", EngineFlags()) == "cuda"


def test_a_job_asks_where_it_runs(cluster_gpus: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cluster_gpus["GPU"] = 1.0
    assert job_device("auto", EngineFlags()) == "cuda"
    assert job_device("auto", EngineFlags(local=True)) == "cpu"


def test_cpu_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(flags: object) -> None:
        raise AssertionError("joined")

    monkeypatch.setattr(ray_cluster, "connect", connect)
    assert cluster_device("cpu", EngineFlags()) == "cpu"
