"""Calls of the encoder, and what follows where a GPU has no memory for one.

In:   an encoder; uint8 frames [B, T, H, W, 3] of a bucket; for `warm_up` the plan.
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
from models.streamed import EncodeStream, default_chunk_frames
from pipeline.buckets import Bucket
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
    remedy = f"long clips of {bucket.name}: lower --window-mb, since fewer are then encoded by turns, or --chunk-frames"
    return _fit(lambda: stream.push(frames), remedy)


def warm_up(encoder: VideoEncoder, plan: Plan) -> None:
    """Encode black frames: the plan's largest batch, and the beginning of its largest long clip.

    Before units are leased to a GPU: first calls load kernels and take memory for all that follow.

    Raises:
        JobError: they do not fit.
    """
    recipe = plan.recipe
    whole = [bucket for bucket in plan.buckets if not recipe.streams(bucket)]
    long = [bucket for bucket in plan.buckets if recipe.streams(bucket)]
    try:
        if whole:
            bucket = max(whole, key=lambda one: recipe.batch_size(one) * one.num_frames * one.height * one.width)
            encode_frames(encoder, recipe, bucket, _black(bucket, recipe.batch_size(bucket), bucket.num_frames))
        if long:
            bucket = max(long, key=lambda one: one.height * one.width)
            chunk_frames = recipe.encode.chunk_frames or default_chunk_frames(recipe.encoder.geometry)
            stream = encoder.encode_stream(recipe.encode.chunk_frames)
            push_frames(stream, bucket, _black(bucket, 1, min(bucket.num_frames, 1 + 2 * chunk_frames)))
    except UnitError as error:
        raise JobError(str(error)) from error


def _black(bucket: Bucket, batch_size: int, num_frames: int) -> torch.Tensor:
    return torch.zeros((batch_size, num_frames, bucket.height, bucket.width, 3), dtype=torch.uint8)


def _fit(call: Callable[[], Value], remedy: str) -> Value:
    try:
        return call()
    except torch.OutOfMemoryError as error:
        told = str(error).splitlines()[0]
    # Out here: while the error is handled, its traceback keeps what the call had taken.
    raise UnitError(f"the GPU has no memory for {remedy} ({told})")
