"""The commands that make clips: from a prior, between two latents, or from nothing.

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

from jobs.flags import (
    ConfigFile,
    Keys,
    StoredLatentFlags,
    require_positive,
)
from pipeline.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sample(ConfigFile):
    """Draw latents from a model's prior, decode them, and write the clips as a film strip and a video."""

    encoder: str = tyro.MISSING
    """Directory of a model that `train` made; of pretrained ones the prior is not known."""
    output: Path = Path("samples")
    """Directory for samples.mp4 and samples.png."""
    prior: str | None = None
    """gaussian (a KL model's own), aggregate (its latents' mean and std), uniform (over codes), or the directory that
    `train prior` made; default: the first that the model has."""
    num: int = 4
    """How many clips."""
    frames: int = 9
    """Frames of a clip, on the model's grid."""
    size: int = 64
    """Height and width of a clip, in pixels."""
    temperature: float = 1.0
    """Below 1 draws what is likelier: scales a Gaussian's std, divides a learned prior's logits."""
    top_k: int | None = None
    """Draw among so many likeliest codes, of a learned prior only."""
    fps: float = 8.0
    """Frames per second of the video."""
    seed: int = 0
    """Another seed draws other clips."""

    def __post_init__(self) -> None:
        require_positive(self, "num", "frames", "size", "temperature", "fps")


@dataclasses.dataclass(frozen=True)
class Interpolate(StoredLatentFlags):
    """Decode what lies between two stored clips. In a model of codes, what lies between them is no code of its own."""

    keys: Keys = ()
    """Keys of two samples, written as for `reconstruct`; their clips must be of one bucket."""
    output: Path = Path("interpolations")
    """Directory for the video and the film strip."""
    steps: int = 5
    """How many clips, both ends included."""
    path: Literal["line", "sphere"] = "line"
    """From end to end along a line, or along a sphere around the normaliser's mean."""
    window: int = 0
    """Which of each sample's clips; 0 is the first."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"--steps counts both ends, so it is at least 2, got {self.steps}")


@dataclasses.dataclass(frozen=True)
class Synthesize(ConfigFile):
    """Write practice tars of generated video: several codecs, sizes and lengths, a few broken on purpose."""

    output: Path = tyro.MISSING
    """Directory for the tars."""
    num_shards: int = 3
    """How many tars."""
    samples_per_shard: int = 20
    """Samples in each."""
    seed: int = 0
    """Another seed makes other videos."""
