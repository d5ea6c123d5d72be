"""A chart of known colours, stored by the book's formulas rather than by the library under test.

In:   a picture wide enough for two bars of patches; a matrix, a range, FFmpeg's pixel format.
Out:  a frame whose planes hold the chart; what the patches of a decoded picture hold.
Cost: none to speak of.
Errors: ValueError for a pixel format that is not listed here.
"""

from __future__ import annotations

import dataclasses

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext

PATCHES = np.array(
    [
        [200, 80, 40],
        [40, 170, 60],
        [50, 70, 190],
        [210, 200, 40],
        [180, 50, 170],
        [60, 180, 190],
        [235, 235, 235],
        [25, 25, 25],
    ],
    np.uint8,
)
_ROWS = len(PATCHES) // 2
# Kr and Kb of ITU-R BT.601, BT.709 and BT.2020, and FFmpeg's number of their colour space.
_MATRICES = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1), "bt2020": (0.2627, 0.0593, 9)}
_BITS = {"yuv420p10le": 10, "yuv422p10le": 10, "yuv444p10le": 10, "yuv420p12le": 12, "yuv444p12le": 12}


def add_chart(picture: np.ndarray) -> np.ndarray:
    """uint8 H W 3: with four patches down the left side and four down the right, each H/4 x H/4."""
    for square, colour in zip(_squares(*picture.shape[:2]), PATCHES, strict=True):
        picture[square] = colour
    return picture


def read_chart(picture: np.ndarray) -> np.ndarray:
    """float 8 x 3: the mean colour of the middle of every patch."""
    margin = max(1, picture.shape[0] // _ROWS // 4)
    inner = [
        tuple(slice(side.start + margin, side.stop - margin) for side in square)
        for square in _squares(*picture.shape[:2])
    ]
    return np.stack([picture[square].reshape(-1, 3).mean(axis=0) for square in inner])


def _squares(height: int, width: int) -> list[tuple[slice, slice]]:
    side = height // _ROWS
    return [
        (slice(row * side, (row + 1) * side), slice(left, left + side))
        for left in (0, width - side)
        for row in range(_ROWS)
    ]


@dataclasses.dataclass(frozen=True)
class Colour:
    """How colours are stored: the matrix and range, and whether the stream says so."""

    matrix: str = "bt601"
    full_range: bool = False
    tagged: bool = True
    bar_alpha: int | None = None

    @property
    def expected(self) -> np.ndarray:
        """float 8 x 3: what PATCHES are after they are laid over black."""
        return PATCHES * ((255 if self.bar_alpha is None else self.bar_alpha) / 255)

    def tag(self, context: VideoCodecContext) -> None:
        """Write the matrix and range into the stream."""
        if self.tagged:
            context.colorspace = _MATRICES[self.matrix][2]
            context.color_range = 2 if self.full_range else 1

    def frame(self, picture: np.ndarray, pixel_format: str) -> av.VideoFrame:
        """uint8 H W 3 as a frame; with `bar_alpha`, everything outside the centred square has that alpha."""
        if pixel_format in ("argb", "bgra", "rgba", "rgb24", "yuva420p", "yuva444p10le"):
            frame = self._with_alpha(picture).reformat(format=pixel_format)
        else:
            frame = self._stored(picture, pixel_format)
        if self.tagged:
            frame.colorspace, frame.color_range = _MATRICES[self.matrix][2], 2 if self.full_range else 1
        return frame

    def _with_alpha(self, picture: np.ndarray) -> av.VideoFrame:
        height, width = picture.shape[:2]
        alpha = np.full((height, width, 1), self.bar_alpha, np.uint8)
        alpha[:, (width - height) // 2 : (width + height) // 2] = 255
        return av.VideoFrame.from_ndarray(np.concatenate([picture, alpha], axis=2), format="rgba")

    def _stored(self, picture: np.ndarray, pixel_format: str) -> av.VideoFrame:
        kr, kb, _ = _MATRICES[self.matrix]
        red, green, blue = np.moveaxis(picture / 255.0, 2, 0)
        luma = kr * red + (1 - kr - kb) * green + kb * blue
        low, span, chroma_span = (0, 255, 255) if self.full_range else (16, 219, 224)
        planes = [low + span * luma]
        planes += [128 + chroma_span * c for c in ((blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr))]
        if "444" not in pixel_format:
            planes[1:] = [plane[:, ::2] for plane in planes[1:]]
        if "420" in pixel_format:
            planes[1:] = [plane[::2] for plane in planes[1:]]
        bits = _BITS.get(pixel_format, 8)
        frame = av.VideoFrame(picture.shape[1], picture.shape[0], pixel_format)
        for target, plane in zip(frame.planes, planes, strict=True):
            values = np.clip(np.rint(plane * 2 ** (bits - 8)), 0, 2**bits - 1)
            typed = values.astype(np.uint8 if bits == 8 else np.dtype("<u2"))
            padded = np.zeros((target.height, target.line_size // typed.itemsize), typed.dtype)
            padded[:, : typed.shape[1]] = typed
            target.update(padded.tobytes())
        return frame
