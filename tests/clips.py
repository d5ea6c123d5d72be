"""Small generated media for everyone's tests: videos whose every frame carries its number, and broken files.

In:   codec, container, size, rate, presentation times.
Out:  bytes of a whole file, the same for the same arguments; `read_number` says which frame a decoded picture is.
Cost: 1 to 5 ms per frame of 96 x 96 pixels.
Errors: ValueError from `read_number` when a picture is no numbered frame, or not upright.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from pipeline.decode.records import MediaKind, MediaSource
from pipeline.synthetic import keeping_priority
from tests.colours import Colour, add_chart

os.environ.setdefault("SVT_LOG", "1")  # errors only

NUMBER_BITS = 12
_CELLS = 4
_UPRIGHT = (1, 0, 0, 0)  # the last row of cells: a turned or mirrored picture reads differently
_DARK, _BRIGHT = 40, 215
_STEADY = {
    "libx264": {"x264-params": "cpu-independent=1"},  # else its bytes differ from run to run
    "libx265": {"x265-params": "log-level=none", "preset": "ultrafast"},
    "libsvtav1": {"preset": "8"},  # SVT-AV1 4.1 makes broken streams of our pictures with 10 and above
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"},
}
_NO_RANDOM_IDS = {"fflags": "+bitexact"}


def numbered_picture(number: int, width: int = 96, height: int = 96) -> np.ndarray:
    """uint8 H W 3: `number` as 4 x 4 dark or bright cells in the centred square, on a colour ramp."""
    bits = [number >> bit & 1 for bit in range(NUMBER_BITS)]
    cells = np.array([*bits, *_UPRIGHT]).reshape(_CELLS, _CELLS)
    picture = np.empty((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(60, 200, width)
    picture[..., 1] = np.linspace(60, 200, height)[:, None]
    picture[..., 2] = 120
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    index = np.arange(side) * _CELLS // side
    picture[top : top + side, left : left + side] = np.where(cells, _BRIGHT, _DARK)[index][:, index, None]
    return picture


def read_number(picture: np.ndarray) -> int:
    """The number in an upright uint8 H W 3 picture, scaled or cropped about its centre down to the square.

    Raises:
        ValueError: the cells are neither dark nor bright, or not upright.
    """
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    centres = [(2 * cell + 1) * side // (2 * _CELLS) for cell in range(_CELLS)]
    luma = picture[top : top + side, left : left + side].astype(np.float32).mean(axis=2)
    reach = max(1, side // 16)
    levels = [
        luma[row - reach : row + reach, column - reach : column + reach].mean() for row in centres for column in centres
    ]
    bits = [int(level > 128) for level in levels]
    if min(abs(level - 128) for level in levels) < 40 or tuple(bits[NUMBER_BITS:]) != _UPRIGHT:
        raise ValueError(f"not an upright numbered frame: cells {[round(float(level)) for level in levels]}")
    return sum(bit << place for place, bit in enumerate(bits[:NUMBER_BITS]))


@keeping_priority()
def numbered_video(
    num_frames: int = 30,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    size: tuple[int, int] = (96, 96),
    fps: Fraction | int = 25,
    pts_ms: Sequence[int] | None = None,
    start_ms: int = 0,
    rotation_degrees: int = 0,
    pixel_aspect: Fraction = Fraction(1),
    pixel_format: str = "yuv420p",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    colour: Colour | None = None,
) -> bytes:
    """A whole video file whose frame i shows `i`.

    Args:
        num_frames: frames, numbered from 0.
        codec: FFmpeg encoder; key frames every 12 frames and B-frames unless `codec_options` say otherwise.
        container: FFmpeg muxer ("mp4", "matroska", "webm", "mpegts", "avi", "gif", "mov").
        size: (width, height) of the upright frames, in stored pixels.
        fps: frame rate, when `pts_ms` is not given.
        pts_ms: presentation time of every frame in milliseconds, for variable frame rate.
        start_ms: added to every presentation time.
        rotation_degrees: clockwise turn that a player has to apply, in the display matrix; frames are stored turned
            the other way, so that they show upright.
        pixel_aspect: width over height of a stored pixel; frames are stored squeezed, so that they show square cells.
        pixel_format: FFmpeg name.
        codec_options: FFmpeg encoder options.
        container_options: FFmpeg muxer options.
        colour: adds the colour chart, stored and tagged as told; not for turned or squeezed frames.
    """
    time_base = 1 / Fraction(fps) if pts_ms is None and not start_ms else Fraction(1, 1000)
    times = pts_ms if pts_ms is not None else [round(i / Fraction(fps) / time_base) for i in range(num_frames)]
    # A real file, because `movflags=faststart` opens it a second time.
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container, options=_NO_RANDOM_IDS | (container_options or {})) as output:
            stream = output.add_stream(codec, rate=Fraction(fps))
            assert isinstance(stream, VideoStream)
            stream.width, stream.height = size if rotation_degrees % 180 == 0 else size[::-1]
            stream.pix_fmt = pixel_format
            stream.time_base = stream.codec_context.time_base = time_base
            stream.codec_context.sample_aspect_ratio = pixel_aspect
            stream.codec_context.gop_size = 12
            stream.codec_context.thread_count = 1
            stream.options = _encoder_options(codec, codec_options or {})
            if colour is not None:
                colour.tag(stream.codec_context)
            if rotation_degrees:
                stream.set_display_rotation(-rotation_degrees)
            for number, time in enumerate(times[:num_frames]):
                if colour is not None:
                    frame = colour.frame(add_chart(numbered_picture(number, *size)), pixel_format)
                else:
                    picture = _stored_picture(number, size, pixel_aspect, rotation_degrees)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = time + start_ms, time_base
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return Path(file.name).read_bytes()


def _encoder_options(codec: str, given: dict[str, str]) -> dict[str, str]:
    """What keeps the encoder quiet and its bytes the same, then what was asked for, which counts in a conflict."""
    steady = _STEADY.get(codec, {})
    both = {key: f"{steady[key]}:{given[key]}" for key in steady.keys() & given.keys() if key.endswith("-params")}
    return steady | given | both


def _stored_picture(number: int, size: tuple[int, int], pixel_aspect: Fraction, rotation_degrees: int) -> np.ndarray:
    turned = rotation_degrees % 180 != 0
    width, height = size[::-1] if turned else size
    shown = round(width * pixel_aspect)
    upright = numbered_picture(number, *((height, shown) if turned else (shown, height)))
    columns = (np.arange(width) * 2 + 1) * shown // (2 * width)
    return np.ascontiguousarray(np.rot90(upright, rotation_degrees // 90)[:, columns])


def trimmed_video(video: bytes, *, skip: int = 0, without: int | None = None, container: str = "mp4") -> bytes:
    """The same packets with an edit list that hides the first `skip` frames, as cutters without re-encoding write.

    Or without one of them, by its place in the file.
    """
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(video)) as source,
        av.open(buffer, "w", format=container, options={"avoid_negative_ts": "disabled"}) as output,
    ):
        original = source.streams.video[0]
        copy = output.add_stream_from_template(original)
        for place, packet in enumerate(source.demux(original)):
            if packet.dts is None or packet.pts is None or place == without:
                continue
            shift = skip * packet.duration
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            output.mux(packet)
    return buffer.getvalue()


def audio_only(seconds: float = 0.5) -> bytes:
    """An mp4 without a video stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        samples = np.zeros((1, int(16000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def numbered_image(
    number: int = 5,
    *,
    format: str = "png",  # noqa: A002 (Pillow's word)
    size: tuple[int, int] = (96, 96),
    exif_orientation: int = 1,
    alpha: int | None = None,
) -> bytes:
    """An image file that shows `number`; stored turned, for `exif_orientation` to put upright; `alpha` all over."""
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    picture = Image.fromarray(numbered_picture(number, *size))
    transpose = stored[exif_orientation]
    if transpose is not None:
        picture = picture.transpose(transpose)
    if alpha is not None:
        picture.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    buffer = io.BytesIO()
    picture.save(buffer, format=format, exif=exif, **({"quality": 95} if format in ("jpeg", "webp") else {}))
    return buffer.getvalue()


def stored(directory: Path, data: bytes, kind: MediaKind = "video", key: str = "clip") -> MediaSource:
    """The data inside a file, with other bytes before and after it, as in a tar."""
    number = len(list(directory.iterdir()))
    path = directory / f"{number}.bin"
    path.write_bytes(b"\x55" * 512 + data + b"\xaa" * 512)
    return MediaSource(str(path), 512, len(data), kind, key)


def real_data() -> Path | None:
    """The folder with real clips and shards (LATENTMILL_DATA, or ../shared/data), when this machine has one."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LATENTMILL_DATA", default))
    return folder if folder.is_dir() else None
