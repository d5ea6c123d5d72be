"""The commands on a store and on the tars it is made of.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jobs.flags import (
    ClusterFlags,
    DecodeFlags,
    EngineFlags,
    Keys,
    LimitFlags,
    RecipeFlags,
    Shards,
    StoredLatentFlags,
    StoreFlags,
    TrialFlags,
)
from pipeline.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Index(StoreFlags):
    """Scan tars and probe their videos: one parquet fragment per shard, reused while the shard is unchanged."""

    shards: Shards = ()
    """Tars: paths, globs, {000..012} braces, @lists."""
    engine: ClusterFlags = ClusterFlags()


@dataclasses.dataclass(frozen=True)
class PlanCommand(StoreFlags):
    """Give every clip its bucket and row, and say what encoding will cost, before anything is spent."""

    recipe: RecipeFlags = RecipeFlags()
    limits: LimitFlags = LimitFlags()
    probe: bool = False
    """Encode a few clips for real and estimate the hours of the whole."""
    trial: TrialFlags = TrialFlags()

    def __post_init__(self) -> None:
        if not self.probe and self.trial != TrialFlags():
            raise UsageError("--workers, --device, --encode-threads and --decode-* of plan need --probe")


@dataclasses.dataclass(frozen=True)
class Encode(StoreFlags):
    """Encode tars into a store of latents: index, plan, encode. Run it again to go on; what is committed stays."""

    shards: Shards = ()
    """Tars: paths, globs, {000..012} braces, @lists. None: all that are indexed in the store."""
    recipe: RecipeFlags = RecipeFlags()
    limits: LimitFlags = LimitFlags()
    engine: EngineFlags = EngineFlags()


@dataclasses.dataclass(frozen=True)
class Status(StoreFlags):
    """Say what a store holds: done, left, filtered and failed by reason."""

    failures: int = 10
    """How many failed clips to list."""


@dataclasses.dataclass(frozen=True)
class Verify(StoredLatentFlags):
    """Check every row's checksum, the ledger against plan and arrays, and a share of the clips against their source."""

    share: float = 0.02
    """Share of the clips to decode back and compare with their source (at least one per bucket; 0 for none)."""
    min_psnr: float = 0.0
    """Fail when a compared clip reconstructs worse, in dB."""
    worst: int = 5
    """How many of the worst clips to name."""
    engine: DecodeFlags = DecodeFlags()

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"--share lies in 0..1, got {self.share}")


@dataclasses.dataclass(frozen=True)
class Reconstruct(StoredLatentFlags):
    """Decode stored clips and write source | reconstruction | error as a video and a film strip each."""

    keys: Keys = ()
    """Keys of the samples: column `key` of STORE/samples/*.parquet, or of STORE/ledger/*/*.parquet until the store is
    complete; SHARD.tar:KEY where several shards have the key."""
    output: Path = Path("reconstructions")
    """Directory for <key>.mp4 and <key>.png."""
    window: int = 0
    """Which of the sample's clips; 0 is the first."""
    engine: DecodeFlags = DecodeFlags()
