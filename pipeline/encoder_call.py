"""Calls of the encoder, and what follows where a GPU has no memory for one.

In:   an encoder; uint8 frames [B, T, H, W, 3] of a bucket; for `warm_up` the plan, and the window of bytes.
Out:  Posteriors.
Cost: what the encoder takes.
Errors: UnitError for a call that does not fit, since another program may have taken the memory for a while; JobError
        from `warm_up`, since it did not fit from the start. Whatever else the encoder raises passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from models.spec import Posterior, VideoEncoder
from models.streamed import EncodeStream
from pipeline.buckets import Bucket
from pipeline.clip_streams import StreamPlan
from pipeline.errors import JobError, UnitError
from pipeline.plan import Plan
from pipeline.recipe import Recipe

Value = TypeVar("Value")


def encode_frames(encoder: VideoEncoder, recipe: Recipe, bucket: Bucket, frames: torch.Tensor) -> Posterior:
    """Encode whole clips.

    Raises:
        UnitError: the GPU has no memory for so many.
    """
    remedy = f"{len(frames)} clips of {bucket.name} at a time: lower --batch-size, or --chunk-frames"
    return _fit(lambda: encoder.encode(frames, recipe.encode.chunk_frames), remedy)


def push_frames(stream: EncodeStream, bucket: Bucket, frames: torch.Tensor) -> Posterior | None:
    """Encode the next frames of a long clip, [1, n, H, W, 3].

    Raises:
        UnitError: the GPU has no memory for them, beside the other clips that are under way.
    """
    return _fit(lambda: stream.push(frames), _fewer_long_clips(bucket))


def flush_frames(stream: EncodeStream, bucket: Bucket) -> Posterior | None:
    """Encode the frames of a long clip that wait for a whole chunk, at its end.

    Raises:
        UnitError: as `push_frames`.
    """
    return _fit(stream.flush, _fewer_long_clips(bucket))


def _fewer_long_clips(bucket: Bucket) -> str:
    return f"long clips of {bucket.name}: lower --window-mb, since fewer are then encoded by turns, or --chunk-frames"


def warm_up(encoder: VideoEncoder, plan: Plan, window_bytes: int) -> None:
    """Encode black frames: a batch of every bucket, and the beginnings of as many long clips as are encoded by turns.

    Before units are leased to a GPU: first calls load kernels and take memory for all that follow. `window_bytes` is
    the worker's.

    Raises:
        JobError: they do not fit.
    """
    recipe = plan.recipe
    whole = [bucket for bucket in plan.buckets if not recipe.streams(bucket)]
    # A long clip's calls depend on its frames' size alone.
    long = {(bucket.height, bucket.width): bucket for bucket in sorted(plan.buckets) if recipe.streams(bucket)}
    try:
        for bucket in sorted(whole, key=lambda one: _call_pixels(recipe, one), reverse=True):
            encode_frames(encoder, recipe, bucket, _black(bucket, recipe.batch_size(bucket), bucket.num_frames))
        for bucket in long.values():
            _begin_clips(encoder, recipe, bucket, window_bytes)
    except UnitError as error:
        raise JobError(str(error)) from error


def _call_pixels(recipe: Recipe, bucket: Bucket) -> int:
    """Pixels that the encoder has before it at a time, which its activations go by: of a batch, chunk by chunk."""
    num_frames = min(bucket.num_frames, recipe.chunk_frames(bucket) or bucket.num_frames)
    return recipe.batch_size(bucket) * num_frames * bucket.height * bucket.width


def _begin_clips(encoder: VideoEncoder, recipe: Recipe, bucket: Bucket, window_bytes: int) -> None:
    """The leading frame and two chunks, each clip's state being kept until all have begun."""
    chunk_frames = recipe.encode.chunk_frames or recipe.encoder.geometry.default_chunk_frames
    under_way = StreamPlan.of(window_bytes, bucket.decoded_bytes // bucket.num_frames, chunk_frames).clips
    frames = _black(bucket, 1, min(bucket.num_frames, 1 + 2 * chunk_frames))
    streams = [encoder.encode_stream(recipe.encode.chunk_frames) for _ in range(under_way)]
    for stream in streams:
        push_frames(stream, bucket, frames)


def _black(bucket: Bucket, batch_size: int, num_frames: int) -> torch.Tensor:
    return torch.zeros((batch_size, num_frames, bucket.height, bucket.width, 3), dtype=torch.uint8)


def _fit(call: Callable[[], Value], remedy: str) -> Value:
    try:
        return call()
    except torch.OutOfMemoryError as error:
        told = str(error).splitlines()[0]
    # Out here: while the error is handled, its traceback keeps what the call had taken.
    raise UnitError(f"the GPU has no memory for {remedy} ({told})")
