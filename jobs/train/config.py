"""The commands that train.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from jobs.cores import usable_cores
from jobs.flags import (
    ConfigFile,
    Device,
    PlacementFlags,
    Shards,
    StoreFlags,
    require_positive,
)
from models.train_settings import TrainSettings
from pipeline.buckets import BucketConfig
from pipeline.epoch import DrawConfig
from pipeline.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """What is trained."""

    kind: str = "vae"
    """One of ae, denoising_ae, sparse_ae, contractive_ae, vae, vq_vae, vq_vae_2, vq_gan, rvq, fsq, lfq or dvae."""
    preset: str = "tiny-4x8x8x16"
    """Size and compression of the model: one of tiny-4x8x8x16, tiny-8x32x32x128, base-4x8x8x16, base-4x16x16x48,
    base-8x32x32x128 or image-1x8x8x16."""
    kind_options: tuple[str, ...] = ()
    """Settings of the kind as name=value, in records as record.name=value: weights.l2=1 bottleneck.codebook_size=512.
    Lists and texts are JSON: bottleneck.levels=[8,5,5]; bottleneck.name=kl takes another one where the kind can."""
    initial: Path | None = None
    """Start from the weights of this model's directory, not from random ones."""


@dataclasses.dataclass(frozen=True)
class CheckpointFlags:
    """What is kept on the way, and how the best is known."""

    checkpoint_every: int = 500
    """Steps between checkpoints; a training that was killed goes on from the last. The last and the best are kept."""
    keep_every: int | None = None
    """Keep the checkpoints of every so many steps, too; a multiple of --checkpoint-every."""
    held_out: tuple[str, ...] = ()
    """Tars that are not trained on: the best checkpoint reconstructs them best; default: by the training loss."""
    evaluate_every: int | None = None
    """Steps between evaluations on --held-out, each with a checkpoint; default: --checkpoint-every."""
    take: Literal["last", "best"] = "last"
    """Which checkpoint becomes the model."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint_every")
        for name in ("keep_every", "evaluate_every"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise UsageError(
                f"--keep-every {self.keep_every} is no multiple of --checkpoint-every {self.checkpoint_every}"
            )
        if self.evaluate_every is not None and not self.held_out:
            raise UsageError("--evaluate-every needs --held-out: the tars to evaluate on")


@dataclasses.dataclass(frozen=True)
class LogFlags:
    """What is said on the way."""

    log_every: int = 50
    """Steps between entries of the log, for `tensorboard --logdir RUN/log`."""
    strip_every: int = 500
    """Steps between film strips of a clip and its reconstruction, in the log."""
    wandb: bool = False
    """Log to Weights & Biases, too; it must be installed."""
    mlflow: bool = False
    """Log to MLflow, too; it must be installed."""
    progress_seconds: float = 10.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        require_positive(self, "log_every", "strip_every", "progress_seconds")


@dataclasses.dataclass(frozen=True)
class RankFlags(PlacementFlags):
    """How the job runs; none of it changes the order of clips."""

    workers: int = 1
    """Ranks that train together, each on its part of every batch (one GPU each with --device cuda)."""
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads of a rank."""
    device: Device = "auto"
    """Where ranks train; auto takes CUDA when there is one."""
    max_restarts: int = 10
    """How often ranks that died are started again, from the last checkpoint, before the job ends with an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "threads")
        if self.max_restarts < 0:
            raise UsageError(f"--max-restarts must not be negative, got {self.max_restarts}")

    def worker_cpus(self, *, on_gpu: bool) -> int:
        return self.threads

    @property
    def least_workers(self) -> int:
        return self.workers


@dataclasses.dataclass(frozen=True)
class Train(ConfigFile):
    """Train a causal video autoencoder on tars; the tiny presets take minutes on a CPU. Run it again to go on."""

    shards: Shards = ()
    """Tars to train on: paths, globs, {000..012} braces, @lists."""
    output: Path = tyro.MISSING
    """Directory for the model; `latentmill encode --encoder` takes it as it is."""
    run: str | None = None
    """Where checkpoints and logs go: a directory, or an s3:// or gs:// url, that all ranks reach; else OUTPUT.run."""
    steps: int | None = None
    """Optimiser steps to make. With steps alone, the model is a pure function of flags and shards."""
    seconds: float | None = None
    """How long to train, over all attempts; 120 when neither steps nor stages say when to end."""
    stages: tuple[str, ...] = ()
    """Stages of a curriculum, as "STEPS key=value ...", keys being frames, frames_weights, sizes, batch_size, fps and
    frame_step; what a stage leaves out is as the flags say: "2000 sizes=64x64" "1000 sizes=128x128 batch_size=2"."""
    draw: DrawConfig = DrawConfig(draws_per_video=2)
    buckets: BucketConfig = BucketConfig(sizes=("64x64",))
    model: ModelFlags = ModelFlags()
    settings: TrainSettings = TrainSettings()
    gradient_checkpointing: bool = False
    """Compute activations again for the gradients, and keep none: less memory, a third more work, the same model."""
    normaliser_batches: int = 32
    """Batches after the last step that the model's normaliser is measured on; 0 for a whole epoch."""
    checkpoints: CheckpointFlags = CheckpointFlags()
    log: LogFlags = LogFlags()
    engine: RankFlags = RankFlags()

    def __post_init__(self) -> None:
        for name in ("steps", "seconds"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.normaliser_batches < 0:
            raise UsageError(f"--normaliser-batches must not be negative, got {self.normaliser_batches}")

    @property
    def run_url(self) -> str:
        """Where checkpoints and logs go."""
        return self.run or f"{self.output}.run"


@dataclasses.dataclass(frozen=True)
class TrainPrior(StoreFlags):
    """Learn how the codes of a store's latents go together, so that `sample` can draw new ones."""

    output: Path = tyro.MISSING
    """Directory for the prior; `latentmill sample --prior` takes it as it is."""
    encoder: str | None = None
    """Where the encoder lies now; default: where it lay when the store was made."""
    seconds: float = 120.0
    """How long to train."""
    steps: int | None = None
    """End after so many steps, when the time is not over before."""
    batch_size: int = 8
    """Clips per step."""
    width: int = 128
    """Channels of the transformer."""
    depth: int = 4
    """Blocks of the transformer."""
    heads: int = 4
    """Heads of its attention; they divide the width."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of weights and order."""
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads of the trainer."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds", "batch_size", "threads")
        if self.steps is not None:
            require_positive(self, "steps")
