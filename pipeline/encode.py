"""From decoded clips to stored rows: one fixed slice of a unit at a time.

In:   a slice's decoded clips (or errors) in row order, and the encoder.
Out:  stored rows [n, C, t, h, w] of its n clips and, per clip, RowFacts or the error.
Cost: one encoder call per slice, always at the full batch size.
Errors: none for bad clips, they are results; the encoder's own exceptions pass through.

A failed clip and the missing tail of a short slice are zeros in the batch: on most hardware the batch size changes the
last bits of a latent, so it must not depend on what failed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from models.spec import Posterior, VideoEncoder
from pipeline.commit import RowFacts, RowResult
from pipeline.decode.records import DecodedClip, DecodeOutcome
from pipeline.errors import SampleError
from pipeline.placement import Clip
from pipeline.recipe import Recipe
from pipeline.store import to_float32, to_stored


def to_batch(clips: Sequence[Clip], outcomes: Sequence[DecodeOutcome], batch_size: int) -> np.ndarray:
    """uint8 frames [B, T, H, W, 3] of a slice; short windows are padded by repeating their last frame."""
    bucket = clips[0].bucket
    batch = np.zeros((batch_size, bucket.num_frames, bucket.height, bucket.width, 3), np.uint8)
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, DecodedClip):
            valid = len(outcome.frames)
            batch[place, :valid] = outcome.frames
            batch[place, valid:] = outcome.frames[-1]
    return batch


def encode_slice(
    encoder: VideoEncoder, recipe: Recipe, clips: Sequence[Clip], outcomes: Sequence[DecodeOutcome]
) -> tuple[np.ndarray, list[RowResult]]:
    """Stored rows of a slice and what became of each of its clips."""
    shape = recipe.row_shape(clips[0].bucket)
    if not any(isinstance(outcome, DecodedClip) for outcome in outcomes):
        empty = to_stored(np.full((len(clips), *shape), np.nan, np.float32), recipe.encode.dtype)
        return empty, [outcome for outcome in outcomes if isinstance(outcome, SampleError)]
    batch = torch.from_numpy(to_batch(clips, outcomes, recipe.encode.batch_size))
    posterior = encoder.encode(batch, recipe.encode.chunk_frames)
    values = _select(posterior, recipe, clips)
    if values.shape != (len(clips), *shape):
        raise RuntimeError(f"{encoder.card.name} made {values.shape=}, the plan says {(len(clips), *shape)}")
    stored = to_stored(values, recipe.encode.dtype)
    return stored, [
        _judge(outcome, value, row, recipe) for outcome, value, row in zip(outcomes, values, stored, strict=True)
    ]


def _select(posterior: Posterior, recipe: Recipe, clips: Sequence[Clip]) -> np.ndarray:
    """float32 [n, C, t, h, w] of what the recipe stores, for the real clips of the batch."""
    mean = posterior.mean[: len(clips)]
    mode = recipe.encode.posterior
    if mode == "mean":
        return mean.numpy()
    if posterior.logvar is None:
        raise RuntimeError(f"the encoder made no log-variance, and its card promises one: --posterior {mode}")
    logvar = posterior.logvar[: len(clips)]
    if mode == "moments":
        return torch.cat([mean, logvar], dim=1).numpy()
    seed = recipe.encode.sample_seed
    samples = [_draw(mean[place], logvar[place], clip, seed) for place, clip in enumerate(clips)]
    return torch.stack(samples).numpy()


def _draw(mean: torch.Tensor, logvar: torch.Tensor, clip: Clip, seed: int) -> torch.Tensor:
    """A sample of one clip's posterior, by itself: no neighbour in the batch can change its bits."""
    return mean + torch.exp(0.5 * logvar) * _noise(clip, seed, mean.shape)


def _noise(clip: Clip, seed: int, shape: torch.Size) -> torch.Tensor:
    """Standard normal noise from the recipe's seed and what the clip is, not where its shard lies.

    Keys are often unique within their shard only; offset and size tell samples of one key apart.
    """
    sample = clip.sample
    identity = [seed, sample.key, sample.offset, sample.size_bytes, clip.window_index, clip.window.start]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def _judge(outcome: DecodeOutcome, value: np.ndarray, stored: np.ndarray, recipe: Recipe) -> RowResult:
    if isinstance(outcome, SampleError):
        return outcome
    if not np.isfinite(value).all():
        return SampleError("not_finite", "the encoder made infinite or NaN values")
    dtype = recipe.encode.dtype
    if not np.isfinite(to_float32(stored, dtype)).all():
        return SampleError("overflow", f"|latent| reaches {np.abs(value).max():.6g}, too large for {dtype}")
    return RowFacts(outcome.decoder, tuple(float(pts) for pts in outcome.pts_seconds))
