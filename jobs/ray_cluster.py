"""A Ray cluster: joining or starting one, and what an encode worker may have of its nodes.

In:   the flags of a job; the nodes' CPUs and GPUs.
Out:  this process as a driver; the CPUs and the decode processes of an encode worker.
Cost: starting a cluster on this machine takes 8 to 17 s.
Errors: JobError for a cluster that cannot be reached or has no room.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import ray

from jobs.flags import ClusterFlags, EngineFlags
from pipeline.errors import JobError

_MEGABYTE = 1 << 20


def connect(flags: ClusterFlags) -> None:
    """Join a cluster, or start one on this machine that is large enough for the flags."""
    if ray.is_initialized():
        return
    address = flags.ray_address or os.environ.get("RAY_ADDRESS")
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
    """What an encode worker has of its node: CPUs that it reserves, decode processes beside it (None: Ray tasks)."""

    cpus: int
    decode_processes: int | None


def node_share(nodes: Sequence[Node], flags: EngineFlags, *, on_gpu: bool) -> NodeShare:
    """An equal part of the smallest node that can hold a worker, within --decode-workers per node. Pure.

    Raises:
        JobError: no node can hold one.
    """
    encode_cpus = 1 if on_gpu else flags.encode_threads
    able = [node for node in nodes if node.cpus >= encode_cpus and (node.gpus >= 1 or not on_gpu)]
    if not able:
        wanted = f"{encode_cpus} CPUs" + (" and a GPU" if on_gpu else "")
        raise JobError(f"no node of the cluster has {wanted} for an encode worker; `ray status` tells what it has")
    if flags.decode_placement == "cluster":
        return NodeShare(encode_cpus, None)

    def spare(node: Node) -> int:
        workers = min(flags.workers, int(node.gpus)) if on_gpu else math.ceil(flags.workers / len(able))
        cpus = int(node.cpus) - workers * encode_cpus
        return max(0, min(cpus, flags.decode_workers or cpus) // workers)

    smallest = min(map(spare, able))
    return NodeShare(encode_cpus + smallest, max(1, smallest))


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in resources]
