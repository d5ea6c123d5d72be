"""Calls of the encoder before there is work, and those that a GPU has no memory for."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch

from models.chunks import StreamState
from models.spec import Posterior
from models.streamed import EncodeStream
from pipeline.buckets import Bucket, BucketConfig
from pipeline.encoder_call import flush_frames, push_frames, warm_up
from pipeline.errors import JobError, UnitError
from pipeline.plan import Plan
from pipeline.sampling import SamplingConfig
from tests.fakes import FakeEncoder, fake_recipe, planned_store
from tests.pipeline.test_worker import FILMS, film_recipe, recipe_of
from tests.plans import fragment, media_info, plan_of


class Recording(FakeEncoder):
    """Remembers the shapes of its calls, and the most streams that were there at one; `error` is raised by each."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error, self.shapes, self.most_streams = error, list[tuple[int, ...]](), 0
        self.streams: list[weakref.ref[EncodeStream]] = []

    @property
    def num_streams(self) -> int:
        return sum(stream() is not None for stream in self.streams)

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.shapes.append(tuple(frames_BTHWC.shape))
        self.most_streams = max(self.most_streams, self.num_streams)
        if self.error:
            raise self.error
        return super().encode(frames_BTHWC, chunk_frames)

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        stream = super().encode_stream(chunk_frames, state)
        self.streams.append(weakref.ref(stream))
        return stream


def plan_with_sizes(directory: Path) -> Plan:
    return planned_store(directory, recipe=recipe_of(sizes=("32x32", "32x64", "16x16")))[1]


def plan_of_films(directory: Path) -> Plan:
    return planned_store(directory, FILMS, film_recipe())[1]


def test_a_warm_up_encodes_a_batch_of_every_bucket_the_largest_call_first() -> None:
    """Of 41 frames the encoder takes 8 at a time: 9 of larger frames need more."""
    recipe = fake_recipe(
        sampling=SamplingConfig((9, 41), short="smaller"), buckets=BucketConfig(("32x32", "32x64", "64x32"))
    )
    media = [media_info(60), media_info(9, 64, 128), media_info(9, 96, 96), media_info(1, 128, 64, "image")]
    encoder = Recording()
    warm_up(encoder, plan_of(recipe, [fragment("a", media)]), 0)
    assert encoder.shapes[0] == (2, 9, 32, 64, 3)
    assert sorted(encoder.shapes[1:3]) == [(2, 9, 32, 32, 3), (2, 41, 32, 32, 3)]
    assert encoder.shapes[3:] == [(2, 1, 64, 32, 3)]


@pytest.mark.parametrize(("window_bytes", "under_way"), [(0, 1), (1 << 20, 5), (1 << 30, 8)])
def test_a_warm_up_begins_as_many_long_clips_as_are_encoded_by_turns(
    tmp_path: Path, window_bytes: int, under_way: int
) -> None:
    encoder = Recording()
    warm_up(encoder, plan_of_films(tmp_path), window_bytes)
    two_chunks = [(1, 1, 32, 32, 3), *[(1, 9, 32, 32, 3)] * 2]  # the fake encoder puts a frame before each
    assert encoder.shapes == [(2, 41, 32, 32, 3), *two_chunks * under_way]
    assert encoder.most_streams == under_way
    assert encoder.num_streams == 0


def test_a_warm_up_begins_clips_of_each_frame_size_once() -> None:
    recipe = dataclasses.replace(
        film_recipe(stream_mb=30 * 32 * 32 * 3 / 2**20), buckets=BucketConfig(("32x32", "32x64"))
    )
    encoder = Recording()
    warm_up(encoder, plan_of(recipe, [fragment("a", [media_info(90), media_info(41), media_info(90, 64, 128)])]), 0)
    assert [shape[2:4] for shape in encoder.shapes] == [(32, 32)] * 3 + [(32, 64)] * 3


def test_a_warm_up_that_does_not_fit_ends_the_job(tmp_path: Path) -> None:
    encoder = Recording(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(JobError, match=r"no memory for 2 clips of 9x32x32 at a time: lower --batch-size"):
        warm_up(encoder, plan_with_sizes(tmp_path), 0)


def test_another_error_of_the_encoder_passes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        warm_up(Recording(RuntimeError("a bug")), plan_with_sizes(tmp_path), 0)


def test_a_piece_that_does_not_fit_says_what_makes_room() -> None:
    stream = Recording(torch.OutOfMemoryError("CUDA out of memory.")).encode_stream()
    with pytest.raises(UnitError, match=r"long clips of 81x32x32: lower --window-mb"):
        push_frames(stream, Bucket(81, 32, 32), torch.zeros(1, 17, 32, 32, 3, dtype=torch.uint8))


def test_the_end_of_a_clip_that_does_not_fit_says_what_makes_room() -> None:
    encoder = Recording()
    stream = encoder.encode_stream()
    stream.push(torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8))
    encoder.error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(UnitError, match=r"long clips of 85x32x32: lower --window-mb"):
        flush_frames(stream, Bucket(85, 32, 32))
