from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.spec import Posterior, VideoEncoder
from pipeline.buckets import BucketConfig
from pipeline.commit import RowFacts, RowResult
from pipeline.decode.frame_memory import FrameMemory
from pipeline.decode.records import DecodedClip
from pipeline.encode import StreamedClip, encode_slice, to_batch
from pipeline.errors import DecodeError, SampleError
from pipeline.placement import Clip
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.sampling import SamplingConfig
from pipeline.store import absent_rows, to_float32
from tests.fakes import FakeEncoder, fake_recipe
from tests.plans import all_clips, decoded, fragment, media_info, outcomes_of, plan_of
from tests.pretrained_models import STREAMED, Saved

FRAGMENTS = [fragment("a", [media_info(30)] * 4)]


def recipe_of(**encode: Any) -> Recipe:
    return fake_recipe(encode=EncodeConfig(batch_size=4, unit_rows=4, **encode))


def clips(count: int = 4) -> list[Clip]:
    return all_clips(plan_of(fake_recipe(), FRAGMENTS), FRAGMENTS)[:count]


class Recorder(FakeEncoder):
    """Keeps the batches it is given."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.seen: list[np.ndarray] = []

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.seen.append(frames_BTHWC.numpy().copy())
        self.chunk_frames = chunk_frames
        return super().encode(frames_BTHWC, chunk_frames)


class Places(FakeEncoder):
    """Another log-variance, or a bad value, in every place of the batch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        posterior = super().encode(frames_BTHWC, chunk_frames)
        posterior.mean[1, 0, 0, 0, 0] = self.value
        return posterior


def test_the_batch_has_its_full_size_whatever_failed() -> None:
    encoder = Recorder()
    three = clips(3)
    rows, results = encode_slice(encoder, recipe_of(), three, outcomes_of(three, {1: "corrupt"}))
    (batch,) = encoder.seen
    assert batch.shape == (4, 9, 32, 32, 3)
    assert not batch[1].any()
    assert not batch[3].any()
    np.testing.assert_array_equal(batch[0], decoded(three[0]).frames)
    np.testing.assert_array_equal(batch[2], decoded(three[2]).frames)
    assert rows.shape == (3, 4, 3, 4, 4)
    assert [type(result) for result in results] == [RowFacts, DecodeError, RowFacts]
    assert results[0] == RowFacts("fake", tuple(n / 25 for n in range(9)))


def test_a_batch_that_is_used_again_holds_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.encode._BATCHES", FrameMemory())
    three = clips(3)
    full = to_batch(three, [dataclasses.replace(one, frames=one.frames | 1) for one in map(decoded, three)], 4)
    assert full[:3].all()
    place = full.ctypes.data
    full[:] = 255
    del full
    batch = to_batch(three, outcomes_of(three, {1: "corrupt"}), 4)
    assert batch.ctypes.data == place, "memory was not used again: the test shows nothing"
    assert not batch[1].any()
    assert not batch[3].any()


@pytest.mark.parametrize(("writeable", "valid", "copies"), [(True, 9, False), (False, 9, True), (True, 5, True)])
def test_a_whole_clip_by_itself_is_the_batch(writeable: bool, valid: int, copies: bool) -> None:
    (clip,) = clips(1)
    outcome = decoded(clip)
    outcome = dataclasses.replace(outcome, frames=outcome.frames[:valid], pts_seconds=outcome.pts_seconds[:valid])
    outcome.frames.flags.writeable = writeable
    batch = to_batch([clip], [outcome], 1)
    np.testing.assert_array_equal(batch[0, :valid], outcome.frames)
    assert np.shares_memory(batch, outcome.frames) != copies
    assert batch.shape == (1, 9, 32, 32, 3)
    assert batch.flags.writeable


def test_neighbours_that_fail_change_no_bit() -> None:
    four = clips()
    whole, _ = encode_slice(FakeEncoder(), recipe_of(), four, outcomes_of(four))
    partly, _ = encode_slice(FakeEncoder(), recipe_of(), four, outcomes_of(four, {0: "corrupt", 2: "timeout"}))
    assert partly[1].tobytes() == whole[1].tobytes()
    assert partly[3].tobytes() == whole[3].tobytes()


def test_a_slice_without_a_clip_needs_no_encoder() -> None:
    encoder = FakeEncoder()
    two = clips(2)
    rows, results = encode_slice(encoder, recipe_of(), two, outcomes_of(two, {0: "corrupt", 1: "timeout"}))
    assert encoder.batches == 0
    assert np.isnan(rows).all()
    assert [result.reason for result in results if isinstance(result, SampleError)] == ["corrupt", "timeout"]


def test_chunk_frames_reach_the_encoder() -> None:
    encoder = Recorder()
    encode_slice(encoder, recipe_of(chunk_frames=8), clips(1), outcomes_of(clips(1)))
    assert encoder.chunk_frames == 8


def test_short_windows_repeat_their_last_frame() -> None:
    recipe = fake_recipe(sampling=SamplingConfig((9,), short="pad"))
    fragments = [fragment("a", [media_info(5)])]
    (clip,) = all_clips(plan_of(recipe, fragments), fragments)
    outcome = decoded(clip)
    batch = to_batch([clip], [outcome], 2)
    np.testing.assert_array_equal(batch[0, :5], outcome.frames)
    assert (batch[0, 5:] == outcome.frames[4]).all()


@pytest.mark.parametrize(("dtype", "reason"), [("float16", "overflow"), ("float32", None), ("bfloat16", None)])
def test_values_too_large_for_the_type_fail_their_clip(dtype: str, reason: str | None) -> None:
    two = clips(2)
    rows, results = encode_slice(Places(70_000.0), recipe_of(dtype=dtype), two, outcomes_of(two))
    assert isinstance(results[0], RowFacts)
    if reason is None:
        assert isinstance(results[1], RowFacts)
        assert to_float32(rows, dtype)[1, 0, 0, 0, 0] == pytest.approx(70_000, rel=0.01)  # type: ignore[arg-type]
    else:
        assert isinstance(results[1], SampleError)
        assert (results[1].reason, results[1].detail) == ("overflow", "|latent| reaches 70000, too large for float16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_fail_their_clip(value: float) -> None:
    two = clips(2)
    _, results = encode_slice(Places(value), recipe_of(dtype="float32"), two, outcomes_of(two))
    assert isinstance(results[0], RowFacts)
    assert isinstance(results[1], SampleError)
    assert results[1].reason == "not_finite"


def test_moments_are_the_mean_and_then_the_log_variance() -> None:
    mean, _ = encode_slice(FakeEncoder(), recipe_of(), clips(), outcomes_of(clips()))
    moments, _ = encode_slice(FakeEncoder(), recipe_of(posterior="moments"), clips(), outcomes_of(clips()))
    assert moments.shape == (4, 8, 3, 4, 4)
    assert moments[:, :4].tobytes() == mean.tobytes()
    assert (moments[:, 4:] == -2).all()


def sampled(part: list[Clip], batch_size: int = 4, seed: int = 0) -> np.ndarray:
    recipe = fake_recipe(
        encode=EncodeConfig("sample", "float32", batch_size=batch_size, unit_rows=batch_size, sample_seed=seed)
    )
    return encode_slice(FakeEncoder(), recipe, part, outcomes_of(part))[0]


def test_a_sample_depends_on_the_clip_and_the_seed_alone() -> None:
    four = clips()
    whole = sampled(four)
    moved = [dataclasses.replace(clip, row=clip.row + 100, shard_url="/elsewhere") for clip in four]
    assert sampled(moved).tobytes() == whole.tobytes()
    for place, clip in enumerate(four):
        assert sampled([clip], batch_size=1)[0].tobytes() == whole[place].tobytes()
        assert sampled([four[3], clip], batch_size=2)[1].tobytes() == whole[place].tobytes()
    assert not np.isclose(sampled(four, seed=1), whole).all(axis=(1, 2, 3, 4)).any()


def test_samples_are_normal_about_the_mean_and_differ_by_clip() -> None:
    four = clips()
    mean, _ = encode_slice(FakeEncoder(), recipe_of(dtype="float32"), four, outcomes_of(four))
    noise = (sampled(four) - mean) / np.exp(-1)  # the fake's log-variance is -2
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
    for one in range(4):
        for other in range(one):
            assert abs(np.corrcoef(noise[one].ravel(), noise[other].ravel())[0, 1]) < 0.3
    twin = dataclasses.replace(four[0], sample=dataclasses.replace(four[0].sample, size_bytes=77))
    assert not np.array_equal(sampled([four[0]], 1), sampled([twin], 1))  # a key that two shards use


def test_an_encoder_that_breaks_its_word_is_named() -> None:
    class WrongShape(FakeEncoder):
        def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
            posterior = super().encode(frames_BTHWC, chunk_frames)
            return Posterior(posterior.mean[:, :, :2], None)

    with pytest.raises(
        RuntimeError, match=r"fake made values.shape=\(4, 4, 2, 4, 4\), the plan says \(4, 4, 3, 4, 4\)"
    ):
        encode_slice(WrongShape(), recipe_of(), clips(), outcomes_of(clips()))
    with pytest.raises(RuntimeError, match="made no log-variance, and its card promises one: --posterior sample"):
        encode_slice(WrongShape(), recipe_of(posterior="sample"), clips(), outcomes_of(clips()))


def test_outcomes_are_made_from_the_clip_alone() -> None:
    one = clips(1)[0]
    assert isinstance(outcomes_of([one])[0], DecodedClip)
    np.testing.assert_array_equal(decoded(one).frames, decoded(one).frames)


# long clips, piece by piece


def long_clips(num_frames: int = 30, frames: int = 41, **encode: Any) -> tuple[list[Clip], Recipe]:
    recipe = fake_recipe(
        sampling=SamplingConfig((frames,), short="pad"),
        encode=EncodeConfig(batch_size=1, unit_rows=1, stream_mb=0.01, **encode),
    )
    fragments = [fragment("a", [media_info(num_frames)])]
    return all_clips(plan_of(recipe, fragments), fragments), recipe


def streamed(encoder: VideoEncoder, recipe: Recipe, clip: Clip, piece_frames: int) -> tuple[np.ndarray, RowResult]:
    """The stored row and the result of one clip that came in pieces."""
    whole, result = decoded(clip), None
    row = absent_rows(recipe, clip.bucket)[0]
    stream = StreamedClip(encoder, recipe, clip, row)
    for start in range(0, len(whole.frames), piece_frames):
        assert result is None
        part = slice(start, start + piece_frames)
        result = stream.push(DecodedClip(whole.frames[part], whole.pts_seconds[part], whole.decoder))
    assert result is not None
    return row, result


@pytest.mark.parametrize("piece_frames", [1, 7, 16, 100])
@pytest.mark.parametrize("posterior", ["mean", "moments", "sample"])
@pytest.mark.parametrize("num_frames", [23, 60])
def test_a_clip_in_pieces_has_the_row_of_the_whole_clip(posterior: str, piece_frames: int, num_frames: int) -> None:
    (clip,), recipe = long_clips(num_frames, posterior=posterior)
    rows, results = encode_slice(FakeEncoder(), recipe, [clip], outcomes_of([clip]))
    row, result = streamed(FakeEncoder(), recipe, clip, piece_frames)
    assert row.tobytes() == rows[0].tobytes()
    assert result == results[0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["ours", "wan-2.1", "ltx-0.9"])
def test_real_encoders_make_the_same_latent_of_pieces(name: str, tmp_path: Path, one_thread: None) -> None:
    saved = Saved(STREAMED[name], tmp_path / "model")
    side = 2 * saved.spatial
    recipe = Recipe(
        saved.encoder.card,
        SamplingConfig((25,), short="pad"),
        BucketConfig((f"{side}x{side}",)),
        encode=EncodeConfig(dtype="float32", batch_size=1, unit_rows=1, stream_mb=0.01),
    )
    fragments = [fragment("a", [media_info(22)])]
    (clip,) = all_clips(plan_of(recipe, fragments), fragments)
    (whole,), _ = encode_slice(saved.encoder, recipe, [clip], outcomes_of([clip]))
    row, _ = streamed(saved.encoder, recipe, clip, 10)
    assert row.tobytes() == whole.tobytes()
    plain = saved.whole(torch.from_numpy(to_batch([clip], outcomes_of([clip]), 1)))[0][0]
    assert np.abs(row - plain.numpy()).max() <= 1e-5 * plain.std()


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not_finite"), (70_000.0, "overflow")])
def test_one_bad_piece_fails_the_clip(value: float, reason: str) -> None:
    class Bad(FakeEncoder):
        def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
            posterior = super().encode(frames_BTHWC, chunk_frames)
            if self.batches == 2:
                posterior.mean[0, 0, -1, 0, 0] = value
            return posterior

    (clip,), recipe = long_clips()
    _, result = streamed(Bad(), recipe, clip, 8)
    assert isinstance(result, SampleError)
    assert result.reason == reason


def test_read_only_frames_are_encoded_without_a_warning() -> None:
    (clip,), recipe = long_clips()
    whole, row = decoded(clip), absent_rows(recipe, clip.bucket)[0]
    whole.frames.flags.writeable = False
    assert isinstance(StreamedClip(FakeEncoder(), recipe, clip, row).push(whole), RowFacts)


def test_an_encoder_that_makes_too_few_latent_frames_is_named() -> None:
    class Short(FakeEncoder):
        def _encode_chunk(self, frames: torch.Tensor, state: object) -> tuple[Posterior, object]:
            posterior, state = super()._encode_chunk(frames, state)
            return Posterior(posterior.mean[:, :, :1], None), state

    (clip,), recipe = long_clips()
    with pytest.raises(RuntimeError, match=r"made 6 latent frames, the plan says \(4, 11, 4, 4\)"):
        streamed(Short(), recipe, clip, 8)
