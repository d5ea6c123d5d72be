"""Distances that need a network, whose weights the user brings: LPIPS of frames, and the Fréchet video distance.

In:   files of weights; clips and their reconstructions, uint8 T H W 3.
Out:  one LPIPS a clip, the mean over frames; one Fréchet distance per codec over the whole set.
Cost: the networks, once per frame or clip and side; two means and covariances per codec.
Errors: UsageError for files that hold no such network, and for clips that it does not take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.lpips import load_lpips
from models.pixels import to_pixels
from pipeline.errors import UsageError
from pipeline.evaluation import FrameDistance
from pipeline.frechet import FeatureStatistics, frechet_distance
from pipeline.video_features import VideoFeatures


class FrechetDistances:
    """The Fréchet distances between all sources and what each codec made of them; of stills there is none."""

    def __init__(self, weights: Path | None, device: str, num_codecs: int) -> None:
        self.features = None if weights is None else VideoFeatures(weights, device)
        self.statistics = [FeatureStatistics() for _ in range(1 + num_codecs)]

    def update(self, clips: Sequence[np.ndarray]) -> None:
        """Take in a source and its reconstructions."""
        if self.features is None or len(clips[0]) == 1:
            return
        for statistics, frames in zip(self.statistics, clips, strict=True):
            statistics.update(self.features(frames))

    def result(self, number: int) -> float | None:
        """That of codec `number`; None without a network, or below two clips."""
        source, *made = self.statistics
        return frechet_distance(source, made[number]) if source.count > 1 else None


def open_lpips(weights: Path | None, device: str) -> FrameDistance | None:
    """LPIPS of two clips uint8 T H W 3, a frame at a time, so that memory does not grow with T; None without weights.

    Raises:
        UsageError: no LPIPS network is in the file; and later, for frames that are too small.
    """
    if weights is None:
        return None
    try:
        network = load_lpips(weights).to(device)
    except ValueError as error:
        raise UsageError(f"--lpips-weights: {error}") from error

    def distance(source: np.ndarray, reconstruction: np.ndarray) -> float:
        try:
            with torch.inference_mode():
                frames = zip(reconstruction, source, strict=True)
                values = [
                    float(network(*(to_pixels(torch.from_numpy(frame)[None, None], device) for frame in pair)))
                    for pair in frames
                ]
        except ValueError as error:
            raise UsageError(f"--lpips-weights: {error}") from error
        return math.fsum(values) / len(values)

    return distance
