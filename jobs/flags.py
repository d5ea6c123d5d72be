"""Groups of flags that commands share, so that a flag means the same everywhere.

In:   nothing.
Out:  frozen dataclasses of which the commands are made; `--help` comes from the docstrings here and in pipeline.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.cores import usable_cores
from pipeline.buckets import BucketConfig
from pipeline.byte_window import LEAST_WINDOW_MB
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import DecoderName
from pipeline.errors import UsageError
from pipeline.filters import FilterConfig
from pipeline.recipe import EncodeConfig
from pipeline.sampling import SamplingConfig

Shards = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS...")]
Keys = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY...")]
Device = Literal["auto", "cpu", "cuda"]
POSITIONALS = frozenset({"shards", "keys"})
"""The fields that are not flags."""


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Every command takes its flags from a file, too."""

    config: Path | None = None
    """YAML file of flags (names as here) and shards; what the command line says wins."""


@dataclasses.dataclass(frozen=True)
class StoreFlags(ConfigFile):
    """Commands on a store."""

    store: str = tyro.MISSING
    """The store: a directory, or an s3:// or gs:// url."""


@dataclasses.dataclass(frozen=True)
class StoredLatentFlags(StoreFlags):
    """Commands that decode a store's latents back."""

    encoder: str | None = None
    """Where the encoder lies now; default: where it lay when the store was made."""
    device: Device = "auto"
    """Where the encoder runs; auto takes CUDA when there is one."""


@dataclasses.dataclass(frozen=True)
class DecodeFlags:
    """How videos are decoded; none of it changes a latent."""

    decode_workers: int = 0
    """Decode processes of a machine; 0: one for each CPU that may be used. On a Ray cluster that is joined: at most so
    many per node, beside all of its workers; 0: as many as its CPUs."""
    decode_timeout_seconds: float = 60.0
    """Time for a request, one video's windows; more for its bytes and frames. What takes longer is failed as `timeout`.
    Below 60 that happens to good videos where an object store is slow: its client tries again for nearly a minute."""
    decode_memory_mb: int = 4096
    """Address space of a decode process."""

    def __post_init__(self) -> None:
        require_positive(self, "decode_timeout_seconds", "decode_memory_mb")
        if self.decode_workers < 0:
            raise UsageError(f"--decode-workers must not be negative, got {self.decode_workers}")

    @property
    def decode_processes(self) -> int:
        """Decode processes of this machine."""
        return self.decode_workers or usable_cores()

    @property
    def decode_limits(self) -> DecodeLimits:
        """The limits of one decode process."""
        return DecodeLimits(timeout_seconds=self.decode_timeout_seconds, memory_bytes=self.decode_memory_mb << 20)


@dataclasses.dataclass(frozen=True)
class ClusterFlags(DecodeFlags):
    """Where the work is done."""

    local: bool = False
    """Run in this process, without Ray."""
    ray_address: str | None = None
    """Ray cluster to join; default: RAY_ADDRESS, else a cluster started on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local and self.ray_address:
            raise UsageError("--local runs without Ray: leave out --ray-address")

    @property
    def cluster_address(self) -> str | None:
        """The cluster to join; None: one is started on this machine."""
        return self.ray_address or os.environ.get("RAY_ADDRESS")

    @property
    def cluster_cpus(self) -> int:
        """CPUs of a cluster that is started on this machine."""
        return self.decode_processes

    @property
    def object_store_mb(self) -> int:
        """Shared memory of a cluster that is started on this machine."""
        return 128


@dataclasses.dataclass(frozen=True)
class TrialFlags(DecodeFlags):
    """How `plan --probe` tries, and what its estimate is for."""

    workers: int = 1
    """Encode workers (one GPU each with --device cuda)."""
    device: Device = "auto"
    """Where the encoder runs; auto takes CUDA when there is one."""
    encode_threads: int = 1
    """CPU threads with which each encode worker encodes; with two or more it makes two encoder calls at a time, on half
    of them each, where encoder and clips allow. Another number may change the last bits of a latent on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "workers", "encode_threads")


@dataclasses.dataclass(frozen=True)
class LimitFlags:
    """When to give up."""

    max_failed_share: float = 0.2
    """Share, 0 to 1: stop with an error when more of the samples cannot be read (judged when planning), or more of the
    clips fail (judged from 50 clips on, and at the end)."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise UsageError(f"--max-failed-share lies in 0..1, got {self.max_failed_share}")


@dataclasses.dataclass(frozen=True)
class PlacementFlags(ClusterFlags, abc.ABC):
    """Workers on Ray, and where they decode."""

    workers: int = 1
    """Workers of the job (one GPU each with --device cuda)."""
    window_mb: int = 0
    """Decoded frames that a worker may hold or wait for. 0: 512, or where an encode worker's clips are large, room for
    two of them per decode process and for four encoder batches, which leaves nothing idle."""
    decode_placement: Literal["worker", "cluster"] = "worker"
    """With Ray: decode in processes beside each worker, which share its node's CPUs (nothing crosses the network), or
    in tasks on any node (for GPU nodes that have too few CPUs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "workers")
        if self.window_mb < 0:
            raise UsageError(f"--window-mb must not be negative, got {self.window_mb}")
        if self.local and self.workers != 1:
            raise UsageError("--local runs one worker in this process: leave out --workers")
        if self.local and self.decode_placement != "worker":
            raise UsageError("--local decodes on this machine: leave out --decode-placement")
        if self.cluster_address and self.decode_placement == "cluster" and self.decode_workers:
            raise UsageError(
                f"with --decode-placement cluster the CPUs of the cluster {self.cluster_address} decode: "
                "leave out --decode-workers"
            )

    @abc.abstractmethod
    def worker_cpus(self, *, on_gpu: bool) -> int:
        """CPUs of a worker itself, without those that decode beside it."""

    @property
    @abc.abstractmethod
    def least_workers(self) -> int:
        """With fewer the job cannot run."""

    @property
    def cluster_cpus(self) -> int:
        return self.decode_processes + self.workers * self.worker_cpus(on_gpu=False)

    @property
    def object_store_mb(self) -> int:
        if self.decode_placement == "worker":
            return super().object_store_mb
        # Ray keeps the frames of every window, and a little beside them.
        return max(128, self.workers * self.usual_window_mb * 3 // 2)

    @property
    def usual_window_mb(self) -> int:
        """Of workers whose clips are not large, or whose frames come through Ray's object store."""
        return self.window_mb or LEAST_WINDOW_MB


@dataclasses.dataclass(frozen=True)
class EngineFlags(TrialFlags, PlacementFlags):
    """How the job runs; none of it changes a latent, but --encode-threads may change its last bits on a CPU."""

    units_in_flight: int = 3
    """Units leased to a worker at a time."""
    unit_timeout_seconds: float = 3600.0
    """A worker that holds n units and reports nothing for n times as long is killed and replaced (it may encode long
    clips of several units by turns)."""
    progress_seconds: float = 10.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "units_in_flight", "unit_timeout_seconds", "progress_seconds")

    def worker_cpus(self, *, on_gpu: bool) -> int:
        return 1 if on_gpu else self.encode_threads

    @property
    def least_workers(self) -> int:
        return 1


def require_positive(flags: object, *names: str) -> None:
    """Refuse a flag whose value is not above zero."""
    for name in names:
        if not getattr(flags, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(flags, name)}")


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """What the latents are made of. On a store that has a recipe, each defaults to the store's."""

    encoder: str | None = None
    """Directory of a trained model, or a hub id of a diffusers model."""
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    filters: FilterConfig = FilterConfig()
    encode: EncodeConfig = EncodeConfig()
    decoder: DecoderName = "auto"
    """auto takes the decoder that is right for the file."""
    caption_field: str | None = None
    """Take captions from this field of the samples' json instead of .txt."""
