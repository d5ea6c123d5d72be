"""The commands that train.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import tyro

from jobs.flags import (
    ConfigFile,
    DecodeFlags,
    Shards,
    StoreFlags,
    require_positive,
)


@dataclasses.dataclass(frozen=True)
class Train(ConfigFile):
    """Train a causal video autoencoder on tars; the tiny presets take minutes on a CPU."""

    shards: Shards = ()
    """Tars to train on: paths, globs, {000..012} braces, @lists."""
    output: Path = tyro.MISSING
    """Directory for the model; `latentmill encode --encoder` takes it as it is."""
    kind: str = "vae"
    """One of ae, denoising_ae, sparse_ae, contractive_ae, vae, vq_vae, vq_vae_2, vq_gan, rvq, fsq, lfq or dvae."""
    preset: str = "tiny-4x8x8x16"
    """Size and compression of the model."""
    seconds: float = 120.0
    """How long to train."""
    frames: int = 9
    """Frames of a training clip, on the model's grid."""
    size: int = 64
    """Height and width of a training clip, in pixels."""
    batch_size: int = 4
    """Clips per step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of weights and order."""
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads of the trainer."""
    engine: DecodeFlags = DecodeFlags()


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
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads of the trainer."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds", "batch_size", "threads")
        if self.steps is not None:
            require_positive(self, "steps")
