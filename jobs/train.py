"""`train`: a causal video autoencoder of any kind from tars, the tiny ones in minutes.

In:   shards.
Out:  a model directory that `encode --encoder` takes as it is.
Cost: the seconds that it is given; decoding beside it.
Errors: UsageError for flags that cannot be.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jobs.flags import ClusterFlags
from jobs.prepare import decode_limits, index_shards
from jobs.progress import format_seconds
from jobs.train_config import Train
from pipeline.errors import UsageError
from pipeline.index import read_fragment
from pipeline.storage import LocalStorage

if TYPE_CHECKING:
    from models.kinds.kind import Kind

_DRAWS_PER_SAMPLE = 2
_PROGRESS_SECONDS = 10.0


def run_train(command: Train) -> int:
    """`latentmill train SHARDS... --output DIR`."""
    import torch

    from models.checkpoint import save_checkpoint
    from models.config import preset
    from models.kinds.registry import kind_class
    from models.trainer import TrainSettings
    from models.training import train
    from pipeline.buckets import BucketConfig
    from pipeline.decode.pool import ProcessPool
    from pipeline.epoch import ClipOrder, DrawConfig
    from pipeline.training_clips import TrainingClips

    if not command.shards:
        raise UsageError("train needs SHARDS: paths of tars, globs or braces")
    if command.output.exists():
        raise UsageError(f"--output {command.output} exists already: name a new directory, or remove it")
    try:
        kind = kind_class(command.kind)()
        backbone = preset(command.preset)
        geometry = kind.model_config(backbone).geometry
        geometry.latent_shape(command.frames, command.size, command.size)
    except ValueError as error:
        raise UsageError(
            f"--kind {command.kind} --preset {command.preset} --frames {command.frames} --size {command.size}: {error}"
        ) from error
    torch.set_num_threads(command.threads)
    decode = command.engine
    with tempfile.TemporaryDirectory() as scratch, ProcessPool(decode.decode_workers, decode_limits(decode)) as pool:
        storage = LocalStorage(scratch)
        flags = ClusterFlags(**vars(decode), local=True)
        shards = index_shards(storage, command.shards, flags)
        order = ClipOrder(
            DrawConfig(
                frames=(command.frames,),
                batch_size=command.batch_size,
                draws_per_sample=_DRAWS_PER_SAMPLE,
                seed=command.seed,
            ),
            BucketConfig(sizes=(f"{command.size}x{command.size}",)),
            geometry.spatial_stride,
            len(shards),
            lambda number: read_fragment(storage, shards[number].shard_id),
        )
        clips = TrainingClips(order, pool)
        trained = train(
            kind,
            backbone,
            (batch.frames for batch in clips),
            time_limit_seconds=command.seconds,
            settings=TrainSettings(learning_rate=command.learning_rate, seed=command.seed),
            progress=_Progress(),
        )
    fingerprint = save_checkpoint(command.output, trained.model, trained.normaliser)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in trained.losses.items())
    print(f"trained {command.kind} {command.preset} for {trained.steps} steps: {losses}")
    print(f"model: {command.output} (fingerprint {fingerprint[:12]})")
    if clips.failed:
        reasons = ", ".join(f"{reason} {count}" for reason, count in clips.failed.most_common())
        print(f"clips that could not be decoded, each shown by another: {reasons}", file=sys.stderr)
    _say_if_unopposed(kind, trained.steps)
    return 0


def _say_if_unopposed(kind: Kind, steps: int) -> None:
    """An adversary that never had its turn leaves a plain reconstruction: nothing else would tell."""
    from models.kinds.vq_gan import VqGan

    if isinstance(kind, VqGan) and steps <= kind.adversary.start_step:
        print(
            f"train: the adversary starts at step {kind.adversary.start_step}; this training made {steps}",
            file=sys.stderr,
        )


class _Progress:
    """Prints the losses now and then."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, step: int, losses: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._printed < _PROGRESS_SECONDS:
            return
        self._printed = now
        terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        print(f"train: step {step}, {format_seconds(now - self._started)}: {terms}", file=sys.stderr, flush=True)
