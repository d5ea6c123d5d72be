"""Which size a clip gets: the buckets of a job, and the choice among them.

In:   a BucketConfig, the encoder's spatial stride, a sample's upright height and width.
Out:  sizes (height, width), and Bucket, the shape T x H x W that names an array of the store.
Cost: microseconds a sample.
Errors: UsageError from a config, or a size off the encoder's grid; ValueError from a Bucket that cannot be;
        SampleError for a sample without pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from fractions import Fraction
from typing import get_args

from pipeline.decode.records import Filter, Fit
from pipeline.errors import SampleError, UsageError

ASPECT_RATIOS = ("1:1", "4:3", "3:4", "16:9", "9:16", "3:2", "2:3", "21:9")
DEFAULT_SIZES = ("256x256",)

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """The sizes of clips, given or derived from a number of pixels; a video takes the nearest aspect ratio."""

    sizes: tuple[str, ...] = ()
    """Sizes as HEIGHTxWIDTH, on the encoder's grid; 256x256 when there is no pixel_budget either."""
    pixel_budget: int | None = None
    """Instead of sizes: every aspect ratio gets the size on the encoder's grid that is next to its ideal one, with at
    most this many pixels and as near to them as can be."""
    aspect_ratios: tuple[str, ...] = ASPECT_RATIOS
    """Ratios WIDTH:HEIGHT for pixel_budget."""
    fit: Fit = "crop"
    """How a frame gets another aspect ratio: "crop" covers the size and cuts the centre; "stretch" distorts."""
    filter: Filter = "area"
    """Kernel that frames are scaled with."""

    def __post_init__(self) -> None:
        if self.sizes and self.pixel_budget is not None:
            raise UsageError(f"give sizes or pixel_budget, not both: got {self.sizes} and {self.pixel_budget}")
        if self.fit not in get_args(Fit) or self.filter not in get_args(Filter):
            raise UsageError(
                f"fit is one of {get_args(Fit)}, filter of {get_args(Filter)}: got {self.fit} {self.filter}"
            )
        if self.pixel_budget is None:
            self._check_sizes()
        else:
            self._check_budget(self.pixel_budget)

    def _check_sizes(self) -> None:
        if self.aspect_ratios != ASPECT_RATIOS:
            raise UsageError(f"aspect_ratios {self.aspect_ratios} need a pixel_budget")
        # The recipe that is stored names the sizes that were used, the default ones too.
        object.__setattr__(self, "sizes", self.sizes or DEFAULT_SIZES)
        for size in self.sizes:
            _parse_size(size)

    def _check_budget(self, pixel_budget: int) -> None:
        if pixel_budget < 1 or not self.aspect_ratios:
            raise UsageError(
                f"pixel_budget must be positive, with an aspect ratio: got {pixel_budget} {self.aspect_ratios}"
            )
        for ratio in self.aspect_ratios:
            _parse_ratio(ratio)


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One shape of clips, T x H x W pixels; ordered by frames, height, width."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.num_frames, self.height, self.width) < 1:
            raise ValueError(f"a bucket has frames and pixels, got {self.num_frames}x{self.height}x{self.width}")

    @property
    def decoded_bytes(self) -> int:
        """Size of a clip's uint8 frames."""
        return self.num_frames * self.height * self.width * 3

    @property
    def name(self) -> str:
        """TxHxW, as the arrays of the store are called: "17x256x256"."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> Bucket:
        """The bucket with this name.

        Raises:
            ValueError: it is not the name of a bucket.
        """
        numbers = _numbers(name, "x", 3)
        if numbers is None:
            raise ValueError(f"bucket {name!r} is not frames x height x width, as in 17x256x256")
        return cls(*numbers)


def resolve_sizes(config: BucketConfig, spatial_stride: int) -> tuple[Size, ...]:
    """The sizes (height, width) of a job, sorted and unique, each a multiple of the encoder's spatial stride.

    Raises:
        UsageError: a given size is off the stride (the message names the nearest on it), or the budget has no room
            for an aspect ratio.
    """
    if config.pixel_budget is None:
        sizes = [_on_stride(_parse_size(size), spatial_stride) for size in config.sizes]
    else:
        sizes = [_size_of_ratio(ratio, config.pixel_budget, spatial_stride) for ratio in config.aspect_ratios]
    return tuple(sorted(set(sizes)))


@functools.lru_cache(maxsize=4096)  # Videos have few shapes, and exact fractions are slow.
def choose_size(sizes: tuple[Size, ...], height: int, width: int) -> Size:
    """The size whose aspect ratio is nearest to height x width, by the distance of logarithms.

    Among equally near ones: the largest that needs no upscaling, else the smallest.

    Raises:
        SampleError: height or width is not positive (reason "no_pixels").
    """
    if height < 1 or width < 1:
        raise SampleError("no_pixels", f"height {height}, width {width}")

    def order(size: Size) -> tuple[Fraction, int, Size]:
        # |log a - log b| orders as max(a / b, b / a), which a fraction holds without rounding.
        ratio = Fraction(size[1] * height, size[0] * width)
        upscaled = size[0] > height or size[1] > width
        area = size[0] * size[1]
        return max(ratio, 1 / ratio), area if upscaled else -area, size

    return min(sizes, key=order)


def _on_stride(size: Size, stride: int) -> Size:
    if size[0] % stride == 0 and size[1] % stride == 0:
        return size
    height, width = (max(1, (side + stride // 2) // stride) * stride for side in size)
    raise UsageError(
        f"size {size[0]}x{size[1]} is not on the encoder's grid, multiples of {stride}: the nearest is {height}x{width}"
    )


def _size_of_ratio(ratio: str, pixel_budget: int, stride: int) -> Size:
    """Of the up to four sizes on the grid around the ideal one, the largest within the budget."""
    wide, high = _parse_ratio(ratio)
    rows = math.isqrt(pixel_budget * high // wide) // stride
    columns = math.isqrt(pixel_budget * wide // high) // stride
    around = [
        (row * stride, column * stride)
        for row in (rows, rows + 1)
        for column in (columns, columns + 1)
        if 0 < row * column * stride * stride <= pixel_budget
    ]
    if not around:
        raise UsageError(
            f"pixel_budget {pixel_budget} has no room for {ratio} in multiples of {stride}: "
            "raise it, or leave the ratio out of aspect_ratios"
        )
    largest = max(height * width for height, width in around)
    return choose_size(tuple(size for size in around if size[0] * size[1] == largest), high, wide)


def _parse_size(text: str) -> Size:
    numbers = _numbers(text, "x", 2)
    if numbers is None:
        raise UsageError(f"size {text!r} is not height x width, as in 256x256")
    return numbers[0], numbers[1]


def _parse_ratio(text: str) -> tuple[int, int]:
    """(width, height) of "16:9"."""
    numbers = _numbers(text, ":", 2)
    if numbers is None:
        raise UsageError(f"aspect ratio {text!r} is not width:height, as in 16:9")
    return numbers[0], numbers[1]


def _numbers(text: str, separator: str, count: int) -> list[int] | None:
    """The positive numbers of "a x b x c" written without spaces and leading zeros, or None."""
    parts = text.split(separator)
    if len(parts) != count or not all(re.fullmatch("[1-9][0-9]{0,8}", part) for part in parts):
        return None
    return [int(part) for part in parts]
