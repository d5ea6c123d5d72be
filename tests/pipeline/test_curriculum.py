"""Stages of training: each with its shapes and its steps, and any state goes on with what would have followed."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import islice

import pytest

from pipeline.buckets import Bucket, BucketConfig
from pipeline.curriculum import Curriculum, Stage, parse_stages
from pipeline.decode.records import Grid
from pipeline.epoch import ClipOrder, DrawConfig, GlobalBatch, LoaderState
from pipeline.errors import UsageError
from pipeline.index import IndexFragment
from tests.fakes import fragment_of_lengths

SHARDS = [fragment_of_lengths(0, [30, 9, 50, 0, 12, -1]), fragment_of_lengths(1, [31, 12, 5, 0, 0])]
SMALL = Stage(5, DrawConfig(frames=(1, 5), batch_size=2), BucketConfig(sizes=("32x32",)))
LARGE = Stage(4, DrawConfig(frames=(5, 9), batch_size=3), BucketConfig(sizes=("64x64",)))
LAST = Stage(None, DrawConfig(frames=(9,), batch_size=4), BucketConfig(sizes=("64x64",)))


def curriculum(*stages: Stage, shards: list[IndexFragment] = SHARDS) -> Curriculum:
    return Curriculum(stages, 8, len(shards), shards.__getitem__)


def test_one_stage_without_end_is_a_clip_order() -> None:
    plain = ClipOrder(SMALL.draw, SMALL.sizes, 8, len(SHARDS), SHARDS.__getitem__)
    single = curriculum(Stage(None, SMALL.draw, SMALL.sizes))
    assert single.steps is None
    assert list(islice(single.batches(), 30)) == list(islice(plain.batches(), 30))


def test_each_stage_gives_its_steps_and_its_shapes() -> None:
    batches = [batch for batch, _ in islice(curriculum(SMALL, LARGE, LAST).batches(), 15)]
    assert [batch.stage for batch in batches] == [0] * 5 + [1] * 4 + [2] * 6
    assert [batch.step for batch in batches] == list(range(1, 16))
    assert [len(batch.draws) for batch in batches] == [2] * 5 + [3] * 4 + [4] * 6
    assert {batch.bucket for batch in batches[9:]} == {Bucket(9, 64, 64)}
    assert {batch.bucket.height for batch in batches[:5]} == {32}


def test_stages_begin_with_the_whole_of_the_shards_in_an_order_of_their_own() -> None:
    """Two stages that are alike: each draws every sample once an epoch, in another order and other windows."""
    uses = [list(curriculum(SMALL, SMALL).order(stage).draws(0)) for stage in range(2)]
    assert [draw.source.key for draw in uses[0]] != [draw.source.key for draw in uses[1]]
    assert {draw.source.key for draw in uses[0]} == {draw.source.key for draw in uses[1]}
    windows = [{draw.source.key: draw.window for draw in draws} for draws in uses]
    assert windows[0] != windows[1]
    second = [batch for batch, _ in curriculum(SMALL, SMALL).batches() if batch.stage == 1]
    assert second[0].draws[0].epoch == 0
    assert min(draw.number for batch in second for draw in batch.draws) == 0


def test_a_state_of_any_step_goes_on_over_the_ends_of_stages() -> None:
    def rest(state: LoaderState) -> list[tuple[GlobalBatch, LoaderState]]:
        kept = LoaderState.from_json(json.loads(json.dumps(state.as_json())))
        return list(curriculum(SMALL, LARGE, SMALL).batches(kept))

    undisturbed = rest(LoaderState())
    assert len(undisturbed) == curriculum(SMALL, LARGE, SMALL).steps == 14
    for done, (_, state) in enumerate(undisturbed, start=1):
        assert rest(state) == undisturbed[done:]
    assert undisturbed[4][1] == LoaderState(5, stage=1)
    assert undisturbed[-1][1] == LoaderState(14, stage=3)


@pytest.mark.parametrize(
    "state",
    [
        LoaderState(5),
        LoaderState(4, stage=1),
        LoaderState(9, stage=1),
        LoaderState(10, stage=2),
        LoaderState(9, stage=3),
    ],
)
def test_a_state_of_other_stages_is_refused(state: LoaderState) -> None:
    with pytest.raises(UsageError, match=r"these 2 stages begin and end at steps \(0, 5, 9\)"):
        next(curriculum(SMALL, LARGE).batches(state))


def test_only_the_last_stage_is_without_end() -> None:
    for stages in ((), (LAST, SMALL)):
        with pytest.raises(UsageError, match="every one but the last has its steps"):
            curriculum(*stages)


def test_sizes_off_the_grid_are_refused_before_their_stage_begins() -> None:
    with pytest.raises(UsageError, match="36x36 is not on"):
        curriculum(SMALL, Stage(None, sizes=BucketConfig(sizes=("36x36",))))


def test_texts_say_what_differs_from_the_flags() -> None:
    draw, sizes = DrawConfig(frames=(9,), batch_size=4, seed=3), BucketConfig(pixel_budget=4096, fit="stretch")
    assert parse_stages((), draw, sizes) == (Stage(None, draw, sizes),)
    texts = ("2000 sizes=64x64,64x96 frames=1,9 frames_weights=1,2.5 batch_size=8", "10 fps=12.5", "frame_step=2")
    first, second, third = parse_stages(texts, draw, sizes)
    assert first.steps == 2000
    assert first.draw == DrawConfig(frames=(1, 9), frames_weights=(1.0, 2.5), batch_size=8, seed=3)
    assert first.sizes == BucketConfig(sizes=("64x64", "64x96"), fit="stretch")
    assert (second.steps, second.draw.grid, second.sizes) == (10, Grid(Fraction(25, 2)), sizes)
    assert (third.steps, third.draw.grid) == (None, Grid(None, 2))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("2000 sizes",), "stage '2000 sizes': 'sizes' needs a value"),
        (("2000 seed=1",), "'seed' cannot differ by stage"),
        (("2000 frames=5 frames=9",), "'frames' is given twice"),
        (("2000 frames=5,x",), "stage '2000 frames=5,x': .*'x'. A stage is 'STEPS KEY=VALUE"),
        (("2000 frames=5,5",), "stage '2000 frames=5,5': frames must be different"),
        (("2000 sizes=64",), "'64' is not height x width"),
        (("many frames=5",), "stage 'many frames=5'"),
        (("0 frames=5",), "at least 1 step"),
        (("",), "stage '': invalid"),
        (("frames=5", "10 frames=9"), "every one but the last has its steps"),
    ],
)
def test_a_text_that_is_no_stage_is_named(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        curriculum(*parse_stages(texts, DrawConfig(), BucketConfig()))
