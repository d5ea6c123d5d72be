"""The commands that measure.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from jobs.flags import (
    ConfigFile,
    require_positive,
)


@dataclasses.dataclass(frozen=True)
class BenchDecode(ConfigFile):
    """Measure every decoder, `auto` and plain loops on the same generated videos; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for decode_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=lambda: f"cpu{os.cpu_count() or 1}")
    """What to call this machine in the file's name."""
    codecs: tuple[str, ...] = ("h264", "hevc", "vp9", "av1", "mpeg4")
    """Codecs of the rows."""
    heights: tuple[int, ...] = (360, 720)
    """Heights of the rows' 16:9 videos, in pixels."""
    frames: int = 120
    """Frames of a row's video."""
    side: int = 128
    """Height and width of the decoded frames, in pixels."""
    repetitions: int = 5
    """Rounds; medians are reported."""
    long_minutes: float = 10.0
    """Length of the video of which four windows are wanted."""
    long_height: int = 720
    """Its height, in pixels."""
    memory_minutes: float = 60.0
    """Length of the video whose peak memory is compared with that of a minute."""


@dataclasses.dataclass(frozen=True)
class BenchModel(ConfigFile):
    """Measure what our presets and the released diffusers configs cost to encode with; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for model_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=lambda: f"cpu{os.cpu_count() or 1}")
    """What to call this machine in the file's name."""
    models: tuple[str, ...] = ()
    """Presets and released configs to measure; default: all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; auto takes CUDA when there is one."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types to compute in."""
    compile: bool = True
    """Measure torch.compile as well."""
    frames: int = 17
    """Frames of the clip; cut to each model's grid."""
    size: int = 128
    """Its height and width, in pixels; rounded up to each model's grid."""
    repetitions: int = 3
    """Medians are reported."""
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads."""

    def __post_init__(self) -> None:
        require_positive(self, "frames", "size", "repetitions", "threads")
