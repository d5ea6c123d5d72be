"""`train`: a causal video autoencoder of any kind from tars, in this process or on Ray.

In:   shards.
Out:  a model directory that `encode --encoder` takes as it is; RUN, with checkpoints and logs.
Cost: the steps or seconds that it is given; decoding beside it. Ray takes half a minute to start.
Errors: UsageError for flags that cannot be; MismatchError when RUN began with others; those of jobs.train.loop.

The same command again goes on from RUN's last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.device import job_device
from jobs.index import index_shards
from jobs.train.checkpoints import Checkpoints, read_finished, require_same_flags
from jobs.train.config import Train
from pipeline.curriculum import Stage, parse_stages
from pipeline.errors import JobError, UsageError
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage, Storage, is_remote, open_storage

if TYPE_CHECKING:
    from jobs.train.loop import TrainJob

_DEFAULT_SECONDS = 120.0
_STALE_SECONDS = 24 * 3600.0
# What may differ when a training goes on: none of it changes what a step does.
_FREE = frozenset({"config", "shards", "output", "run", "checkpoints", "log", "engine", "gradient_checkpointing"})


def run_train(command: Train) -> int:
    """`latentmill train SHARDS... --output DIR`."""
    if not command.shards:
        raise UsageError("train needs SHARDS: paths of tars, globs or braces")
    if command.output.exists():
        raise UsageError(f"--output {command.output} exists already: name a new directory, or remove it")
    if command.settings.freeze_encoder and command.model.initial is None:
        raise UsageError("--freeze-encoder needs --initial: the model whose encoder is kept")
    stages = _stages(command)
    steps, seconds = _limits(command, stages)
    _check_model(command, stages)
    _check_ranks(command, stages)
    storage = open_storage(command.run_url)
    if isinstance(storage, LocalStorage):
        storage.sweep(older_than_seconds=_STALE_SECONDS)
    shards = index_shards(storage, command.shards, command.engine)
    held_out = index_shards(storage, command.checkpoints.held_out, command.engine)
    job = _make_job(command, storage, stages, (steps, seconds), shards, held_out)
    _check_shards(job, storage)
    require_same_flags(storage, _flags_that_count(command, shards, held_out, steps, seconds))
    _run(job)
    _export(job, storage)
    return 0


def _stages(command: Train) -> tuple[Stage, ...]:
    return parse_stages(command.stages, command.draw, command.buckets)


def _limits(command: Train, stages: Sequence[Stage]) -> tuple[int | None, float | None]:
    """(steps, seconds) after which the training ends.

    Raises:
        UsageError: the flags contradict the stages.
    """
    steps, seconds = command.steps, command.seconds
    if stages[-1].steps is not None:
        in_stages = sum(stage.steps or 0 for stage in stages)
        if steps not in (None, in_stages):
            raise UsageError(f"--steps {steps}, but the --stages have {in_stages} together: leave out --steps")
        steps = in_stages
    elif steps is not None and steps <= sum(stage.steps or 0 for stage in stages):
        raise UsageError(f"--steps {steps} end before the last of the --stages begins: give more steps")
    return steps, _DEFAULT_SECONDS if steps is seconds is None else seconds


def _check_model(command: Train, stages: Sequence[Stage]) -> None:
    """Refuse, before anything is read, clips that the model cannot take."""
    from jobs.train.model import model_config
    from pipeline.buckets import resolve_sizes

    geometry = model_config(command.model).geometry
    for stage in stages:
        for height, width in resolve_sizes(stage.sizes, geometry.spatial_stride):
            for frames in stage.draw.frames:
                try:
                    geometry.latent_shape(frames, height, width)
                except ValueError as error:
                    flags = f"--kind {command.model.kind} --preset {command.model.preset}"
                    raise UsageError(f"{flags} --frames {frames} --sizes {height}x{width}: {error}") from error


def _check_ranks(command: Train, stages: Sequence[Stage]) -> None:
    for stage in stages:
        parts = command.engine.workers * command.settings.micro_batches
        if stage.draw.batch_size % parts:
            raise UsageError(
                f"--batch-size {stage.draw.batch_size} must be a multiple of --workers {command.engine.workers} times "
                f"--micro-batches {command.settings.micro_batches}"
            )


def _flags_that_count(
    command: Train,
    shards: Sequence[ShardRef],
    held_out: Sequence[ShardRef],
    steps: int | None,
    seconds: float | None,
) -> dict[str, Any]:
    """By name, everything that a step, or which checkpoint is best, depends on. A path is there by its content."""
    flags: dict[str, Any] = {}
    for name, value in dataclasses.asdict(command).items():
        if name not in _FREE:
            flags |= value if isinstance(value, dict) else {name: value}
    if command.model.initial is not None:
        flags["initial"] = _fingerprint(command.model.initial)
    flags |= {"steps": steps, "seconds": seconds, "held_out": _identity(held_out), "SHARDS": _identity(shards)}
    return {name if name == "SHARDS" else f"--{name.replace('_', '-')}": value for name, value in flags.items()}


def _identity(shards: Sequence[ShardRef]) -> str:
    names = "\n".join(sorted(shard.shard_id for shard in shards))
    return f"{len(shards)} with hash {hashlib.sha256(names.encode()).hexdigest()[:16]}"


def _fingerprint(directory: Path) -> str:
    from models.checkpoint import read_document

    try:
        return read_document(directory).fingerprint
    except ValueError as error:
        raise UsageError(f"--initial {directory}: {error}") from error


def _make_job(
    command: Train,
    storage: Storage,
    stages: Sequence[Stage],
    limits: tuple[int | None, float | None],
    shards: Sequence[ShardRef],
    held_out: Sequence[ShardRef],
) -> TrainJob:
    from jobs.train.loop import TrainJob

    steps, seconds = limits
    return TrainJob(
        command=command,
        run_url=storage.url,
        log_directory=_log_directory(command),
        stages=(*stages[:-1], dataclasses.replace(stages[-1], steps=None)),
        steps=steps,
        seconds=seconds,
        shard_ids=tuple(shard.shard_id for shard in shards),
        held_out_ids=tuple(shard.shard_id for shard in held_out),
        device=job_device(command.engine.device, command.engine),
    )


def _check_shards(job: TrainJob, storage: Storage) -> None:
    """Refuse, before a rank is started, shards that have no clip for some stage."""
    for shard_ids in filter(None, (job.shard_ids, job.held_out_ids)):
        for stage in job.stages:
            next(dataclasses.replace(job, stages=(stage,)).last_stage(storage, shard_ids).batches())


def _log_directory(command: Train) -> Path:
    """TensorBoard writes to a file system: beside the output where RUN is none."""
    if is_remote(command.run_url):
        return Path(f"{command.output}.log").absolute()
    return Path(command.run_url).absolute() / "log"


def _run(job: TrainJob) -> None:
    """Train where the flags say."""
    engine = job.command.engine
    if not engine.local:
        from jobs.ray_cluster import connect
        from jobs.train.on_ray import train_on_ray

        connect(engine)
        train_on_ray(job)
        return
    import torch

    from jobs.train.loop import train_rank
    from pipeline.decode.pool import ProcessPool

    torch.set_num_threads(engine.threads)
    with ProcessPool(engine.decode_processes, engine.decode_limits) as pool:
        try:
            train_rank(job, pool)
        except ValueError as error:
            raise JobError(f"training stopped: {error}") from error


def _export(job: TrainJob, storage: Storage) -> None:
    """Write the model directory from what the ranks left in RUN."""
    from jobs.train.model import model_config
    from jobs.train.watch import report_end
    from models.build import build_model
    from models.checkpoint import save_checkpoint
    from models.spec import Normaliser

    finished = read_finished(storage)
    if finished is None:
        raise JobError(f"the training did not come to its end: {storage.url} holds its checkpoints")
    _, tensors = Checkpoints(storage).load(finished["taken_step"])
    model = build_model(model_config(job.command.model))
    prefix = "average."
    model.load_state_dict({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
    fields = finished["normaliser"]
    normaliser = Normaliser(tuple(fields["mean"]), tuple(fields["std"]), fields["formula"])
    fingerprint = save_checkpoint(job.command.output, model, normaliser)
    report_end(finished)
    print(f"model: {job.command.output} (fingerprint {fingerprint[:12]})")
    _say_if_unopposed(job.command, finished["step"])


def _say_if_unopposed(command: Train, steps: int) -> None:
    """An adversary that never had its turn leaves a plain reconstruction: nothing else would tell."""
    from jobs.train.model import make_kind
    from models.kinds.vq_gan import VqGan

    kind = make_kind(command.model.kind, command.model.kind_options)
    if isinstance(kind, VqGan) and steps <= kind.adversary.start_step:
        print(
            f"train: the adversary starts at step {kind.adversary.start_step}; this training made {steps}",
            file=sys.stderr,
        )
