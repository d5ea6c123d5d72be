"""Calls of the encoder before there is work, and those that a GPU has no memory for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.spec import Posterior
from pipeline.buckets import Bucket
from pipeline.encoder_call import push_frames, warm_up
from pipeline.errors import JobError, UnitError
from pipeline.plan import Plan
from tests.fakes import FakeEncoder, planned_store
from tests.pipeline.test_worker import FILMS, film_recipe, recipe_of


class Recording(FakeEncoder):
    """Remembers the shapes of its calls; `error` is raised by each."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error, self.shapes = error, list[tuple[int, ...]]()

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.shapes.append(tuple(frames_BTHWC.shape))
        if self.error:
            raise self.error
        return super().encode(frames_BTHWC, chunk_frames)


def plan_with_sizes(directory: Path) -> Plan:
    return planned_store(directory, recipe=recipe_of(sizes=("32x32", "32x64", "16x16")))[1]


def plan_of_films(directory: Path) -> Plan:
    return planned_store(directory, FILMS, film_recipe())[1]


@pytest.mark.parametrize(
    ("plan_in", "expected"),
    [
        (plan_with_sizes, [(2, 9, 32, 32, 3)]),  # no video is twice as wide as high
        (plan_of_films, [(2, 41, 32, 32, 3), (1, 1, 32, 32, 3), *[(1, 9, 32, 32, 3)] * 2]),  # and two chunks of 8
    ],
)
def test_a_warm_up_encodes_the_largest_batch_and_the_beginning_of_a_long_clip(
    tmp_path: Path, plan_in: Callable[[Path], Plan], expected: list[tuple[int, ...]]
) -> None:
    encoder = Recording()
    warm_up(encoder, plan_in(tmp_path))
    assert encoder.shapes == expected


def test_a_warm_up_that_does_not_fit_ends_the_job(tmp_path: Path) -> None:
    encoder = Recording(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(JobError, match=r"no memory for 2 clips of 9x32x32 at a time: lower --batch-size"):
        warm_up(encoder, plan_with_sizes(tmp_path))


def test_another_error_of_the_encoder_passes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        warm_up(Recording(RuntimeError("a bug")), plan_with_sizes(tmp_path))


def test_a_piece_that_does_not_fit_says_what_makes_room() -> None:
    stream = Recording(torch.OutOfMemoryError("CUDA out of memory.")).encode_stream()
    with pytest.raises(UnitError, match=r"long clips of 81x32x32: lower --window-mb"):
        push_frames(stream, Bucket(81, 32, 32), torch.zeros(1, 17, 32, 32, 3, dtype=torch.uint8))
