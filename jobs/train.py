"""`train`: a tiny causal video VAE from tars, in minutes.

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

from jobs.config import ClusterFlags, Train
from jobs.prepare import decode_limits, index_shards
from jobs.progress import format_seconds
from pipeline.decode.records import ClipShape
from pipeline.errors import UsageError
from pipeline.index import read_fragment
from pipeline.storage import LocalStorage

_WINDOWS_PER_VIDEO = 2
_PROGRESS_SECONDS = 10.0


def run_train(command: Train) -> int:
    """`latentmill train SHARDS... --output DIR`."""
    import torch

    from models.checkpoint import save_checkpoint
    from models.config import preset
    from models.training import TrainSettings, train_vae
    from pipeline.clips import TrainingClips
    from pipeline.decode.pool import ProcessPool

    if not command.shards:
        raise UsageError("train needs SHARDS: paths of tars, globs or braces")
    if command.output.exists():
        raise UsageError(f"--output {command.output} exists already: name a new directory, or remove it")
    try:
        config = preset(command.preset)
        config.geometry.latent_shape(command.frames, command.size, command.size)
    except ValueError as error:
        raise UsageError(
            f"--preset {command.preset} --frames {command.frames} --size {command.size}: {error}"
        ) from error
    torch.set_num_threads(command.threads)
    decode = command.engine
    with tempfile.TemporaryDirectory() as scratch, ProcessPool(decode.decode_workers, decode_limits(decode)) as pool:
        storage = LocalStorage(scratch)
        flags = ClusterFlags(**vars(decode), local=True)
        shards = index_shards(storage, command.shards, flags)
        clips = TrainingClips(
            [read_fragment(storage, shard.shard_id) for shard in shards],
            command.frames,
            _WINDOWS_PER_VIDEO,
            ClipShape(command.size, command.size),
            pool,
            command.batch_size,
            command.seed,
        )
        trained = train_vae(
            config,
            iter(clips),
            time_limit_seconds=command.seconds,
            settings=TrainSettings(learning_rate=command.learning_rate, seed=command.seed),
            progress=_Progress(),
        )
    fingerprint = save_checkpoint(command.output, trained.model, trained.normaliser)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in trained.losses.items())
    print(f"trained {command.preset} for {trained.steps} steps: {losses}")
    print(f"model: {command.output} (fingerprint {fingerprint[:12]})")
    return 0


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
