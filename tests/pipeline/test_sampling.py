import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode.records import Grid, Window
from pipeline.errors import UsageError
from pipeline.sampling import SamplingConfig, WindowPlan, exact_fps, grid, image_window, sample_windows


def windows_of(plan: WindowPlan) -> list[tuple[int, int]]:
    return [(window.start, window.num_frames) for window in map(plan.window, range(plan.count))]


@st.composite
def configs(draw: st.DrawFn) -> SamplingConfig:
    mode = draw(st.sampled_from(["head", "center", "uniform", "slide", "chunks", "random"]))
    short = draw(st.sampled_from(["drop", "pad", "smaller"]))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4 if short == "smaller" else 1, unique=True))
    return SamplingConfig(
        frames=tuple(lengths),
        windows=mode,
        num_windows=draw(st.integers(1, 12)) if mode in ("uniform", "random") else 1,
        stride=draw(st.integers(1, 50)) if mode == "slide" else None,
        short=short,
        seed=draw(st.integers(-5, 5)) if mode == "random" else 0,
    )


@settings(deadline=None)
@given(configs(), st.integers(0, 300), st.text())
def test_windows_lie_in_the_video_in_ascending_order_and_repeat(config, grid_length, key):
    plan = sample_windows(config, grid_length, key)
    windows = windows_of(plan)
    starts = [start for start, _ in windows]

    assert all(start >= 0 and start + frames <= grid_length for start, frames in windows)
    assert starts == sorted(set(starts))
    assert (plan.filtered == "short_video") == (not windows)
    assert plan == sample_windows(config, grid_length, key)
    with pytest.raises(IndexError):
        plan.window(plan.count)


@settings(deadline=None)
@given(configs(), st.integers(0, 300), st.text())
def test_the_length_is_the_longest_that_fits(config, grid_length, key):
    plan = sample_windows(config, grid_length, key)
    fitting = [length for length in config.frames if length <= grid_length]
    if config.short == "pad" and grid_length:
        assert plan.num_frames == max(config.frames)
    else:
        assert plan.num_frames == max(fitting, default=0)
    if config.short != "pad":
        assert all(frames == plan.num_frames for _, frames in windows_of(plan))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(["drop", "pad"]))
def test_chunks_tile_without_overlap(length, grid_length, short):
    plan = sample_windows(SamplingConfig((length,), windows="chunks", short=short), grid_length, "")
    covered = [position for start, frames in windows_of(plan) for position in range(start, start + frames)]
    whole = grid_length if short == "pad" else grid_length // length * length
    assert covered == list(range(whole))


@settings(deadline=None)
@given(configs(), st.integers(1, 300))
def test_only_padding_makes_a_window_shorter_and_it_keeps_the_valid_count(config, grid_length):
    plan = sample_windows(config, grid_length, "key")
    partial = [window for window in windows_of(plan) if window[1] < plan.num_frames]
    if grid_length < plan.num_frames:
        assert windows_of(plan) == [(0, grid_length)]
    elif partial:
        assert (config.windows, config.short) == ("chunks", "pad")
        assert partial == [(grid_length // plan.num_frames * plan.num_frames, grid_length % plan.num_frames)]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(30, 200), st.integers(1, 300), st.sampled_from(["uniform", "random"]))
def test_counted_modes_give_as_many_windows_as_there_are_starts(length, grid_length, wanted, mode):
    plan = sample_windows(SamplingConfig((length,), windows=mode, num_windows=wanted), grid_length, "key")
    assert plan.count == min(wanted, grid_length - length + 1)


@pytest.mark.parametrize(
    ("options", "grid_length", "expected"),
    [
        ({}, 100, [(0, 17)]),
        ({"windows": "center"}, 100, [(41, 17)]),
        ({"windows": "center"}, 17, [(0, 17)]),
        ({"windows": "uniform"}, 100, [(41, 17)]),
        ({"windows": "uniform", "num_windows": 3}, 37, [(0, 17), (10, 17), (20, 17)]),
        ({"windows": "uniform", "num_windows": 4}, 27, [(0, 17), (3, 17), (7, 17), (10, 17)]),
        ({"windows": "uniform", "num_windows": 9}, 18, [(0, 17), (1, 17)]),
        ({"windows": "slide", "stride": 8}, 40, [(0, 17), (8, 17), (16, 17)]),
        ({"windows": "slide", "stride": 23}, 40, [(0, 17), (23, 17)]),
        ({"windows": "chunks"}, 50, [(0, 17), (17, 17)]),
        ({"windows": "chunks", "short": "pad"}, 50, [(0, 17), (17, 17), (34, 16)]),
        ({"windows": "chunks", "short": "pad"}, 34, [(0, 17), (17, 17)]),
        ({"windows": "random", "num_windows": 2}, 18, [(0, 17), (1, 17)]),
        ({"short": "pad"}, 5, [(0, 5)]),
        ({"frames": (17, 9, 33), "short": "smaller"}, 32, [(0, 17)]),
        ({"frames": (17, 9, 33), "short": "smaller"}, 33, [(0, 33)]),
        ({"frames": (17, 9), "short": "smaller", "windows": "chunks"}, 16, [(0, 9)]),
    ],
)
def test_worked_examples(options, grid_length, expected):
    assert windows_of(sample_windows(SamplingConfig(**options), grid_length, "a/0001")) == expected


@pytest.mark.parametrize(("short", "grid_length"), [("drop", 16), ("smaller", 16), ("pad", 0)])
def test_a_video_without_a_window_is_filtered(short, grid_length):
    plan = sample_windows(SamplingConfig(short=short), grid_length, "")
    assert (plan.filtered, plan.count, plan.num_frames) == ("short_video", 0, 0)


def test_a_film_of_any_length_costs_no_memory():
    plan = sample_windows(SamplingConfig(windows="slide", stride=1), 10**12, "")
    assert plan.count == 10**12 - 16
    assert plan.window(10**11) == Window(10**11, 17)
    assert isinstance(plan.starts, range)


def test_random_starts_depend_on_seed_and_key_and_on_nothing_else():
    config = SamplingConfig(windows="random", num_windows=3, seed=7)
    starts = sample_windows(config, 10_000, "clip/é").starts
    program = (
        "from pipeline.sampling import *; "
        "print(sample_windows(SamplingConfig(windows='random', num_windows=3, seed=7), 10_000, 'clip/\\u00e9').starts)"
    )
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert other.strip() == str(starts)
    assert starts != sample_windows(config, 10_000, "clip/e").starts
    assert starts != sample_windows(SamplingConfig(windows="random", num_windows=3, seed=8), 10_000, "clip/é").starts


def test_random_sets_are_equally_likely():
    config = SamplingConfig((1,), windows="random", num_windows=2)
    sets = [tuple(sample_windows(config, 4, str(key)).starts) for key in range(6000)]
    assert len(set(sets)) == 6
    assert all(880 < sets.count(pair) < 1120 for pair in set(sets))


def test_keys_that_are_not_utf8_are_drawn_too():
    assert sample_windows(SamplingConfig(windows="random"), 100, "\udcff").count == 1


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (24.0, Fraction(24)),
        (30, Fraction(30)),
        (12.5, Fraction(25, 2)),
        (1 / 3, Fraction(1, 3)),
        (7.1234, Fraction(71234, 10000)),
        (0.0001, Fraction(1, 10000)),
    ],
)
def test_fps_is_exact(fps, exact):
    assert exact_fps(fps) == exact
    assert grid(SamplingConfig(fps=fps)) == Grid(fps=exact)


def test_a_native_grid_has_the_frame_step():
    assert grid(SamplingConfig(frame_step=2)) == Grid(fps=None, frame_step=2)


def test_an_image_is_one_clip_of_one_frame():
    plan = image_window()
    assert (plan.num_frames, plan.filtered, windows_of(plan)) == (1, None, [(0, 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_windows": 2}, "num_windows=2 needs"),
        ({"windows": "slide"}, "needs a stride"),
        ({"stride": 4}, "stride=4 needs"),
        ({"windows": "chunks", "seed": 1}, "seed=1 needs"),
        ({"fps": 16.0, "frame_step": 2}, "frame_step=2 needs fps unset"),
        ({"frames": (17, 33)}, "need short 'smaller'"),
        ({"frames": (17, 33), "short": "pad"}, "need short 'smaller'"),
        ({"frames": ()}, "different positive"),
        ({"frames": (0,)}, "different positive"),
        ({"frames": (17, 17), "short": "smaller"}, "different positive"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"fps": float("nan")}, "fps must be positive"),
        ({"frame_step": 0}, "frame_step must be at least 1"),
        ({"windows": "slide", "stride": 0}, "stride must be at least 1"),
        ({"windows": "uniform", "num_windows": 0}, "num_windows must be at least 1"),
        ({"windows": "tail"}, "'tail' is unknown"),
        ({"short": "loop"}, "'loop' is unknown"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingConfig(**options)
