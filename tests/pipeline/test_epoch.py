"""The order of training clips: every sample once an epoch, one shape a batch, and any state goes on alike."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.buckets import BucketConfig
from pipeline.epoch import ClipOrder, DrawConfig, LoaderState
from pipeline.errors import UsageError
from pipeline.index import IndexFragment
from tests.fakes import fragment_of_lengths

SIZES = BucketConfig(sizes=("32x32", "32x64"))


SHARDS = [
    fragment_of_lengths(0, [30, 9, 50, 0, 12, -1]),
    fragment_of_lengths(1, [31, 12, 5, 0, 0]),
    fragment_of_lengths(2, [40, 41, 42, 43, 17]),
]


def order(shards: list[IndexFragment] = SHARDS, **fields) -> ClipOrder:  # type: ignore[no-untyped-def]
    config = DrawConfig(**{"frames": (1, 5, 9), "batch_size": 2, "shuffle_shards": 2, **fields})
    return ClipOrder(config, SIZES, 8, len(shards), shards.__getitem__)


def test_an_epoch_draws_every_usable_sample_as_often_as_asked() -> None:
    usable = {sample.key for shard in SHARDS for sample in shard.samples if sample.status == "ok"}
    images = {"0/3", "1/3", "1/4"}
    for epoch in range(3):
        draws = list(order(draws_per_video=2, draws_per_image=3).draws(epoch))
        assert Counter(draw.source.key for draw in draws) == {key: 3 if key in images else 2 for key in usable}
        assert [draw.number for draw in draws] == list(range(len(draws)))
        assert {draw.epoch for draw in draws} == {epoch}


def test_epochs_differ_in_order_and_windows_and_seeds_do_too() -> None:
    first, second = list(order().draws(0)), list(order().draws(1))
    assert [draw.source.key for draw in first] != [draw.source.key for draw in second]
    windows = [{draw.source.key: (draw.bucket, draw.window) for draw in draws} for draws in (first, second)]
    assert sum(windows[0][key] != windows[1][key] for key in windows[0]) > len(windows[0]) // 3
    assert list(order(seed=1).draws(0)) != first
    assert list(order().draws(0)) == first


def test_windows_lie_inside_their_videos() -> None:
    lengths = {sample.key: sample.media.num_frames for shard in SHARDS for sample in shard.samples if sample.media}
    starts = set()
    for epoch in range(30):
        for draw in order().draws(epoch):
            assert draw.window.num_frames == draw.bucket.num_frames in (1, 5, 9)
            assert draw.window.start + draw.window.num_frames <= lengths[draw.source.key]
            starts.add(draw.window.start if draw.source.key == "0/2" else -1)
    assert len(starts) > 15


def test_every_batch_has_one_shape_and_its_size() -> None:
    for batch, _ in islice(order(batch_size=3).batches(), 40):
        assert len(batch.draws) == 3
        assert {draw.bucket for draw in batch.draws} == {batch.bucket}


def test_nothing_is_lost_between_epochs() -> None:
    """After n whole epochs, what was in batches and what waits are all draws of n epochs, each once."""
    num_draws = len(list(order().draws(0)))
    seen: list[tuple[int, int]] = []
    for batch, state in order().batches():
        seen += [(draw.epoch, draw.number) for draw in batch.draws]
        taken = state.epoch * num_draws + state.number
        assert Counter([*seen, *state.waiting]) == Counter(divmod(place, num_draws) for place in range(taken))
        if state.epoch == 3:
            break


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(-1, 40), max_size=6), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    shuffle_shards=st.integers(1, 3),
)
def test_any_state_goes_on_with_the_batches_that_would_have_followed(
    lengths: list[list[int]], batch_size: int, shuffle_shards: int
) -> None:
    shards = [fragment_of_lengths(number, shard) for number, shard in enumerate(lengths)]
    if not any(length >= 0 for shard in lengths for length in shard):
        with pytest.raises(UsageError, match="no sample of the shards has 1 frames"):
            next(order(shards).batches())
        return
    fields = {"batch_size": batch_size, "shuffle_shards": shuffle_shards}
    undisturbed = list(islice(order(shards, **fields).batches(), 12))
    for done, (_, state) in enumerate(undisturbed, start=1):
        kept = LoaderState.from_json(json.loads(json.dumps(state.as_json())))
        resumed = list(islice(order(shards, **fields).batches(kept), 12 - done))
        assert resumed == undisturbed[done:]


def test_lengths_are_taken_by_their_weights_where_they_fit() -> None:
    counts: Counter[int] = Counter()
    for epoch in range(60):
        counts.update(
            draw.bucket.num_frames
            for draw in order(frames=(1, 9), frames_weights=(1.0, 3.0)).draws(epoch)
            if draw.source.key.startswith("2/")
        )
    assert 0.65 < counts[9] / counts.total() < 0.85


def test_short_videos_and_images_take_what_fits() -> None:
    for epoch in range(5):
        for draw in order(frames=(5, 9)).draws(epoch):
            assert draw.source.kind == "video"
            assert draw.source.key != "1/2" or draw.bucket.num_frames == 5


def test_fps_counts_positions_in_time() -> None:
    halved = order(frames=(9,), fps=12.0)
    keys = {draw.source.key for draw in halved.draws(0)}
    assert "0/4" not in keys  # 12 frames at 24 are 6 at 12
    assert "0/0" in keys


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": ()}, "frames must be"),
        ({"frames": (5, 5)}, "frames must be"),
        ({"frames_weights": (1.0,)}, "frames_weights needs"),
        ({"fps": 12.0, "frame_step": 2}, "without a frame_step"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"draws_per_image": 0}, "draws_per_image must be"),
        ({"seed": -1}, "seed must be"),
        ({"shuffle_shards": 0}, "shuffle_shards must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        order(**fields)
