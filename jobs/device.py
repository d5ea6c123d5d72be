"""What `--device` means: on this machine, on a cluster.

In:   a flag.
Out:  "cpu" or "cuda".
Cost: torch's import, or to join the cluster; nothing for "cpu".
Errors: UsageError or JobError for a GPU that is not there.
"""

from __future__ import annotations

from jobs.flags import ClusterFlags, Device
from pipeline.errors import JobError, UsageError


def job_device(name: Device, flags: ClusterFlags) -> str:
    """The device that a flag means where a job runs.

    Raises:
        UsageError, JobError: as the functions below.
    """
    return local_device(name) if flags.local else cluster_device(name, flags)


def local_device(name: Device) -> str:
    """The device that a flag means on this machine.

    Raises:
        UsageError: cuda is asked for, and there is none.
    """
    if name == "cpu":
        return name
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu, or auto")
    return "cuda" if has_cuda else "cpu"


def cluster_device(name: Device, flags: ClusterFlags) -> str:
    """The device that a flag means on the cluster, which is joined for this.

    Raises:
        JobError: cuda is asked for, and the cluster is this machine, which has no GPU: none will ever come.
    """
    if name == "cpu":
        return name
    from jobs.ray_cluster import cluster_resource, connect

    connect(flags)
    has_gpu = cluster_resource("GPU") > 0
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name == "cuda" and not has_gpu and not flags.cluster_address:
        raise JobError(
            "--device cuda: Ray finds no GPU on this machine; use --device cpu, or name a cluster that has some with "
            "--ray-address"
        )
    return name
