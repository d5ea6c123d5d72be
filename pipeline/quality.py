"""How near a reconstructed clip is to its source: PSNR and SSIM of the frames; PSNR of the changes, and flicker.

In:   two clips of one shape, uint8, T H W 3, as numpy arrays or torch tensors on the CPU.
Out:  one number a pair, the mean over frames; of changes from frame to frame, None for a still (T = 1).
Cost: one frame in float64 at a time: memory does not grow with T; SSIM about 10 ms a 256 x 256 frame, PSNR 1 ms.
Errors: ValueError when the clips are not two uint8 clips of one shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

Clip = np.ndarray | torch.Tensor

PEAK = 255.0
MAX_PSNR_DB = 100.0
WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal-to-noise ratio in dB: the mean over frames of 10 log10(255^2 / mse(frame)), each at most 100 dB."""
    return _mean(_frame_psnr(frame_a, frame_b) for frame_a, frame_b in _frame_pairs(a, b))


def ssim(a: Clip, b: Clip) -> float:
    """Structural similarity, 1 for equal clips: the mean over frames, channels and window positions.

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, positions wholly inside the frame, each
    RGB channel by itself, no downscaling before. In a frame with a side under 11 pixels the window is cut to that
    side. Wang, Bovik, Sheikh, Simoncelli: "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4), 2004.
    """
    return _mean(_frame_ssim(frame_a, frame_b) for frame_a, frame_b in _frame_pairs(a, b))


def temporal_psnr(a: Clip, b: Clip) -> float | None:
    """PSNR in dB of the changes from each frame to the next: the mean over changes, each at most 100 dB.

    The peak is 255, as of frames, so that a constant error, which cancels, counts as none.
    """
    errors = (frame_b - frame_a for frame_a, frame_b in _frame_pairs(a, b))
    return _mean_or_none(_frame_psnr(before, after) for before, after in itertools.pairwise(errors))


def flicker(source: Clip, reconstruction: Clip) -> float | None:
    """By how much more the reconstruction changes than the source does: 0 where it is still, in 8-bit levels.

    The mean over pixels and changes of max(0, |change of the reconstruction| - |change of the source|).
    """
    pairs = itertools.pairwise(_frame_pairs(source, reconstruction))
    return _mean_or_none(
        float(((made_after - made).abs() - (shown_after - shown).abs()).clamp(min=0).mean())
        for (shown, made), (shown_after, made_after) in pairs
    )


def _mean(values: Iterator[float]) -> float:
    collected = list(values)
    return math.fsum(collected) / len(collected)


def _mean_or_none(values: Iterator[float]) -> float | None:
    collected = list(values)
    return math.fsum(collected) / len(collected) if collected else None


def _frame_pairs(a: Clip, b: Clip) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The frames of both clips, float64, 3 H W."""
    clips = np.asarray(a), np.asarray(b)
    for clip in clips:
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.size == 0 or clip.dtype != np.uint8:
            raise ValueError(f"a clip is uint8 T H W 3, got {clip.dtype} {clip.shape}")
    if clips[0].shape != clips[1].shape:
        raise ValueError(f"the clips differ in shape: {clips[0].shape} and {clips[1].shape}")
    for frame_a, frame_b in zip(*clips, strict=True):
        yield _channels_first(frame_a), _channels_first(frame_b)


def _channels_first(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame.astype(np.float64)).permute(2, 0, 1)


def _frame_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    mse = float((a - b).square().mean())
    return min(MAX_PSNR_DB, 10 * math.log10(PEAK**2 / mse)) if mse else MAX_PSNR_DB


def _frame_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _local_mean(torch.stack([a, b, a * a, b * b, a * b]))
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    variances = (mean_aa - mean_a**2) + (mean_bb - mean_b**2)
    structure = (2 * (mean_ab - mean_a * mean_b) + C2) / (variances + C2)
    return float((luminance * structure).mean())


def _local_mean(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian mean around every position where the window lies inside; N C H W in, N C H' W' out."""
    for side in (2, 3):
        weights = _gaussian(min(WINDOW_SIZE, maps.shape[side]))
        positions = maps.shape[side] - len(weights) + 1
        total = torch.zeros_like(maps.narrow(side, 0, positions))
        for offset, weight in enumerate(weights):
            total.add_(maps.narrow(side, offset, positions), alpha=weight)
        maps = total
    return maps


def _gaussian(size: int) -> list[float]:
    weights = [math.exp(-((index - (size - 1) / 2) ** 2) / (2 * WINDOW_SIGMA**2)) for index in range(size)]
    return [weight / sum(weights) for weight in weights]
