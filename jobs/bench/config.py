"""The commands that measure.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

from jobs.cores import usable_cores
from jobs.flags import (
    ConfigFile,
    Device,
    Shards,
    require_positive,
)
from pipeline.errors import UsageError

ENCODE_SETS = ("short", "short-256", "long", "mixed", "broken", "tiny", "huge")
RELEASED = ("wan-2.1-full", "ltx-0.9-full")
BASE_PRESETS = ("base-4x8x8x16", "base-4x16x16x48", "base-8x32x32x128")
ENCODE_ENCODERS = ("balanced", "decode-bound", "encode-bound", "tiny-vae", "wan-2.1", *BASE_PRESETS, *RELEASED)
Contender = Literal["local", "ray-1", "ray-2", "plain", "dataloader", "decord", "ray-data"]
OURS: tuple[Contender, ...] = ("local", "ray-1", "ray-2")
TINY_VAE = "tiny-vae"
_HANDOVER_FRAMES = 57  # where the last window ends whose hand-over is measured
OTHERS: tuple[Contender, ...] = ("plain", "dataloader", "decord", "ray-data")


def _machine_name() -> str:
    return f"cpu{usable_cores()}"


@dataclasses.dataclass(frozen=True)
class BenchDecode(ConfigFile):
    """Measure every decoder, `auto` and plain loops on the same generated videos; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for decode_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=_machine_name)
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

    def __post_init__(self) -> None:
        require_positive(self, "side", "repetitions", "long_minutes", "long_height")
        if self.frames < _HANDOVER_FRAMES:
            raise UsageError(f"--frames must be at least {_HANDOVER_FRAMES}, got {self.frames}")
        if self.memory_minutes <= 1:
            raise UsageError(f"--memory-minutes must be more than 1, got {self.memory_minutes}")


@dataclasses.dataclass(frozen=True)
class BenchModel(ConfigFile):
    """Measure what our presets and the released diffusers configs cost to encode with; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for model_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=_machine_name)
    """What to call this machine in the file's name."""
    models: tuple[str, ...] = ()
    """Presets and released configs to measure; default: all."""
    device: Device = "auto"
    """Where the models run; auto takes CUDA when there is one."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types to compute in."""
    compile: bool = True
    """Measure torch.compile as well."""
    layouts: tuple[Literal["contiguous", "channels_last_3d"], ...] = ("contiguous",)
    """Memory formats of the weights of 3-D convolutions."""
    frames: int = 17
    """Frames of the clip; cut to each model's grid."""
    size: int = 128
    """Its height and width, in pixels; rounded up to each model's grid."""
    repetitions: int = 3
    """Medians are reported."""
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads."""

    def __post_init__(self) -> None:
        require_positive(self, "frames", "size", "repetitions", "threads")


@dataclasses.dataclass(frozen=True)
class BenchEncode(ConfigFile):
    """Measure whole jobs against what people run today, on the same clips and encoder; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for encode_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=_machine_name)
    """What to call this machine in the file's name."""
    cases: tuple[str, ...] = (
        *(f"{name}:balanced" for name in ENCODE_SETS if name != "short-256"),
        *(f"{name}:{speed}" for name in ("short", "long") for speed in ("decode-bound", "encode-bound")),
        *(f"short:{encoder}" for encoder in ("tiny-vae", "wan-2.1")),
    )
    """SET:ENCODER. Sets: short, short-256, long, mixed, broken, tiny, huge. Encoders that sleep as a GPU would:
    balanced (as fast as all cores decode), decode-bound (3 times as fast), encode-bound (a third); that compute:
    tiny-vae, wan-2.1 (a sixth of its width) and, for a GPU, base-4x8x8x16, base-4x16x16x48, base-8x32x32x128,
    wan-2.1-full and ltx-0.9-full."""
    device: Device = "auto"
    """Where encoders compute; auto takes CUDA when there is one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What they compute in."""
    contenders: tuple[Contender, ...] = (*OURS, *OTHERS)
    """Ours: local, ray-1 and ray-2 (encode workers). Others: plain (a script), dataloader (with PyAV), decord (with a
    DataLoader), ray-data."""
    seconds_per_set: float = 60.0
    """What a case's clips take at least on all cores: what its number of clips comes from."""
    repetitions: int = 3
    """Rounds in which the contenders take turns; medians are reported."""
    cores: int = dataclasses.field(default_factory=usable_cores)
    """Cores that every contender is held to, each in its turn."""
    decode_workers: int = 0
    """Decode processes of every contender that has some; 0: one for each of the cores."""
    encode_threads: int = 0
    """CPU threads of the encoder, of all encode workers together; 0: one with CUDA, else one for each of the cores."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds_per_set", "repetitions", "cores")
        for flag, value in (("--decode-workers", self.decode_workers), ("--encode-threads", self.encode_threads)):
            if value < 0:
                raise UsageError(f"{flag} must not be negative, got {value}")
        known = [":".join(pair) for pair in itertools.product(ENCODE_SETS, ENCODE_ENCODERS)]
        for case in self.cases:
            if case not in known:
                raise UsageError(
                    f"--cases {case}: say SET:ENCODER with a set of {', '.join(ENCODE_SETS)} and an encoder of "
                    f"{', '.join(ENCODE_ENCODERS)}"
                )

    @property
    def decode_processes(self) -> int:
        """Of every contender that has some."""
        return self.decode_workers or self.cores

    def threads_on(self, device: str) -> int:
        """CPU threads of the encoder, where it computes on this device."""
        return self.encode_threads or (1 if device == "cuda" else self.cores)


@dataclasses.dataclass(frozen=True)
class BenchTrain(ConfigFile):
    """Measure how long training waits for clips, and our loader against others; writes Markdown and JSON."""

    shards: Shards = ()
    """Tars of whole videos, at least one for each decode worker; default: generated ones."""
    output: Path = Path()
    """Directory for train_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=_machine_name)
    """What to call this machine in the file's name."""
    frames: int = 9
    """Frames of a training clip."""
    size: int = 64
    """Height and width of a training clip, in pixels."""
    batch_size: int = 4
    """Clips per step."""
    decode_workers: int = dataclasses.field(default_factory=usable_cores)
    """Decode processes of our loader, and workers of the others."""
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads of a busy step."""
    step_seconds: float = 0.3
    """What a step takes: asleep, as with a GPU, and busy on all threads."""
    steps: int = 50
    """Steps that are measured, of each kind."""
    repetitions: int = 3
    """Rounds in which the loaders take turns; medians are reported."""
    videos: int = 64
    """Generated videos."""
    video_height: int = 240
    """Height of the generated 16:9 videos, in pixels."""
    video_frames: int = 90
    """Their length."""

    def __post_init__(self) -> None:
        names = ("frames", "size", "batch_size", "decode_workers", "threads", "step_seconds", "steps", "repetitions")
        require_positive(self, *names, "videos", "video_height", "video_frames")


@dataclasses.dataclass(frozen=True)
class BenchScale(ConfigFile):
    """Measure what grows and what must not: the driver with 1e6 units, memory, start-up; writes Markdown and JSON."""

    output: Path = Path()
    """Directory for scale_<hardware>_<date>.md and .json."""
    hardware: str = dataclasses.field(default_factory=_machine_name)
    """What to call this machine in the file's name."""
    parts: tuple[Literal["controller", "books", "memory", "start"], ...] = ("controller", "books", "memory", "start")
    """What to measure: leasing units to fake workers; reading the ledger of a finished store; the peak memory of a
    job's processes; the parts of a small job's wall time."""
    engines: tuple[Literal["local", "ray"], ...] = ("local", "ray")
    """Engines of memory and start; Ray takes the first encoder only."""
    encoders: tuple[str, ...] = ("rehearsal:4x8x8x16@20", TINY_VAE)
    """Encoders of memory and start: rehearsal:TxHxWxC@MEGAPIXELS (sleeps), tiny-vae (computes; random weights)."""
    units: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Units that the controller leases to one fake worker."""
    workers: tuple[int, ...] = (10, 100, 1_000)
    """Numbers of fake workers that it leases `worker_units` to."""
    worker_units: int = 20_000
    """Units for those."""
    books_units: tuple[int, ...] = (1_000, 10_000)
    """Fragments in the ledger."""
    video_seconds: tuple[int, int] = (60, 600)
    """Lengths of the short and the long video whose memory is compared."""
    video_height: int = 240
    """Their height, in pixels."""
    videos: int = 16
    """How many of them a job reads, four clips each."""
    clips: tuple[int, int] = (100, 1_000)
    """Few and many clips, of short videos, whose memory is compared."""
    start_clips: int = 32
    """Clips of the one tar that start-up is measured with."""
    size: int = 64
    """Height and width of the clips, in pixels."""
    repetitions: int = 3
    """Local starts of which the median is reported; Ray starts once."""

    def __post_init__(self) -> None:
        require_positive(self, "worker_units", "video_height", "videos", "start_clips", "size", "repetitions")
        for name in ("units", "workers", "books_units", "video_seconds", "clips"):
            if not min(getattr(self, name), default=0) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("video_seconds", "clips"):
            few, many = getattr(self, name)
            if few >= many:
                raise UsageError(f"--{name.replace('_', '-')} must be a smaller and a larger number, got {few} {many}")
