"""`plan --probe` encodes as a worker will."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.probe import _encode
from pipeline.decode_requests import to_requests
from pipeline.recipe import Recipe
from pipeline.verify import unit_clips
from tests.fakes import FakeDecoders, planned_store
from tests.pipeline.test_encode_stage import MeetingEncoder, SlowEncoder

pytestmark = pytest.mark.timeout(30)


def slice_of(directory: Path) -> tuple[Recipe, list[Any]]:
    storage, plan = planned_store(directory)
    clips = list(unit_clips(storage, plan, next(plan.units())))[:2]
    outcomes = FakeDecoders().submit(*to_requests(clips, plan.recipe, 1 << 20)).result()
    return plan.recipe, [clips, outcomes]


def test_as_many_calls_at_a_time_and_threads_as_a_worker_has(tmp_path: Path) -> None:
    recipe, slice_ = slice_of(tmp_path)
    encoder = MeetingEncoder()
    _encode(encoder, recipe, slice_, threads=6)
    assert encoder.batches == 4  # two that warm up, two that count
    assert encoder.threads == {3}


def test_seconds_are_of_one_slice(tmp_path: Path) -> None:
    recipe, slice_ = slice_of(tmp_path)
    assert 0.05 <= _encode(SlowEncoder(0.05), recipe, slice_, threads=1) < 0.1
    assert 0.05 <= 2 * _encode(SlowEncoder(0.05), recipe, slice_, threads=2) < 0.1
