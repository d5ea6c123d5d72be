"""From decoded clips to stored rows: one fixed slice of a unit at a time, or one long clip piece by piece.

In:   a slice's decoded clips (or errors) in row order, or the pieces of one clip; the encoder.
Out:  stored rows [n, C, t, h, w] of its n clips and, per clip, RowFacts or the error.
Cost: one encoder call per slice, always at the full batch size; of a long clip one piece, the encoder's state, the row.
Errors: none for bad clips, they are results; UnitError for a call that does not fit the GPU's memory; the encoder's own
        exceptions pass through.

A failed clip and the missing tail of a short slice are zeros in the batch: on most hardware the batch size changes the
last bits of a latent, so it must not depend on what failed. A long clip has the encoder to itself, and gets what a
batch of one gets (`VideoEncoder.encode_stream`): bit for bit, however it is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from models.spec import Posterior, VideoEncoder
from pipeline.commit import RowFacts, RowResult
from pipeline.decode.frame_memory import FrameMemory
from pipeline.decode.records import DecodedClip, DecodeOutcome
from pipeline.encoder_call import encode_frames, flush_frames, push_frames
from pipeline.errors import SampleError
from pipeline.placement import Clip
from pipeline.recipe import Recipe, StoreDtype
from pipeline.store import to_float32, to_stored

_PADDING_FRAMES = 16
_BATCHES = FrameMemory()


class EncoderTimer:
    """Seconds in the encoder's own calls, for one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class Batch:
    """A slice put together for the encoder.

    frames: uint8 [B, T, H, W, 3]; None when no clip could be decoded, or once they are encoded. results: how each
    clip's frames were had, or why they were not.
    """

    clips: Sequence[Clip]
    frames: np.ndarray | None
    results: tuple[RowResult, ...]


def make_batch(recipe: Recipe, clips: Sequence[Clip], outcomes: Sequence[DecodeOutcome]) -> Batch:
    """The batch of a slice; frames that it copies are not needed any more."""
    results = tuple(map(_facts, outcomes))
    if not any(isinstance(outcome, DecodedClip) for outcome in outcomes):
        return Batch(clips, None, results)
    return Batch(clips, to_batch(clips, outcomes, recipe.batch_size(clips[0].bucket)), results)


def _facts(outcome: DecodeOutcome) -> RowResult:
    if isinstance(outcome, SampleError):
        return outcome
    return RowFacts(outcome.decoder, tuple(outcome.pts_seconds.tolist()))


def to_batch(clips: Sequence[Clip], outcomes: Sequence[DecodeOutcome], batch_size: int) -> np.ndarray:
    """uint8 frames [B, T, H, W, 3] of a slice; short windows are padded by repeating their last frame."""
    bucket = clips[0].bucket
    if batch_size == 1 and isinstance(only := outcomes[0], DecodedClip) and _is_batch(only.frames, bucket.num_frames):
        return only.frames[None]
    batch = _BATCHES.empty((batch_size, bucket.num_frames, bucket.height, bucket.width, 3))
    batch[len(outcomes) :] = 0
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, DecodedClip):
            valid = len(outcome.frames)
            batch[place, :valid] = outcome.frames
            batch[place, valid:] = outcome.frames[-1]
        else:
            batch[place] = 0
    return batch


def _is_batch(frames: np.ndarray, num_frames: int) -> bool:
    """Whether a clip needs no copy: it is whole, and is no shared memory of a cluster, which a tensor cannot be."""
    return len(frames) == num_frames and bool(frames.flags.writeable)


def encode_batch(encoder: VideoEncoder, recipe: Recipe, batch: Batch) -> Posterior | None:
    """What the encoder makes of a batch, its zeros included; None for a batch without frames."""
    if batch.frames is None:
        return None
    return encode_frames(encoder, recipe, batch.clips[0].bucket, torch.from_numpy(batch.frames))


def to_rows(recipe: Recipe, batch: Batch, posterior: Posterior | None) -> tuple[np.ndarray, list[RowResult]]:
    """Stored rows of a batch's clips, and what became of each.

    Raises:
        RuntimeError: the posterior is not what the encoder's card promises.
    """
    clips, shape = batch.clips, recipe.row_shape(batch.clips[0].bucket)
    if posterior is None:
        empty = to_stored(np.full((len(clips), *shape), np.nan, np.float32), recipe.encode.dtype)
        return empty, list(batch.results)
    is_drawn = recipe.encode.posterior == "sample"
    shape_drawn = posterior.mean.shape[1:]
    noise = [_noise(clip, recipe.encode.sample_seed, shape_drawn) for clip in clips] if is_drawn else []
    values = _select(_first(posterior, len(clips)), recipe, noise)
    if values.shape != (len(clips), *shape):
        raise RuntimeError(f"{recipe.encoder.name} made {values.shape=}, the plan says {(len(clips), *shape)}")
    stored = to_stored(values, recipe.encode.dtype)
    if np.isfinite(to_float32(stored, recipe.encode.dtype)).all():
        return stored, list(batch.results)
    return stored, [
        _judge(result, value, row, recipe) for result, value, row in zip(batch.results, values, stored, strict=True)
    ]


def encode_slice(
    encoder: VideoEncoder, recipe: Recipe, clips: Sequence[Clip], outcomes: Sequence[DecodeOutcome]
) -> tuple[np.ndarray, list[RowResult]]:
    """Stored rows of a slice and what became of each of its clips: the three steps above."""
    batch = make_batch(recipe, clips, outcomes)
    return to_rows(recipe, batch, encode_batch(encoder, recipe, batch))


def _first(posterior: Posterior, count: int) -> Posterior:
    """The real clips of a batch."""
    return Posterior(posterior.mean[:count], None if posterior.logvar is None else posterior.logvar[:count])


class StreamedClip:
    """One long clip on its way through the encoder: pieces of its frames in, its stored row out.

    `row` [C, t, h, w] is filled as latent frames come.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        recipe: Recipe,
        clip: Clip,
        row: np.ndarray,
        timer: EncoderTimer | None = None,
    ) -> None:
        self._recipe, self._clip, self._row = recipe, clip, row
        self._timer = timer or EncoderTimer()
        self._stream = encoder.encode_stream(recipe.encode.chunk_frames)
        shape = recipe.encoder.geometry.latent_shape(*dataclasses.astuple(clip.bucket))
        is_drawn = recipe.encode.posterior == "sample"
        self._noise = _noise(clip, recipe.encode.sample_seed, torch.Size(shape)) if is_drawn else None
        self._pts_seconds: list[float] = []
        self._latent_frames = 0
        self._check = _ValueCheck(recipe.encode.dtype)

    def push(self, piece: DecodedClip) -> RowResult | None:
        """Encode the window's next frames; after its last one, what became of the clip."""
        self._encode(piece.frames)
        self._pts_seconds += piece.pts_seconds.tolist()
        if len(self._pts_seconds) < self._clip.window.num_frames:
            return None
        missing = self._clip.bucket.num_frames - self._clip.window.num_frames
        for start in range(0, missing, _PADDING_FRAMES):
            self._encode(np.repeat(piece.frames[-1:], min(_PADDING_FRAMES, missing - start), axis=0))
        with self._timer.running():
            posterior = flush_frames(self._stream, self._clip.bucket)
        self._store(posterior)
        if self._latent_frames != self._row.shape[1]:
            raise RuntimeError(f"the encoder made {self._latent_frames} latent frames, the plan says {self._row.shape}")
        return self._check.error or RowFacts(piece.decoder, tuple(self._pts_seconds))

    def _encode(self, frames: np.ndarray) -> None:
        # Frames in a cluster's shared memory are read-only, which a tensor cannot be.
        own = frames if frames.flags.writeable else frames.copy()
        with self._timer.running():
            posterior = push_frames(self._stream, self._clip.bucket, torch.from_numpy(own)[None])
        self._store(posterior)

    def _store(self, posterior: Posterior | None) -> None:
        if posterior is None:
            return
        start, stop = self._latent_frames, self._latent_frames + posterior.mean.shape[2]
        noise = [] if self._noise is None else [self._noise[:, start:stop]]
        (value,) = _select(posterior, self._recipe, noise)
        stored = to_stored(value, self._recipe.encode.dtype)
        self._row[:, start:stop] = stored
        self._check.add(value, stored)
        self._latent_frames = stop


def _select(posterior: Posterior, recipe: Recipe, noise: Sequence[torch.Tensor]) -> np.ndarray:
    """float32 [n, C, t, h, w] of what the recipe stores; `noise` is one tensor per clip, for samples."""
    mean, logvar = posterior.mean, posterior.logvar
    mode = recipe.encode.posterior
    if mode == "mean":
        return mean.numpy()
    if logvar is None:
        raise RuntimeError(f"the encoder made no log-variance, and its card promises one: --posterior {mode}")
    if mode == "moments":
        return torch.cat([mean, logvar], dim=1).numpy()
    samples = [_draw(mean[place], logvar[place], one) for place, one in enumerate(noise)]
    return torch.stack(samples).numpy()


def _draw(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample of one clip's posterior, by itself: no neighbour in the batch can change its bits."""
    return mean + torch.exp(0.5 * logvar) * noise


def _noise(clip: Clip, seed: int, shape: torch.Size) -> torch.Tensor:
    """Standard normal noise from the recipe's seed and what the clip is, not where its shard lies.

    Keys are often unique within their shard only; offset and size tell samples of one key apart.
    """
    sample = clip.sample
    identity = [seed, sample.key, sample.offset, sample.size_bytes, clip.window_index, clip.window.start]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def _judge(result: RowResult, value: np.ndarray, stored: np.ndarray, recipe: Recipe) -> RowResult:
    if isinstance(result, SampleError):
        return result
    check = _ValueCheck(recipe.encode.dtype)
    check.add(value, stored)
    return check.error or result


class _ValueCheck:
    """Whether a clip's values are numbers, and can be stored; they may come in parts."""

    def __init__(self, dtype: StoreDtype) -> None:
        self._dtype = dtype
        self._is_finite = True
        self._largest_overflow = 0.0

    def add(self, value: np.ndarray, stored: np.ndarray) -> None:
        if not np.isfinite(value).all():
            self._is_finite = False
        elif not np.isfinite(to_float32(stored, self._dtype)).all():
            self._largest_overflow = max(self._largest_overflow, float(np.abs(value).max()))

    @property
    def error(self) -> SampleError | None:
        """Why the clip failed."""
        if not self._is_finite:
            return SampleError("not_finite", "the encoder made infinite or NaN values")
        if self._largest_overflow:
            largest = f"{self._largest_overflow:.6g}"
            return SampleError("overflow", f"|latent| reaches {largest}, too large for {self._dtype}")
        return None
