"""Training clips: the same for a seed whatever the timing, inside their videos, and never an endless search."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.clips import TrainingClips
from pipeline.decode.records import ClipShape, DecodeRequest
from pipeline.errors import UnitError, UsageError
from pipeline.index import IndexFragment, list_fragments, read_fragment
from tests.fakes import FakeDecoders, fake_frames, planned_store

SHAPE = ClipShape(32, 32)
VIDEOS = ({"a": 30, "b": 9, "c": 50}, {"d": 31, "e": 12, "short": 5})


@pytest.fixture
def fragments(tmp_path: Path) -> list[IndexFragment]:
    storage, _ = planned_store(tmp_path, VIDEOS)
    return [read_fragment(storage, shard_id) for shard_id in list_fragments(storage)]


def clips(
    fragments: Sequence[IndexFragment], decoders: FakeDecoders, seed: int = 0, batch_size: int = 3
) -> TrainingClips:
    return TrainingClips(fragments, 9, 2, SHAPE, decoders, batch_size, seed)


def take(training: TrainingClips, count: int) -> np.ndarray:
    return np.stack(list(islice(iter(training), count)))


def test_batches_are_uint8_clips(fragments: list[IndexFragment]) -> None:
    batches = take(clips(fragments, FakeDecoders()), 20)
    assert batches.shape == (20, 3, 9, 32, 32, 3)
    assert batches.dtype == np.uint8


def test_windows_lie_inside_their_videos_and_change_with_the_epoch(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders()
    take(clips(fragments, decoders), 40)
    lengths = {key: frames for videos in VIDEOS for key, frames in videos.items()}
    starts: dict[str, set[int]] = {key: set() for key in lengths}
    for request in decoders.requests:
        for window in request.windows:
            assert window.num_frames == 9
            assert window.start + 9 <= lengths[request.source.key]
            starts[request.source.key].add(window.start)
    assert starts["short"] == set()
    assert len(starts["c"]) > 5
    keys = [request.source.key for request in decoders.requests]
    assert all(sorted(keys[start : start + 5]) == ["a", "b", "c", "d", "e"] for start in range(0, len(keys) - 5, 5))
    assert keys[:5] != keys[5:10] or keys[:5] != keys[10:15]


def test_clips_are_the_frames_of_the_requests_in_their_order(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders()
    batches = take(clips(fragments, decoders), 10)
    wanted = [
        fake_frames(request.source.key, window, SHAPE) for request in decoders.requests for window in request.windows
    ]
    np.testing.assert_array_equal(batches.reshape(30, 9, 32, 32, 3), np.stack(wanted[:30]))


def test_a_seed_gives_the_same_batches_with_any_latency(fragments: list[IndexFragment]) -> None:
    first = take(clips(fragments, FakeDecoders()), 15)
    for latency_seed in range(3):
        jittery = FakeDecoders(seconds=0.005, seed=latency_seed)
        np.testing.assert_array_equal(take(clips(fragments, jittery), 15), first)
    assert not np.array_equal(take(clips(fragments, FakeDecoders(), seed=1), 15), first)


def test_bad_videos_are_counted_and_left_out(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders(bad=["a", "c"])
    training = clips(fragments, decoders)
    bad = {fake_frames(key, window, SHAPE).tobytes() for key in "ac" for window in _windows(decoders, key)}
    for clip in take(training, 20).reshape(60, 9, 32, 32, 3):
        assert clip.tobytes() not in bad
    assert training.failed >= 10


def _windows(decoders: FakeDecoders, key: str) -> list:  # type: ignore[type-arg]
    return [window for request in decoders.requests if request.source.key == key for window in request.windows]


@pytest.mark.timeout(10)
def test_videos_that_all_fail_end_the_search(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders(bad=["a", "b", "c", "d", "e"])
    training = clips(fragments, decoders)
    with pytest.raises(UsageError, match="none of the 5 videos with 9 frames can be decoded"):
        take(training, 1)
    assert training.failed == 10


def test_one_good_video_is_enough(fragments: list[IndexFragment]) -> None:
    batches = take(clips(fragments, FakeDecoders(bad=["a", "b", "c", "d"])), 5)
    assert batches.shape == (5, 3, 9, 32, 32, 3)


def test_no_video_long_enough_is_an_error(fragments: list[IndexFragment]) -> None:
    with pytest.raises(UsageError, match="no video of the shards has 129 frames"):
        next(iter(TrainingClips(fragments, 129, 2, SHAPE, FakeDecoders(), 3, 0)))


def test_a_broken_decoder_is_not_a_bad_video(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders(errors=dict.fromkeys("abcde", UnitError("no process")))
    with pytest.raises(UnitError, match="no process"):
        take(clips(fragments, decoders), 1)


def test_requests_ahead_are_bounded(fragments: list[IndexFragment]) -> None:
    class Counting(FakeDecoders):
        taken = most = 0

        def submit(self, request: DecodeRequest):  # type: ignore[no-untyped-def]
            future, counting = super().submit(request), self
            counting.most = max(counting.most, len(self.requests) - self.taken)

            class Pending:
                def result(self):  # type: ignore[no-untyped-def]
                    counting.taken += 1
                    return future.result()

            return Pending()

    decoders = Counting()
    take(clips(fragments, decoders, batch_size=16), 10)
    assert decoders.most == 8
