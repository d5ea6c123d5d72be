"""The words between whoever wants frames and whoever decodes them.

In:   a MediaSource (a byte range of a file), a ClipShape (size and fit), Windows on a Grid.
Out:  a MediaInfo, or one DecodedClip per window: uint8 frames, T H W 3, RGB, upright, at the bucket's size.
Cost: none; records that check themselves.
Errors: ValueError from a record that cannot be; DecodeError (pipeline.errors) inside a result, never raised across it.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Literal

import numpy as np

from pipeline.errors import DecodeError

MediaKind = Literal["video", "image"]
DecoderName = Literal["auto", "pyav", "decord", "torchcodec"]
Fit = Literal["crop", "stretch"]
Filter = Literal["area", "bicubic"]


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """`size_bytes` bytes at `offset` of the file at `path`: one video or image. `key` is for messages."""

    path: str
    offset: int
    size_bytes: int
    kind: MediaKind
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where a clip's frames may lie in time: integer positions k = 0, 1, 2, ...

    fps None: position k is frame k * frame_step of the video, counted in presentation order.
    fps set:  position k is the frame on screen k / fps seconds after the first frame (the last one whose pts is not
              later); frame_step must be 1.
    """

    fps: Fraction | None = None
    frame_step: int = 1

    def __post_init__(self) -> None:
        if self.fps is not None and (self.fps <= 0 or self.frame_step != 1):
            raise ValueError(
                f"a grid has a positive fps or a frame step, got fps={self.fps} frame_step={self.frame_step}"
            )
        if self.frame_step < 1:
            raise ValueError(f"frame_step must be at least 1, got {self.frame_step}")

    def length(self, num_frames: int, duration_seconds: float) -> int:
        """How many positions a video has: its frames on a native grid, its screen time on an fps grid."""
        if self.fps is None:
            return -(-num_frames // self.frame_step)
        # A millionth of a position forgives the rounding of durations that are stored as floats.
        return max(1, int(-(-(duration_seconds * float(self.fps) - 1e-6) // 1))) if num_frames else 0


@dataclasses.dataclass(frozen=True)
class Window:
    """Positions [start, start + num_frames) of a Grid."""

    start: int
    num_frames: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.num_frames < 1:
            raise ValueError(f"a window starts at 0 or later and has frames, got {self.start=} {self.num_frames=}")


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """The size of every decoded frame, and how a frame of another aspect gets there.

    fit "crop": scale until both sides cover, keeping the display aspect, then cut the centre. "stretch": scale each
    side by itself. `filter` is the resampling kernel, stated in the recipe.
    """

    height: int
    width: int
    fit: Fit = "crop"
    filter: Filter = "area"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a clip has pixels, got {self.height}x{self.width}")


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a video or image is, as its container says (upright: width and height after rotation and pixel aspect).

    `num_frames` and `duration_seconds` count shown frames; they come from the container's index where it has one
    (mp4, mov), else from a pass over the packets. An image has one frame, duration 0 and fps 0. `interlaced`: the first
    frame is flagged as two fields, which frames keep woven together.
    """

    kind: MediaKind
    container: str
    codec: str
    width: int
    height: int
    rotation_degrees: int
    fps: float
    num_frames: int
    duration_seconds: float
    pixel_format: str
    num_video_streams: int
    interlaced: bool = False


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """Several windows of one video or image, wanted at one size."""

    source: MediaSource
    grid: Grid
    windows: tuple[Window, ...]
    shape: ClipShape
    decoder: DecoderName = "auto"

    @property
    def decoded_bytes(self) -> int:
        """Size of all wanted frames."""
        return sum(window.num_frames for window in self.windows) * self.shape.height * self.shape.width * 3

    @property
    def frame_shapes(self) -> list[tuple[int, int, int, int]]:
        """T H W 3 of each window."""
        return [(window.num_frames, self.shape.height, self.shape.width, 3) for window in self.windows]


@dataclasses.dataclass(frozen=True)
class DecodedClip:
    """One window's frames.

    frames: uint8, T H W 3, RGB. pts_seconds: float64, T, the presentation time of the frame taken for each position,
    measured from the video's first frame. decoder: the back end that made it. cpu_seconds, wait_seconds: its share of
    what the request cost the decode process, at work and waiting (for bytes, or for a core).
    """

    frames: np.ndarray
    pts_seconds: np.ndarray
    decoder: str
    cpu_seconds: float = 0.0
    wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[3] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames are uint8 T H W 3, got {self.frames.shape=} {self.frames.dtype=}")
        if self.pts_seconds.shape != self.frames.shape[:1]:
            raise ValueError(f"one pts per frame, got {self.pts_seconds.shape=} {self.frames.shape=}")


DecodeOutcome = DecodedClip | DecodeError
