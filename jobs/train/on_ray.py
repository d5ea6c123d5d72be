"""Training on Ray: every rank a worker of Ray Train, one process group, restarted as a whole when one of them dies.

In:   a TrainJob, and a cluster that jobs.ray_cluster.connect has joined.
Out:  what jobs.train.loop leaves in RUN; for Ray, under RUN/ray, a pointer to each checkpoint.
Cost: 15 to 20 s to start the ranks, 8 s to start them again. A rank decodes in processes beside it, which end with it,
      or in tasks on any node (--decode-placement).
Errors: JobError when ranks died more often than --max-restarts allows, or one of them met what no retry could change.

Ray places, watches and restarts the ranks. Where to go on is not Ray's to say: a report that has returned may still be
lost with its rank, so the loop goes on from the last checkpoint in RUN, which holds the loader's position, too. Ray
would also start ranks again after an error that will come again; they find it written down in RUN, and end.

Ranks keep their shares of CPUs when they start again: where a lost node leaves no room for them, Ray waits for another
node. The same command, given anew, shares out what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.ray_cluster import cluster_nodes, cluster_resource, node_share
from jobs.ray_decode import RayDecoders
from jobs.train.loop import TrainJob
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode_requests import Decoders
from pipeline.errors import JobError
from pipeline.storage import Storage, open_storage

_POINTERS_KEPT = 2
_STOPPED = "ray/stopped.txt"


def train_on_ray(job: TrainJob) -> None:
    """Train on as many ranks as the flags say, until the job is done.

    Raises:
        JobError: the cluster has no room for them, or the ranks failed more often than the flags allow.
    """
    engine = job.command.engine
    on_gpu = job.device == "cuda"
    quiet: dict[str, Any] = {
        "logging_config": LoggingConfig(log_level="WARNING")
    }  # the types are of an older RunConfig
    _require_room(job)
    share = node_share(cluster_nodes(), engine, on_gpu=on_gpu)
    print(f"train: {share.told(engine)}", file=sys.stderr)
    storage = open_storage(job.run_url)
    storage.delete(_STOPPED)
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={"job": job, "decode_processes": share.decode_processes},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=engine.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": share.cpus, **({"GPU": 1} if on_gpu else {})},
            # As node_share has counted; packed, a node's ranks could decode with more than its --decode-workers.
            placement_strategy="PACK" if share.decode_processes is None else "SPREAD",
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=f"{job.run_url}/ray",
            failure_config=FailureConfig(max_failures=engine.max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=_POINTERS_KEPT),
            **quiet,
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_what_stopped(storage)
        raise JobError(
            f"the ranks died more often than --max-restarts {engine.max_restarts} allows; the same command goes on "
            f"from the last checkpoint: {error}"
        ) from error
    _raise_what_stopped(storage)


def _require_room(job: TrainJob) -> None:
    """Ray would wait for it without a word."""
    engine, cpus = job.command.engine, cluster_resource("CPU")
    if cpus < engine.workers * engine.threads + 1:
        raise JobError(
            f"the cluster has {cpus:g} CPUs: --workers {engine.workers} with --threads {engine.threads} each leave "
            "none to decode with; lower --threads or --workers"
        )
    if job.device == "cuda" and cluster_resource("GPU") < engine.workers:
        raise JobError(f"--workers {engine.workers} need a GPU each, the cluster has {cluster_resource('GPU'):g}")


def _raise_what_stopped(storage: Storage) -> None:
    if storage.exists(_STOPPED):
        raise JobError(f"training stopped: {storage.read(_STOPPED).decode()}")


def _train_rank(config: Mapping[str, Any]) -> None:
    """What Ray runs on every rank, once the process group is there."""
    import torch

    from jobs.train.loop import train_rank

    job: TrainJob = config["job"]
    engine = job.command.engine
    logging.getLogger().setLevel(logging.WARNING)  # Ray reports each report
    torch.set_num_threads(engine.threads)
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that collectives without a tensor use
    job = dataclasses.replace(job, device=str(device))
    storage = open_storage(job.run_url)
    if storage.exists(_STOPPED):
        return
    try:
        with open_decoders(config["decode_processes"], engine.decode_limits) as decoders:
            train_rank(job, decoders, lambda step, losses: _report(job, step, losses))
    except (JobError, ValueError) as error:
        storage.put(_STOPPED, str(error).encode())
        raise


@contextlib.contextmanager
def open_decoders(num_processes: int | None, limits: DecodeLimits) -> Iterator[Decoders]:
    """A rank's decode processes, for as long as it trains; None: Ray tasks."""
    if num_processes is None:
        yield RayDecoders(limits)
        return
    with ProcessPool(num_processes, limits) as pool:
        pool.start()  # while the model is made
        yield pool


def _report(job: TrainJob, step: int, losses: Mapping[str, float]) -> None:
    """Tell Ray of a checkpoint: a small one that names ours."""
    metrics = {"step": step, **losses}
    if ray.train.get_context().get_world_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        pointer = {"run": job.run_url, "step": step}
        (Path(directory) / "checkpoint.json").write_text(json.dumps(pointer), encoding="utf-8")
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))
