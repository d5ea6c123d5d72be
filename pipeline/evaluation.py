"""What is measured of an autoencoder on held-out clips, and the records that hold it. Pure.

In:   a clip and its reconstruction, uint8 T H W 3; a latent's codes; shapes.
Out:  Scores, Rate, CodeUsage, the bicubic baseline; Evaluation, which holds the numbers of one encoder.
Cost: one clip at a time; of a set, a line of numbers per clip and a counter per code in use.
Errors: ValueError for what is no pair of clips.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.quality import flicker, psnr, ssim, temporal_psnr

SOURCE_BITS_PER_PIXEL = 24

FrameDistance = Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Scores:
    """How near a reconstruction is to its source (pipeline.quality); None where a number does not apply."""

    psnr: float
    ssim: float
    temporal_psnr: float | None
    flicker: float | None
    lpips: float | None = None


def score(source: np.ndarray, reconstruction: np.ndarray, lpips: FrameDistance | None = None) -> Scores:
    """The scores of one clip; `lpips` compares two clips uint8 T H W 3."""
    pair = source, reconstruction
    return Scores(psnr(*pair), ssim(*pair), temporal_psnr(*pair), flicker(*pair), lpips and lpips(*pair))


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of every number over the clips that have it: a clip counts once, however long it is."""
    means = {field.name: _mean([getattr(clip, field.name) for clip in scores]) for field in dataclasses.fields(Scores)}
    return Scores(**means)  # type: ignore[arg-type]  # psnr and ssim are numbers for every clip


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


@dataclasses.dataclass(frozen=True)
class Rate:
    """What clips cost when they are kept: numbers and bits, of so many pixels (T x H x W)."""

    numbers: int
    bits: float
    pixels: int

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.numbers + other.numbers, self.bits + other.bits, self.pixels + other.pixels)

    @property
    def numbers_per_pixel(self) -> float:
        """Stored values (of codes: ids) per pixel."""
        return self.numbers / self.pixels

    @property
    def bits_per_pixel(self) -> float:
        return self.bits / self.pixels

    @property
    def compression_ratio(self) -> float:
        """Bits of the uint8 RGB frames over bits of what is kept."""
        return SOURCE_BITS_PER_PIXEL * self.pixels / self.bits


@dataclasses.dataclass(frozen=True)
class CodeUsage:
    """How a codebook was used over the set: how many ids were seen, how many of its codes are among them.

    perplexity: the number of codes that, chosen equally often, would have the entropy of those that were seen.
    """

    codebook_size: int
    seen: int
    used: int
    perplexity: float

    @property
    def usage(self) -> float:
        """Share of the codes that were used at all."""
        return self.used / self.codebook_size


class CodeCounts:
    """Counts the ids of one codebook, clip by clip."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self._counts: Counter[int] = Counter()

    def update(self, ids: torch.Tensor) -> None:
        """Take in ids, int64 of any shape."""
        values, counts = torch.unique(ids, return_counts=True)
        self._counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def usage(self) -> CodeUsage:
        """What was seen so far."""
        seen = self._counts.total()
        entropy = -math.fsum(count / seen * math.log(count / seen) for count in self._counts.values())
        return CodeUsage(self.codebook_size, seen, len(self._counts), math.exp(entropy))


def bicubic_size(height: int, width: int, values_per_frame: float) -> tuple[int, int]:
    """The smallest (height, width), near the frame's aspect, whose RGB values are not fewer than those; at most whole.

    Among the sizes next to the ideal one, the one of fewest values that is not below them.
    """
    wanted = min(values_per_frame / 3, height * width)
    scale = math.sqrt(wanted / (height * width))
    rows, columns = math.floor(height * scale), math.floor(width * scale)
    near = [
        (min(max(1, row), height), min(max(1, column), width))
        for row in (rows, rows + 1)
        for column in (columns, columns + 1)
    ]
    return min((size for size in near if size[0] * size[1] >= wanted), key=lambda size: size[0] * size[1])


def bicubic(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Every frame of a clip uint8 T H W 3 made as small as (height, width), with antialiasing, and large again."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    large = F.interpolate(small, size=pixels.shape[2:], mode="bicubic")
    return large.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@dataclasses.dataclass(frozen=True)
class CodecResult:
    """One way to keep the clips: the encoder, or a baseline at its rate. Scores are means over the clips.

    frechet_distance: rFVD, between all sources and all reconstructions; None without a network, or below two clips.
    """

    name: str
    rate: Rate
    scores: Scores
    frechet_distance: float | None = None


@dataclasses.dataclass(frozen=True)
class LatentResult:
    """The encoder's latents; all None or empty where its kind has no such number.

    kl: KL(q(z|x) || N(0, 1)) in nats per latent element. elbo: nats per clip, under a Gaussian of `likelihood_scale`
    (pixels in [-1, 1]) around the decoder's 8-bit frames. elbo_bits_per_dimension: the same as bits per pixel value.
    """

    kl: float | None = None
    elbo: float | None = None
    elbo_bits_per_dimension: float | None = None
    likelihood_scale: float | None = None
    codes: tuple[CodeUsage, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClipResult:
    """One clip: its scores, one per codec in the order of Evaluation.codecs, and its latent's numbers."""

    key: str
    shard: str
    window: int
    bucket: str
    scores: tuple[Scores, ...]
    kl: float | None = None
    elbo_bits_per_dimension: float | None = None


@dataclasses.dataclass(frozen=True)
class FailedClip:
    """A clip that could not be judged, and why; window None: the whole sample."""

    key: str
    shard: str
    window: int | None
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The clips that PCA and the likelihood's scale were fitted to.

    held_out_shards: those that are judged as well; baselines fitted to them look better than they are.
    """

    clips: int
    failed: int
    held_out_shards: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ShownClip:
    """The middle frame of a clip for the contact sheet: source and, per codec, its reconstruction; uint8 H W 3."""

    key: str
    window: int
    source: np.ndarray
    reconstructions: tuple[np.ndarray, ...]
    scores: tuple[Scores, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What became of the held-out samples with one encoder. codecs[0] is the encoder, the baselines follow.

    filtered: samples by the reason why they have no clip.
    """

    source: str
    encoder: str
    fingerprint: str
    codecs: tuple[CodecResult, ...]
    latent: LatentResult
    clips: tuple[ClipResult, ...]
    failed: tuple[FailedClip, ...]
    filtered: Mapping[str, int]
    baseline: Baseline | None
    shown: tuple[ShownClip, ...] = dataclasses.field(repr=False, default=())

    def to_tree(self) -> dict[str, Any]:
        """All but the pictures, as plain JSON values."""
        tree = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("shown", "codecs")
        }
        return {**tree, "codecs": [{**_plain(codec), "rate": _rate_tree(codec.rate)} for codec in self.codecs]}


def _rate_tree(rate: Rate) -> dict[str, float]:
    names = ("numbers_per_pixel", "bits_per_pixel", "compression_ratio")
    return {**dataclasses.asdict(rate), **{name: getattr(rate, name) for name in names}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {**tree, "usage": value.usage} if isinstance(value, CodeUsage) else tree
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
