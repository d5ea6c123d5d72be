"""From a stored frame to an upright one at the clip's size.

In:   an av.VideoFrame of any pixel format, its pixel aspect and display matrix, a ClipShape.
Out:  uint8 H W 3, RGB: scaled by swscale while it converts, turned upright, cut at the centre.
Cost: one conversion at the target's size; turning and cutting are views.
Errors: ValueError for a turn that is no multiple of 90 degrees, or a scaled frame beyond max_pixels; DecodeError
    `too_large` for the latter from `fitter_of`.

Colour: the frame's own matrix and range tags count, BT.601 limited range where there are none (swscale's rule, and
ffmpeg's). Bits beyond 8 are rounded away, alpha is laid over black, HDR curves and interlaced lines stay as they are.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.decode.backend import damage
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, MediaSource

# Exact on every machine: no shortcut that depends on the CPU's instructions.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
_KERNELS = {"area": Interpolation.AREA | _EXACT, "bicubic": Interpolation.BICUBIC | _EXACT}


@dataclasses.dataclass(frozen=True)
class Orientation:
    """How stored rows and columns become upright ones: transpose, then mirror; clockwise_degrees is for people."""

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    clockwise_degrees: int = 0

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """From the frame's display matrix (ISO/IEC 14496-12, 6.2.2: x' = a x + c y, y' = b x + d y).

        Raises:
            ValueError: the matrix turns by another angle than a multiple of 90 degrees.
        """
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        a, b, _, c, d = (int(value) for value in np.frombuffer(_buffer(data), np.int32)[:5])
        degrees = -frame.rotation % 360
        if a == d == 0 and b and c:
            return cls(transposed=True, mirror_x=c < 0, mirror_y=b < 0, clockwise_degrees=degrees)
        if b == c == 0 and a and d:
            return cls(transposed=False, mirror_x=a < 0, mirror_y=d < 0, clockwise_degrees=degrees)
        raise ValueError(f"the display matrix turns by {degrees} degrees, not by a multiple of 90")

    @property
    def mirrored(self) -> bool:
        """Whether this is more than a turn."""
        return (self.mirror_x != self.mirror_y) != self.transposed

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """A view of H W 3 pixels, turned."""
        turned = picture.swapaxes(0, 1) if self.transposed else picture
        return turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def _buffer(plane: object) -> memoryview:
    return cast("memoryview", plane)  # PyAV's objects are buffers, which its type stubs leave out


def _over_black(rgba: np.ndarray) -> np.ndarray:
    weighted: np.ndarray = (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] + 127) // 255
    return weighted.astype(np.uint8)


def display_size(width: int, height: int, pixel_aspect: Fraction, orientation: Orientation) -> tuple[int, int]:
    """(width, height) as a viewer sees it: square pixels, upright."""
    wide = max(1, round(width * pixel_aspect))
    return (height, wide) if orientation.transposed else (wide, height)


class FrameFitter:
    """Brings all frames of one video to one ClipShape.

    Raises:
        ValueError: the frame before cutting would have more than `max_pixels`.
    """

    def __init__(
        self,
        shape: ClipShape,
        width: int,
        height: int,
        pixel_aspect: Fraction,
        orientation: Orientation,
        max_pixels: int,
    ) -> None:
        self._shape, self._orientation = shape, orientation
        upright = (shape.width, shape.height)
        if shape.fit == "crop":
            # Exact fractions, so that the size does not hang on a float's last bit.
            wide, high = width * pixel_aspect, Fraction(height)
            seen_wide, seen_high = (high, wide) if orientation.transposed else (wide, high)
            scale = max(shape.width / seen_wide, shape.height / seen_high)
            upright = (max(shape.width, round(seen_wide * scale)), max(shape.height, round(seen_high * scale)))
        if upright[0] * upright[1] > max_pixels:
            raise ValueError(f"scaled to {upright[0]}x{upright[1]} to cover the clip")
        self._left, self._top = (upright[0] - shape.width) // 2, (upright[1] - shape.height) // 2
        self._scaled = upright[::-1] if orientation.transposed else upright
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Uint8 H W 3; a view of a buffer of its own."""
        width, height = self._scaled
        has_alpha = any(component.is_alpha for component in frame.format.components)
        scaled = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgba" if has_alpha else "rgb24",
            src_colorspace=frame.colorspace,
            src_color_range=frame.color_range,
            interpolation=_KERNELS[self._shape.filter],
            threads=1,
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(_buffer(plane), np.uint8).reshape(plane.height, plane.line_size)
        channels = 4 if has_alpha else 3
        stored = rows[:, : width * channels].reshape(height, width, channels)
        picture = self._orientation.upright(_over_black(stored) if has_alpha else stored)
        return picture[self._top : self._top + self._shape.height, self._left : self._left + self._shape.width]


def fitter_of(
    source: MediaSource,
    shape: ClipShape,
    size: tuple[int, int],
    pixel_aspect: Fraction,
    orientation: Orientation,
    limits: DecodeLimits,
) -> FrameFitter:
    """The FrameFitter for frames of a width and height. Raises DecodeError `too_large`."""
    try:
        return FrameFitter(shape, *size, pixel_aspect, orientation, limits.max_pixels)
    except ValueError as error:
        raise damage(source, "too_large", str(error)) from error
