"""The command that compares recipes.

In:   nothing.
Out:  a frozen dataclass that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from jobs.cores import usable_cores
from jobs.evaluate.config import EvaluateSettings
from jobs.flags import ConfigFile, DecodeFlags, Shards, require_positive
from pipeline.buckets import BucketConfig
from pipeline.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Compare(ConfigFile):
    """Train every recipe on the same tars and judge the models on others, in one table. Run it again to go on."""

    shards: Shards = ()
    """Tars to train on, and to fit PCA to: paths, globs, {000..012} braces, @lists."""
    recipes: tuple[Path, ...] = ()
    """YAML files as of `train --config`; each is trained in this machine's processes, as with --local."""
    held_out: tuple[str, ...] = ()
    """Tars to judge on."""
    output: Path = tyro.MISSING
    """Directory for comparison.md, comparison.json, and a directory per recipe with its model, run and log. A model
    that is there is not trained again."""
    settings: EvaluateSettings = EvaluateSettings(
        sampling=SamplingConfig(frames=(9,)), buckets=BucketConfig(sizes=("32x32",))
    )
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads of the judge; how many a training has is its recipe's."""
    engine: DecodeFlags = DecodeFlags()

    def __post_init__(self) -> None:
        require_positive(self, "threads")
