"""A Ray cluster: joining or starting one, and what an encode worker or a rank may have of its nodes.

In:   the flags of a job; the nodes' CPUs and GPUs.
Out:  this process as a driver; the CPUs and the decode processes of a worker.
Cost: starting a cluster on this machine takes 8 to 17 s.
Errors: JobError for a cluster that cannot be reached, or whose workers would leave no CPU to decode with.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import ray

from jobs.flags import ClusterFlags, PlacementFlags
from pipeline.errors import JobError

_MEGABYTE = 1 << 20


def connect(flags: ClusterFlags) -> None:
    """Join a cluster, or start one on this machine that is large enough for the flags."""
    if ray.is_initialized():
        return
    address = flags.cluster_address
    # Of workers, too: without a dashboard Ray Train warns every second that it cannot ask it.
    own: dict[str, Any] = {"logging_config": ray.LoggingConfig(log_level="ERROR")}
    if not address:
        own |= {
            "num_cpus": flags.cluster_cpus,
            "object_store_memory": flags.object_store_mb * _MEGABYTE,
            "include_dashboard": False,
        }
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, configure_logging=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error


def cluster_resource(name: str) -> float:
    """How much of a resource ("CPU", "GPU") the cluster has."""
    return float(ray.cluster_resources().get(name, 0.0))  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class Node:
    """What a node has in all, whoever uses it now."""

    cpus: float
    gpus: float


@dataclasses.dataclass(frozen=True)
class NodeShare:
    """What a worker has of its node: CPUs that it reserves, decode processes beside it (None: Ray tasks decode)."""

    cpus: int
    decode_processes: int | None

    def told(self, flags: PlacementFlags) -> str:
        """Where this job decodes, for its user."""
        if self.decode_processes is not None:
            return f"decoding beside each worker, processes: {self.decode_processes}"
        why = ": too few nodes can hold a worker now (`ray status`)" if flags.decode_placement == "worker" else ""
        return f"decoding in tasks on any node{why}"


def node_share(nodes: Sequence[Node], flags: PlacementFlags, *, on_gpu: bool) -> NodeShare:
    """The largest share with which all workers find room, within --decode-workers per node. Pure.

    Where too few find any, nodes may still come (autoscaling), of a size that nobody knows: then tasks decode.

    Raises:
        JobError: tasks are to decode, and the workers take every CPU: Ray would wait without a word.
    """
    worker_cpus = flags.worker_cpus(on_gpu=on_gpu)

    def room(node: Node, beside: int) -> int:
        """How many workers with so many decode processes."""
        workers = int(node.cpus) // (worker_cpus + beside)
        if on_gpu:
            workers = min(workers, int(node.gpus))
        if beside and flags.decode_workers:
            workers = min(workers, flags.decode_workers // beside)
        return workers

    workers = min(flags.workers, sum(room(node, 0) for node in nodes))
    if workers < flags.least_workers:
        return NodeShare(worker_cpus, None)
    if flags.decode_placement == "cluster":
        _require_decode_cpu(sum(int(node.cpus) for node in nodes), workers, worker_cpus)
        return NodeShare(worker_cpus, None)
    most = int(max(node.cpus for node in nodes))
    beside = next(number for number in range(most, -1, -1) if sum(room(node, number) for node in nodes) >= workers)
    return NodeShare(worker_cpus + beside, max(1, beside))


def _require_decode_cpu(cpus: int, workers: int, worker_cpus: int) -> None:
    if cpus <= workers * worker_cpus:
        raise JobError(
            f"the cluster has {cpus} CPUs, and {workers} workers with {worker_cpus} each leave none for "
            "--decode-placement cluster to decode with: lower --workers, add nodes, or use --decode-placement worker"
        )


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in resources]
