"""The back end for animated WebP, which FFmpeg cannot decode: Pillow, and the same resampling as for videos.

In:   a byte range that holds a WebP.
Out:  MediaInfo; frames in presentation order, alpha over black, 8 bits.
Cost: the whole file in memory; every frame is decoded up to the last wanted one, by a probe all of them.
Errors: DecodeError `not_media`, `too_large`, `decode_error`; ShardError and UnitError from the storage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.fit import FrameFitter, Orientation, fitter_of
from pipeline.decode.image import decode_errors, opaque_rgb, open_image
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, MediaInfo, MediaSource
from pipeline.decode.source import open_source

_TICK = Fraction(1, 1000)


def is_webp(source: MediaSource) -> bool:
    """Whether the bytes begin as a WebP does. Raises ShardError, UnitError."""
    with open_source(source) as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


class AnimationBackend:
    """See the module's docstring."""

    name = "pillow"

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        image = _open(source, limits)
        starts = [start for start, _ in _shown(source, image)]
        seconds = (starts[-1] + image.info["duration"]) / 1000
        return MediaInfo(
            kind="video",
            container="webp",
            codec="webp",
            width=image.width,
            height=image.height,
            rotation_degrees=0,
            fps=len(starts) / seconds if seconds else 0.0,
            num_frames=len(starts),
            duration_seconds=seconds,
            pixel_format=image.mode,
            num_video_streams=1,
        )

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        image = _open(source, limits)
        fitter = fitter_of(source, shape, image.size, Fraction(1), Orientation(), limits)
        for index, (start, picture) in enumerate(_shown(source, image)):
            yield TimedFrame(index, start * _TICK, _TICK, functools.partial(_fitted, picture, fitter))


def _open(source: MediaSource, limits: DecodeLimits) -> WebPImageFile:
    image = open_image(source, limits)
    if not isinstance(image, WebPImageFile) or not image.is_animated:
        raise damage(source, "not_media", "a picture, and no video")
    if image.n_frames > limits.max_frames:
        raise damage(source, "too_large", f"more than {limits.max_frames} frames")
    return image


def _shown(source: MediaSource, image: WebPImageFile) -> Iterator[tuple[int, Image.Image]]:
    """(start in milliseconds, picture) of every frame. Raises DecodeError at the first damage."""
    for index in range(image.n_frames):
        with decode_errors(source):
            image.seek(index)
            image.load()
        yield image.info["timestamp"], image.copy()


def _fitted(picture: Image.Image, fitter: FrameFitter) -> np.ndarray:
    return fitter(av.VideoFrame.from_ndarray(opaque_rgb(picture), format="rgb24"))
