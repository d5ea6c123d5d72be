"""Training clips: the same global batches over any ranks, latency and restart; a bad video costs its clip alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.buckets import BucketConfig
from pipeline.curriculum import Curriculum, Stage
from pipeline.decode.backend import decode_windows
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode.records import ClipShape, DecodeOutcome, DecodeRequest
from pipeline.epoch import DrawConfig, LoaderState
from pipeline.errors import FailureLimitError, UnitError, UsageError
from pipeline.index import IndexFragment, list_fragments, read_fragment
from pipeline.storage import LocalStorage
from pipeline.training_clips import MAX_SUBSTITUTES, ClipBatch, TrainingClips
from tests.fakes import FakeDecoders, fake_frames, index, planned_store, write_numbered_shards

VIDEOS = ({"a": 30, "b": 9, "c": 50}, {"d": 31, "e": 12, "f": 25, "g": 9}, {"h": 9, "i": 44})
SHAPE = ClipShape(32, 32)
BATCH_SIZE = 12


@pytest.fixture
def fragments(tmp_path: Path) -> list[IndexFragment]:
    storage, _ = planned_store(tmp_path, VIDEOS)
    return [read_fragment(storage, shard_id) for shard_id in list_fragments(storage)]


def draw_config(**fields: Any) -> DrawConfig:
    return DrawConfig(**{"frames": (5, 9), "batch_size": BATCH_SIZE, "shuffle_shards": 2, **fields})


def curriculum(fragments: list[IndexFragment], *stages: Stage) -> Curriculum:
    return Curriculum(stages, 8, len(fragments), fragments.__getitem__)


def order(fragments: list[IndexFragment], **fields: Any) -> Curriculum:
    return curriculum(fragments, Stage(None, draw_config(**fields), BucketConfig(sizes=("32x32",))))


def staged(fragments: list[IndexFragment]) -> Curriculum:
    """Three stages of another size, step in time, fit and batch each; the last one ends, too."""
    return curriculum(
        fragments,
        Stage(5, draw_config(), BucketConfig(sizes=("32x32",))),
        Stage(4, draw_config(frames=(5,), frame_step=2), BucketConfig(sizes=("64x64",), fit="stretch")),
        Stage(6, draw_config(frames=(1, 9), batch_size=8), BucketConfig(sizes=("64x64",), filter="bicubic")),
    )


def take(clips: TrainingClips, count: int) -> list[ClipBatch]:
    return list(islice(iter(clips), count))


def global_batches(fragments: list[IndexFragment], num_ranks: int, count: int, **fields: Any) -> list[np.ndarray]:
    """Every rank by itself, put together again."""
    ranks = [
        take(TrainingClips(order(fragments), FakeDecoders(**fields), rank, num_ranks), count)
        for rank in range(num_ranks)
    ]
    return [np.concatenate([rank[step].frames for rank in ranks]) for step in range(count)]


def test_clips_are_the_frames_that_were_drawn(fragments: list[IndexFragment]) -> None:
    for batch in take(TrainingClips(order(fragments), FakeDecoders()), 6):
        assert batch.frames.dtype == np.uint8
        wanted = [fake_frames(draw.source.key, draw.window, SHAPE) for draw in batch.draws]
        np.testing.assert_array_equal(batch.frames, np.stack(wanted))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_what_one_rank_sees(fragments: list[IndexFragment], num_ranks: int) -> None:
    alone, shared = global_batches(fragments, 1, 8), global_batches(fragments, num_ranks, 8)
    for one, many in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, many)


def test_latency_changes_nothing(fragments: list[IndexFragment]) -> None:
    plain = global_batches(fragments, 1, 6)
    for seed in range(3):
        for one, other in zip(plain, global_batches(fragments, 1, 6, seconds=0.004, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)


def test_every_restart_gives_the_batches_that_would_have_followed_also_on_other_ranks(
    fragments: list[IndexFragment],
) -> None:
    """2 ranks, then 1, then 4, each from the state that the ones before left."""
    undisturbed = [batch.frames for batch in take(TrainingClips(order(fragments), FakeDecoders()), 9)]
    state, found = LoaderState(), []
    for num_ranks in (2, 1, 4):
        clips = [TrainingClips(order(fragments), FakeDecoders(), rank, num_ranks, state) for rank in range(num_ranks)]
        batches = [take(rank, 3) for rank in clips]
        found += [np.concatenate([rank[step].frames for rank in batches]) for step in range(3)]
        assert len({rank.state for rank in clips}) == 1
        state = clips[0].state
    for one, other in zip(undisturbed, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_stages_change_on_all_ranks_alike_and_over_every_restart(fragments: list[IndexFragment]) -> None:
    """2 ranks, then 1, then 4, changing in the middle of stages; and one rank, from every state there is."""
    undisturbed = take(TrainingClips(staged(fragments), FakeDecoders()), 99)
    assert [batch.stage for batch in undisturbed] == [0] * 5 + [1] * 4 + [2] * 6
    state, found = LoaderState(), []
    for num_ranks, count in ((2, 3), (1, 4), (4, 99)):
        clips = [TrainingClips(staged(fragments), FakeDecoders(), rank, num_ranks, state) for rank in range(num_ranks)]
        for parts in zip(*(take(rank, count) for rank in clips), strict=True):
            found.append(np.concatenate([part.frames for part in parts]))
            state = parts[0].state
    for batch, frames in zip(undisturbed, found, strict=True):
        np.testing.assert_array_equal(batch.frames, frames)
    for done, batch in enumerate(undisturbed, start=1):
        rest = take(TrainingClips(staged(fragments), FakeDecoders(), state=batch.state), 99)
        assert [(other.draws, other.state) for other in rest] == [
            (other.draws, other.state) for other in undisturbed[done:]
        ]
        for one, other in zip(undisturbed[done:], rest, strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)


def test_clips_are_asked_for_as_their_stage_says_stand_ins_too(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders(bad=["a", "h"])
    take(TrainingClips(staged(fragments), decoders, ahead_batches=0), 99)
    asked = {(request.grid.frame_step, request.shape) for request in decoders.requests}
    assert asked == {
        (1, ClipShape(32, 32)),
        (2, ClipShape(64, 64, fit="stretch")),
        (1, ClipShape(64, 64, filter="bicubic")),
    }
    assert len(decoders.requests) > 5 * 12 + 4 * 12 + 6 * 8


def test_the_state_is_that_of_the_last_batch_handed_out(fragments: list[IndexFragment]) -> None:
    clips = TrainingClips(order(fragments), FakeDecoders())
    for step, batch in enumerate(islice(iter(clips), 7), start=1):
        assert batch.step == clips.state.step == step
        assert clips.state == batch.state


def test_another_clip_of_the_global_batch_stands_in_for_a_bad_video(fragments: list[IndexFragment]) -> None:
    bad = ["a", "h"]
    whole = take(TrainingClips(order(fragments), FakeDecoders(bad=bad)), 6)
    assert any(batch.failed for batch in whole)
    for batch in whole:
        drawn = [fake_frames(draw.source.key, draw.window, SHAPE) for draw in batch.draws]
        assert len(batch.failed) == sum(draw.source.key in bad for draw in batch.draws)
        for place, draw in enumerate(batch.draws):
            after = [*range(place, BATCH_SIZE), *range(place)]
            stand_in = next(other for other in after if batch.draws[other].source.key not in bad)
            assert stand_in == place or draw.source.key in bad
            np.testing.assert_array_equal(batch.frames[place], drawn[stand_in])
    for one, many in zip(whole, global_batches(fragments, 3, 6, bad=bad), strict=True):
        np.testing.assert_array_equal(one.frames, many)


def test_failures_are_counted_by_reason(fragments: list[IndexFragment]) -> None:
    clips = TrainingClips(order(fragments), FakeDecoders(bad=["a", "h"]))
    batches = take(clips, 8)
    assert clips.failed == Counter(reason for batch in batches for reason in batch.failed)
    assert set(clips.failed) == {"bad_media"}


def lonely(fragments: list[IndexFragment]) -> Curriculum:
    """Batches of one clip: no other clip of the batch can stand in."""
    return order(fragments, frames=(5, 9), batch_size=1, draws_per_video=3)


def test_a_batch_without_one_good_clip_is_shown_the_next_good_draw_of_its_shape(fragments: list[IndexFragment]) -> None:
    bad = "befghi"
    batches = take(TrainingClips(lonely(fragments), FakeDecoders(bad=bad)), 120)
    wrapped = 0
    for batch in batches:
        (draw,) = batch.draws
        epoch = [other for other in lonely(fragments).order(0).draws(draw.epoch) if other.bucket == draw.bucket]
        place = epoch.index(draw)
        shown = next(other for other in (*epoch[place:], *epoch[:place]) if other.source.key not in bad)
        wrapped += shown.number < draw.number
        np.testing.assert_array_equal(batch.frames[0], fake_frames(shown.source.key, shown.window, SHAPE))
        assert len(batch.failed) == (draw.source.key in bad)
    assert wrapped
    resumed = TrainingClips(lonely(fragments), FakeDecoders(bad=bad), state=batches[19].state)
    for one, other in zip(batches[20:40], take(resumed, 20), strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)


def test_substitutes_come_from_the_stage_of_their_batch(fragments: list[IndexFragment]) -> None:
    one = draw_config(batch_size=1)
    stages = Stage(2, one, BucketConfig(sizes=("32x32",))), Stage(18, one, BucketConfig(sizes=("64x64",)))
    batches = take(TrainingClips(curriculum(fragments, *stages), FakeDecoders(bad="befghi")), 99)
    assert any(batch.failed for batch in batches[2:])
    assert all(batch.frames.shape[2:] == (64, 64, 3) for batch in batches[2:])


def test_both_draws_of_one_bad_video_in_a_batch_cost_nothing_more(fragments: list[IndexFragment]) -> None:
    """On any number of ranks alike."""

    def shown(num_ranks: int) -> list[np.ndarray]:
        clips = order(fragments, frames=(9,), batch_size=2, draws_per_video=2, shuffle_shards=1)
        ranks = [
            take(TrainingClips(clips, FakeDecoders(bad="abdefghi"), rank, num_ranks), 9) for rank in range(num_ranks)
        ]
        assert any(sum(len(rank[step].failed) for rank in ranks) == 2 for step in range(9))
        return [np.concatenate([rank[step].frames for rank in ranks]) for step in range(9)]

    for one, many in zip(shown(1), shown(2), strict=True):
        np.testing.assert_array_equal(one, many)


def test_substitutes_are_tried_a_bounded_number_of_times(fragments: list[IndexFragment]) -> None:
    decoders = FakeDecoders(bad="abcdefghi")
    clips = order(fragments, frames=(9,), batch_size=1, draws_per_video=20)
    with pytest.raises(FailureLimitError, match="nor the 64 next ones"):
        take(TrainingClips(clips, decoders, ahead_batches=0), 1)
    assert len(decoders.requests) == 1 + MAX_SUBSTITUTES
    assert len(set(decoders.requests)) > 30  # they are other windows of several videos


def test_a_batch_without_one_good_clip_stops_training(fragments: list[IndexFragment]) -> None:
    with pytest.raises(FailureLimitError, match=f"none of the {BATCH_SIZE} clips of training step 1"):
        take(TrainingClips(order(fragments), FakeDecoders(bad="abcdefghi")), 1)


def test_a_broken_decoder_is_not_a_bad_video(fragments: list[IndexFragment]) -> None:
    with pytest.raises(UnitError, match="no process"):
        take(
            TrainingClips(order(fragments), FakeDecoders(errors=dict.fromkeys("abcdefghi", UnitError("no process")))), 1
        )


def test_ranks_must_divide_the_batch(fragments: list[IndexFragment]) -> None:
    with pytest.raises(UsageError, match="batch_size 12 must be a multiple of the 5 ranks"):
        TrainingClips(order(fragments), FakeDecoders(), 0, 5)
    with pytest.raises(UsageError, match="batch_size 8 must be a multiple of the 3 ranks"):
        TrainingClips(staged(fragments), FakeDecoders(), 0, 3)


@pytest.mark.parametrize(("limits", "most"), [({"ahead_batches": 2}, 3), ({"ahead_bytes": 1}, 1)])
def test_what_is_decoded_ahead_is_bounded(fragments: list[IndexFragment], limits: dict[str, int], most: int) -> None:
    class Counting(FakeDecoders):
        taken = ahead = 0

        def submit(self, request: DecodeRequest) -> Any:
            future, counting = super().submit(request), self
            counting.ahead = max(counting.ahead, len(self.requests) - self.taken)

            class Pending:
                def result(self) -> Any:
                    counting.taken += 1
                    return future.result()

            return Pending()

    decoders = Counting()
    take(TrainingClips(order(fragments), decoders, **limits), 10)  # type: ignore[arg-type]
    assert decoders.ahead == most * BATCH_SIZE


@dataclasses.dataclass
class InThread:
    """Decodes in this process."""

    pool: ThreadPoolExecutor

    def submit(self, request: DecodeRequest) -> Future[tuple[DecodeOutcome, ...]]:
        return self.pool.submit(decode_windows, request, DecodeLimits())


def test_real_shards_over_ranks_and_decode_processes(tmp_path: Path) -> None:
    """Keys over 1, 2 and 3 ranks, decoded here and in two processes: every video once."""
    paths = write_numbered_shards(tmp_path / "shards", 2, 3, broken={"broken": b"no video" * 100})
    storage = LocalStorage(tmp_path / "index")
    fragments = [read_fragment(storage, shard.shard_id) for shard in index(storage, paths)]
    expected = None
    for num_ranks in (1, 2, 3):
        for num_processes in (0, 2):
            with ProcessPool(num_processes, DecodeLimits()) if num_processes else ThreadPoolExecutor(1) as pool:
                decoders = pool if isinstance(pool, ProcessPool) else InThread(pool)
                clips = order(fragments, frames=(9,), batch_size=6)
                ranks = [take(TrainingClips(clips, decoders, rank, num_ranks), 2) for rank in range(num_ranks)]
            for step in range(2):  # an epoch is one batch
                keys = [draw.source.key for rank in ranks for draw in rank[step].draws]
                assert sorted(keys) == [f"{shard:02d}_{video:03d}" for shard in range(2) for video in range(3)]
            frames = np.concatenate([batch.frames for rank in ranks for batch in rank[:1]])
            expected = frames if expected is None else expected
            np.testing.assert_array_equal(frames, expected)
