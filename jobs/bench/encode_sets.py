"""The sets and the encoders that engines are compared on, each made to show one thing.

In:   a set's name and how many tars; an encoder's name.
Out:  tars of generated videos; the flags of `plan` that cut their clips; encoders with random weights.
Cost: seconds per set; the tars of a set are one file under many names, since content makes no difference to time.
Errors: KeyError for a name that is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs.bench.config import BASE_PRESETS, RELEASED
from jobs.bench.videos import long_video, texture_video

Members = Iterator[tuple[str, bytes]]
_SQUARE = ("--sizes", "128x128")
_DAMAGE = bytes(range(256)) * 8


@dataclasses.dataclass(frozen=True)
class BenchSet:
    """What one tar of a set holds, how clips are cut from it, and in how large an encoder call they go.

    good_clips: how many clips of one tar can be decoded. batch_size: of tiny ones what a recipe takes by itself.
    """

    about: str
    members: Callable[[Path], Members]
    flags: tuple[str, ...]
    good_clips: int
    batch_size: int = 4


def write_tars(name: str, videos: Path, directory: Path, num_tars: int) -> list[Path]:
    """The tars of a set; `videos` keeps the generated videos for the next run."""
    directory.mkdir()
    first = directory / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number, (extension, payload) in enumerate(SETS[name].members(videos)):
            info = tarfile.TarInfo(f"{number:06d}.{extension}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    paths = [first, *(directory / f"{number:05d}.tar" for number in range(1, num_tars))]
    for path in paths[1:]:
        path.hardlink_to(first)
    return paths


def _short(videos: Path) -> Members:
    video = texture_video(videos, "h264", 360, 17).read_bytes()
    yield from (("mp4", video) for _ in range(32))


def _long(videos: Path) -> Members:
    video = long_video(videos, 720, 2).read_bytes()
    yield from (("mp4", video) for _ in range(4))


def _mixed(videos: Path) -> Members:
    clips = [texture_video(videos, codec, 360, frames) for codec in ("h264", "vp9") for frames in (9, 17, 40, 60)]
    pictures = [_picture(*size) for size in ((640, 360), (360, 640), (480, 480))]
    for path in clips:
        yield from (("mp4", path.read_bytes()) for _ in range(3))
    yield from (("jpg", picture) for picture in pictures for _ in range(4))


def _picture(width: int, height: int) -> bytes:
    from PIL import Image

    output = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(output, "JPEG")
    return output.getvalue()


def _broken(videos: Path) -> Members:
    video = texture_video(videos, "h264", 360, 34).read_bytes()
    middle = len(video) // 8  # within the frames of the first clip
    damaged = video[:middle] + _DAMAGE + video[middle + len(_DAMAGE) :]
    bad = {7: video[: len(video) * 2 // 3], 27: damaged}
    yield from (("mp4", bad.get(number, video)) for number in range(40))


def _tiny(videos: Path) -> Members:
    video = texture_video(videos, "h264", 64, 9).read_bytes()
    yield from (("mp4", video) for _ in range(128))


def _huge(videos: Path) -> Members:
    video = texture_video(videos, "h264", 720, 81).read_bytes()
    yield from (("mp4", video) for _ in range(2))


SETS: Mapping[str, BenchSet] = MappingProxyType(
    {
        "short": BenchSet("360p clips of exactly the wanted 17 frames", _short, ("--frames", "17", *_SQUARE), 32),
        "short-256": BenchSet(
            "360p clips of exactly 17 frames, at 256x256", _short, ("--frames", "17", "--sizes", "256x256"), 32
        ),
        "long": BenchSet(
            "two minutes of 720p each, of which four windows of 17 frames are wanted",
            _long,
            ("--frames", "17", "--windows", "uniform", "--num-windows", "4", *_SQUARE),
            16,
        ),
        "mixed": BenchSet(
            "images and clips of two codecs and four lengths, in seven buckets",
            _mixed,
            ("--frames", "9", "17", "33", "57", "--short", "smaller", "--sizes", "128x128", "96x160", "160x96"),
            36,
        ),
        "broken": BenchSet(
            "360p clips, of which one in forty is cut off and one in forty damaged inside",
            _broken,
            ("--frames", "17", *_SQUARE),
            38,
        ),
        "tiny": BenchSet(
            "many clips of 9 frames at 64x64: overhead",
            _tiny,
            ("--frames", "9", "--sizes", "64x64"),
            128,
            batch_size=64,
        ),
        "huge": BenchSet(
            "few clips of 81 frames at 480x832", _huge, ("--frames", "81", "--sizes", "480x832"), 2, batch_size=1
        ),
    }
)


def save_preset(directory: Path, name: str = "tiny-4x8x8x16") -> str:
    """A preset of ours with random weights; by default the smallest."""
    import torch

    from models.autoencoder import CausalAutoencoder
    from models.checkpoint import save_checkpoint
    from models.config import ModelConfig, preset
    from models.spec import Normaliser

    torch.manual_seed(0)
    model = CausalAutoencoder(ModelConfig(preset(name))).eval()
    channels = model.config.geometry.channels
    save_checkpoint(directory, model, Normaliser((0.0,) * channels, (1.0,) * channels))
    return str(directory)


def save_narrow_wan(directory: Path) -> str:
    """Wan 2.1 with a sixth of its width and random weights."""
    import diffusers
    import torch

    torch.manual_seed(0)
    wan: Any = diffusers.AutoencoderKLWan
    wan(base_dim=16).save_pretrained(directory)
    return str(directory)


def save_released(directory: Path, name: str) -> str:
    """A released model's config with random weights."""
    import diffusers
    import torch

    from models.pretrained import real_configs

    torch.manual_seed(0)
    class_name, arguments = real_configs()[name]
    getattr(diffusers, class_name)(**arguments).save_pretrained(directory)
    return str(directory)


SLEEPING: Mapping[str, float] = MappingProxyType({"balanced": 1.0, "decode-bound": 3.0, "encode-bound": 1 / 3})
"""Rehearsal encoders: how many times as fast as all cores decode."""
REAL: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {
        "tiny-vae": save_preset,
        "wan-2.1": save_narrow_wan,
        **{name: functools.partial(save_preset, name=name) for name in BASE_PRESETS},
        **{name: functools.partial(save_released, name=name.removesuffix("-full")) for name in RELEASED},
    }
)
"""Encoders that compute."""
