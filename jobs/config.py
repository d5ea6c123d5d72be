"""The commands' flags: one frozen dataclass each, made of shared groups, so that a flag means the same everywhere.

In:   nothing.
Out:  dataclasses that tyro turns into flags; `--help` comes from the docstrings here and in pipeline.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.buckets import BucketConfig
from pipeline.decode.records import DecoderName
from pipeline.errors import UsageError
from pipeline.filters import FilterConfig
from pipeline.recipe import EncodeConfig
from pipeline.sampling import SamplingConfig

Shards = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS...")]
Keys = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY...")]
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
class DecodeFlags:
    """How videos are decoded; none of it changes a latent."""

    decode_workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Decode processes with --local; CPUs of the cluster that Ray starts on this machine otherwise."""
    decode_timeout_seconds: float = 60.0
    """A video that takes longer is failed as `timeout`; long videos get more, in proportion."""
    decode_memory_mb: int = 4096
    """Address space of a decode process."""

    def __post_init__(self) -> None:
        _require_positive(self, "decode_workers", "decode_timeout_seconds", "decode_memory_mb")


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
    def cluster_cpus(self) -> int:
        """CPUs of a cluster that is started on this machine."""
        return self.decode_workers

    @property
    def object_store_mb(self) -> int:
        """Shared memory of a cluster that is started on this machine."""
        return 128


@dataclasses.dataclass(frozen=True)
class TrialFlags(DecodeFlags):
    """How `plan --probe` tries, and what its estimate is for."""

    workers: int = 1
    """Encode workers (one GPU each with --device cuda)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs; auto takes CUDA when there is one."""
    encode_threads: int = 1
    """CPU threads of each encode worker. Fixed, since the number changes the last bits of a latent on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "workers", "encode_threads")


@dataclasses.dataclass(frozen=True)
class LimitFlags:
    """When to give up."""

    max_failed_share: float = 0.2
    """Stop with an error when more of the samples cannot be read, or more of the clips fail."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise UsageError(f"--max-failed-share lies in 0..1, got {self.max_failed_share}")


@dataclasses.dataclass(frozen=True)
class EngineFlags(TrialFlags, ClusterFlags):
    """How the job runs; none of it changes a latent, but --encode-threads may change its last bits on a CPU."""

    window_mb: int = 512
    """Decoded frames that an encode worker may hold or wait for."""
    units_in_flight: int = 3
    """Units leased to a worker at a time."""
    unit_timeout_seconds: float = 3600.0
    """A worker that holds units and reports nothing for so long is killed and replaced."""
    progress_seconds: float = 10.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "window_mb", "units_in_flight", "unit_timeout_seconds", "progress_seconds")
        if self.local and self.workers != 1:
            raise UsageError("--local runs one worker in this process: leave out --workers")

    @property
    def cluster_cpus(self) -> int:
        return self.decode_workers + self.workers * self.encode_threads

    @property
    def object_store_mb(self) -> int:
        # Ray keeps the frames of every window, and a little beside them.
        return max(128, self.workers * self.window_mb * 3 // 2)


def _require_positive(flags: object, *names: str) -> None:
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
    """Tars: paths, globs, {000..012} braces, @lists. None: go on with the store's plan."""
    recipe: RecipeFlags = RecipeFlags()
    limits: LimitFlags = LimitFlags()
    engine: EngineFlags = EngineFlags()


@dataclasses.dataclass(frozen=True)
class Status(StoreFlags):
    """Say what a store holds: done, left, filtered and failed by reason."""

    failures: int = 10
    """How many failed clips to list."""


@dataclasses.dataclass(frozen=True)
class Verify(StoreFlags):
    """Check every row's checksum, the ledger against plan and arrays, and a share of the clips against their source."""

    encoder: str | None = None
    """Where the encoder lies now; default: where it lay when the store was made."""
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
class Reconstruct(StoreFlags):
    """Decode stored clips and write source | reconstruction | error as a video and a film strip each."""

    keys: Keys = ()
    """Keys of the samples, as `status` and the ledger write them; SHARD.tar:KEY where several shards have the key."""
    output: Path = Path("reconstructions")
    """Directory for <key>.mp4 and <key>.png."""
    window: int = 0
    """Which of the sample's clips; 0 is the first."""
    encoder: str | None = None
    """Where the encoder lies now; default: where it lay when the store was made."""
    engine: DecodeFlags = DecodeFlags()


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
        _require_positive(self, "num", "frames", "size", "temperature", "fps")


@dataclasses.dataclass(frozen=True)
class Interpolate(StoreFlags):
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
    encoder: str | None = None
    """Where the encoder lies now; default: where it lay when the store was made."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"--steps counts both ends, so it is at least 2, got {self.steps}")


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
        _require_positive(self, "seconds", "batch_size", "threads")
        if self.steps is not None:
            _require_positive(self, "steps")


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
        _require_positive(self, "frames", "size", "repetitions", "threads")


COMMANDS: dict[str, type[ConfigFile]] = {
    "index": Index,
    "plan": PlanCommand,
    "encode": Encode,
    "status": Status,
    "verify": Verify,
    "reconstruct": Reconstruct,
    "sample": Sample,
    "interpolate": Interpolate,
    "train": Train,
    "train prior": TrainPrior,
    "synthesize": Synthesize,
    "bench decode": BenchDecode,
    "bench model": BenchModel,
}
