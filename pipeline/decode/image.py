"""The image back end: Pillow, and the same resampling as for videos.

In:   a byte range that holds a PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF or PPM.
Out:  MediaInfo; one frame: the first picture, upright by its EXIF orientation, alpha over black, 8 bits.
Cost: the whole file and the whole picture in memory.
Errors: DecodeError `not_media`, `too_large`, `decode_error`, `unsupported_heic`; ShardError and UnitError from the
    storage.

Colour profiles are not applied: values are taken as sRGB.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.decode.backend import TimedFrame, damage
from pipeline.decode.fit import Orientation, fitter_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, MediaInfo, MediaSource
from pipeline.decode.source import open_source

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_EXIF_ORIENTATION = 0x0112
_CLOCKWISE_DEGREES = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}
# What Pillow's parsers raise on broken files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class PillowBackend:
    """See the module's docstring."""

    name = "pillow"

    def probe(self, source: MediaSource, limits: DecodeLimits) -> MediaInfo:
        image = open_image(source, limits)
        degrees = _CLOCKWISE_DEGREES.get(_exif_orientation(source, image), 0)
        width, height = image.size if degrees % 180 == 0 else image.size[::-1]
        name = (image.format or "").lower()
        return MediaInfo(
            kind="image",
            container=name,
            codec=name,
            width=width,
            height=height,
            rotation_degrees=degrees,
            fps=0.0,
            num_frames=1,
            duration_seconds=0.0,
            pixel_format=image.mode,
            num_video_streams=0,
        )

    def frames(self, source: MediaSource, shape: ClipShape, limits: DecodeLimits) -> Iterator[TimedFrame]:
        image = open_image(source, limits)
        with decode_errors(source):
            picture = opaque_rgb(ImageOps.exif_transpose(image))
        height, width = picture.shape[:2]
        fitter = fitter_of(source, shape, (width, height), Fraction(1), Orientation(), limits)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        yield TimedFrame(0, Fraction(0), Fraction(1), lambda: fitter(frame))


@contextlib.contextmanager
def decode_errors(source: MediaSource) -> Iterator[None]:
    """Pillow's exceptions become DecodeError; what it merely warns of, broken EXIF above all, is let pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise damage(source, "too_large", f"a picture of more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise damage(source, "not_media", f"not one of {', '.join(_FORMATS)}") from error
    except _BROKEN as error:
        raise damage(source, "decode_error", _text(error)) from error


def open_image(source: MediaSource, limits: DecodeLimits) -> Image.Image:
    """The image's header; nothing is decoded yet."""
    with open_source(source, whole=True) as file:
        data = file.read()
    if _is_heic(data):
        raise damage(
            source, "unsupported_heic", "neither Pillow nor FFmpeg puts HEIC together; convert it, to AVIF say"
        )
    with decode_errors(source):
        Image.open(BytesIO(data), formats=_FORMATS).verify()  # PNG's checksums, which loading passes over
        image = Image.open(BytesIO(data), formats=_FORMATS)
    if image.width * image.height > limits.max_pixels:
        text = f"a picture of {image.width}x{image.height}, the limit is {limits.max_pixels} pixels"
        raise damage(source, "too_large", text)
    return image


def _is_heic(data: bytes) -> bool:
    """By the brands of its `ftyp` box (ISO/IEC 23008-12, 10.2), of which AVIF has others."""
    size = int.from_bytes(data[:4], "big")
    brands = {data[start : start + 4] for start in (8, *range(16, min(size, len(data), 256), 4))}
    return data[4:8] == b"ftyp" and bool(brands & _HEIC_BRANDS)


def _exif_orientation(source: MediaSource, image: Image.Image) -> int:
    with decode_errors(source):
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def opaque_rgb(image: Image.Image) -> np.ndarray:
    """Uint8 H W 3."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB"))


def _text(error: Exception) -> str:
    # Some of Pillow's messages hold an object's repr, with its address.
    return f"{type(error).__name__} in the picture" if " at 0x" in str(error) else str(error) or type(error).__name__
