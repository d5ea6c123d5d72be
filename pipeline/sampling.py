"""Which windows of a video become clips.

In:   a SamplingConfig, the length of a video on the config's grid, and the sample's key.
Out:  a Grid, and per video a WindowPlan: windows in ascending start order, or the reason why there are none.
Cost: microseconds a video; memory does not grow with the video: starts are a range, or at most `num_windows` numbers.
Errors: UsageError from a config that contradicts itself; a video that is too short is filtered, not an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

from pipeline.decode.records import Grid, Window
from pipeline.errors import UsageError

WindowMode = Literal["head", "center", "uniform", "slide", "chunks", "random"]
ShortRule = Literal["drop", "pad", "smaller"]

NTSC_FPS = tuple(Fraction(nominal * 1000, 1001) for nominal in (24, 30, 48, 60, 120))


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How clips are cut from a video's frames."""

    frames: tuple[int, ...] = (17,)
    """Clip lengths, each on the encoder's grid; the longest that fits is taken. Several need short "smaller"."""
    fps: float | None = None
    """Resample in time to this rate. None keeps the video's own frames, every `frame_step`-th of them."""
    frame_step: int = 1
    """Without fps: take every so many frames."""
    windows: WindowMode = "head"
    """Which clips: "head", the first frames; "center", the middle; "uniform", `num_windows` evenly spaced from the
    first to the last possible start; "slide", one every `stride` frames; "chunks", side by side; "random",
    `num_windows` different starts drawn from `seed` and the sample's key."""
    num_windows: int = 1
    """Clips per video with windows "uniform" or "random"; a video with fewer possible starts gives each once."""
    stride: int | None = None
    """Frames (after fps or frame_step) from one start to the next with windows "slide"."""
    short: ShortRule = "drop"
    """A video shorter than the longest of `frames`: "drop" filters it; "pad" makes one clip, filled up with the last
    frame (and keeps the last partial one with windows "chunks"); "smaller" takes the next smaller of `frames`."""
    seed: int = 0
    """With windows "random": another seed draws other starts."""

    def __post_init__(self) -> None:
        self._check_values()
        self._check_nothing_is_ignored()

    def _check_values(self) -> None:
        if self.windows not in get_args(WindowMode):
            raise UsageError(f"windows {self.windows!r} is unknown: use one of {', '.join(get_args(WindowMode))}")
        if self.short not in get_args(ShortRule):
            raise UsageError(f"short {self.short!r} is unknown: use one of {', '.join(get_args(ShortRule))}")
        if not self.frames or min(self.frames) < 1 or len(set(self.frames)) < len(self.frames):
            raise UsageError(f"frames must be different positive clip lengths, got {self.frames}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(f"fps must be positive, got {self.fps}")
        for name in ("frame_step", "num_windows", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.windows == "slide" and self.stride is None:
            raise UsageError("windows 'slide' needs a stride, in grid positions")

    def _check_nothing_is_ignored(self) -> None:
        uncounted = self.windows not in ("uniform", "random")
        ignored = {
            f"num_windows={self.num_windows} needs windows 'uniform', 'random'": uncounted and self.num_windows != 1,
            f"stride={self.stride} needs windows 'slide'": self.stride is not None and self.windows != "slide",
            f"seed={self.seed} needs windows 'random'": self.seed != 0 and self.windows != "random",
            f"frame_step={self.frame_step} needs fps unset": self.frame_step != 1 and self.fps is not None,
            f"several frames {self.frames} need short 'smaller'": len(self.frames) > 1 and self.short != "smaller",
        }
        for message, is_ignored in ignored.items():
            if is_ignored:
                raise UsageError(f"{message}, got windows={self.windows!r} fps={self.fps} short={self.short!r}")


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """The windows of one video: clips of `num_frames` (T) positions at `starts`, or why there are none (`filtered`)."""

    num_frames: int
    grid_length: int
    starts: Sequence[int] = ()
    filtered: str | None = None

    @property
    def count(self) -> int:
        """How many windows there are; 0 when filtered."""
        return len(self.starts)

    def window(self, index: int) -> Window:
        """The index-th window; with fewer than T frames where the caller has to repeat the last one.

        Raises:
            IndexError: there is no such window.
        """
        start = self.starts[index]
        return Window(start, min(self.num_frames, self.grid_length - start))


def grid(config: SamplingConfig) -> Grid:
    """The positions in time that the config's windows count."""
    return Grid(fps=None if config.fps is None else exact_fps(config.fps), frame_step=config.frame_step)


def exact_fps(fps: float) -> Fraction:
    """The rate that a decimal stands for: 29.97 is 30000/1001, 0.333... is 1/3, 12.5 is 25/2."""
    for rate in NTSC_FPS:
        if abs(fps - float(rate)) < 0.005:
            return rate
    simple = Fraction(fps).limit_denominator(1001)
    return simple if float(simple) == fps else Fraction(str(fps))


def sample_windows(config: SamplingConfig, grid_length: int, key: str) -> WindowPlan:
    """The windows of a video of `grid_length` positions (`Grid.length`); filtered "short_video" when T does not fit.

    `key` is the sample's, and matters for "random" only: the same (seed, key) draws the same starts everywhere.
    """
    fitting = max((length for length in config.frames if length <= grid_length), default=0)
    num_frames = max(config.frames) if config.short == "pad" and grid_length > 0 else fitting
    if not num_frames or (config.short == "drop" and num_frames < max(config.frames)):
        return WindowPlan(0, grid_length, filtered="short_video")
    return WindowPlan(num_frames, grid_length, _starts(config, num_frames, grid_length, key))


def image_window() -> WindowPlan:
    """The one window of an image, which is a clip with T = 1 whatever the config says."""
    return WindowPlan(num_frames=1, grid_length=1, starts=(0,))


def _starts(config: SamplingConfig, num_frames: int, grid_length: int, key: str) -> Sequence[int]:
    last = max(0, grid_length - num_frames)
    match config.windows:
        case "head":
            return (0,)
        case "center":
            return (last // 2,)
        case "uniform":
            return _uniform_starts(min(config.num_windows, last + 1), last)
        case "slide":
            return range(0, last + 1, config.stride or 1)
        case "chunks":
            return range(0, grid_length if config.short == "pad" else last + 1, num_frames)
        case "random":
            return _random_starts(min(config.num_windows, last + 1), last, config.seed, key)


def _uniform_starts(count: int, last: int) -> tuple[int, ...]:
    """`count` starts from 0 to `last`, rounded to the nearest; they differ because count <= last + 1."""
    if count == 1:
        return (last // 2,)
    gaps = count - 1
    return tuple((2 * index * last + gaps) // (2 * gaps) for index in range(count))


def _random_starts(count: int, last: int, seed: int, key: str) -> tuple[int, ...]:
    """`count` different starts of 0..last, every set as likely (Floyd: Bentley and Floyd, CACM 30(9), 1987)."""
    chosen: set[int] = set()
    for bound in range(last - count + 1, last + 1):
        start = _draw(seed, key, bound) % (bound + 1)
        chosen.add(bound if start in chosen else start)
    return tuple(sorted(chosen))


def _draw(seed: int, key: str, index: int) -> int:
    """128 bits that depend on nothing but the arguments (Python's `hash` changes from process to process)."""
    text = f"{seed}/{index}/{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
