from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.spec import Normaliser, Posterior
from models.streamed import ChunkedEncoder
from pipeline.buckets import Bucket, BucketConfig
from pipeline.errors import MismatchError, UsageError
from pipeline.filters import FilterConfig
from pipeline.recipe import EncodeConfig, Recipe, differences, fingerprint, from_tree, require_same, to_tree
from pipeline.sampling import SamplingConfig
from tests.fakes import FAKE_CARD, FAKE_GEOMETRY, fake_recipe

BUCKET = Bucket(9, 32, 32)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    frames = draw(st.lists(st.sampled_from([1, 5, 9, 17]), min_size=1, max_size=3, unique=True).map(tuple))
    windows = draw(st.sampled_from(["head", "center", "uniform", "random"]))
    sampling = SamplingConfig(
        frames,
        fps=draw(st.none() | st.sampled_from([8, 12.5, 24000 / 1001])),
        windows=windows,
        num_windows=draw(st.integers(1, 5)) if windows in ("uniform", "random") else 1,
        short="smaller" if len(frames) > 1 else draw(st.sampled_from(["drop", "pad"])),
        seed=draw(st.integers(0, 2**70)) if windows == "random" else 0,
    )
    buckets = draw(
        st.sampled_from([BucketConfig(("32x32", "64x32")), BucketConfig(pixel_budget=4096, aspect_ratios=("1:1",))])
    )
    filters = FilterConfig(
        min_width=draw(st.none() | st.integers(1, 99)), keep=draw(st.sampled_from([None, "fps > 1"]))
    )
    batch_size = draw(st.none() | st.integers(1, 5))
    encode = EncodeConfig(
        posterior=draw(st.sampled_from(["mean", "moments"])),
        dtype=draw(st.sampled_from(["float16", "float32", "bfloat16"])),
        batch_size=batch_size,
        unit_rows=draw(st.none() | st.integers(1, 4).map(lambda batches: batches * (batch_size or 1))),
        chunk_frames=draw(st.sampled_from([None, 4, 8])),
    )
    return Recipe(FAKE_CARD, sampling, buckets, filters, encode, "pyav", draw(st.none() | st.text(max_size=3)))


@given(recipes())
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    tree = json.loads(json.dumps(to_tree(recipe)))
    assert from_tree(Recipe, tree) == recipe
    assert from_tree(Recipe, tree).fingerprint == recipe.fingerprint


@given(recipes(), recipes())
def test_fingerprints_are_equal_just_when_recipes_are(one: Recipe, other: Recipe) -> None:
    same = to_tree(one) == to_tree(other)
    assert (one.fingerprint == other.fingerprint) == same
    assert (not list(differences(to_tree(one), to_tree(other)))) == same


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(tree, dict):
        return [leaf for name, value in tree.items() for leaf in leaves(value, (*path, name))]
    return [path]


def changed(tree: Any, path: tuple[str, ...]) -> Any:
    if not path:
        return "changed"
    return {**tree, path[0]: changed(tree[path[0]], path[1:])}


@pytest.mark.parametrize("path", leaves(to_tree(fake_recipe())), ids=".".join)
def test_every_field_is_in_the_fingerprint_and_named_when_it_differs(path: tuple[str, ...]) -> None:
    tree = to_tree(fake_recipe())
    other = changed(tree, path)
    assert fingerprint(other) != fingerprint(tree)
    lines = list(differences(tree, other))
    assert [line.split(":")[0] for line in lines] == [".".join(path)]
    with pytest.raises(MismatchError, match=rf"(?s)/the/store .*\n  {'.'.join(path)}: the store has .*new --store"):
        require_same(tree, other, "/the/store")


def test_the_same_recipe_is_no_mismatch() -> None:
    require_same(to_tree(fake_recipe()), to_tree(fake_recipe()), "/the/store")
    assert not list(differences(to_tree(fake_recipe()), to_tree(fake_recipe())))


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "import json, sys; from pipeline.recipe import Recipe, from_tree; "
    code += "print(from_tree(Recipe, json.loads(sys.argv[1])).fingerprint)"
    tree = json.dumps(to_tree(fake_recipe()))
    done = subprocess.run([sys.executable, "-c", code, tree], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fake_recipe().fingerprint


def test_a_rate_typed_as_an_integer_is_the_same_recipe() -> None:
    assert fake_recipe(sampling=SamplingConfig((9,), fps=8)).fingerprint == (
        fake_recipe(sampling=SamplingConfig((9,), fps=8.0)).fingerprint
    )
    assert fingerprint([2**60]) != fingerprint([2**60 + 1])
    assert fingerprint([1.5]) != fingerprint([1])


def test_unknown_fields_are_refused() -> None:
    tree = to_tree(fake_recipe())
    tree["sampling"]["framez"] = [3]
    with pytest.raises(UsageError, match="SamplingConfig has no field framez; it has frames, fps"):
        from_tree(Recipe, tree)


def test_the_default_unit_is_about_32_mb_of_whole_batches() -> None:
    def rows(**encode: Any) -> int:
        return fake_recipe(encode=EncodeConfig(**encode)).unit_rows(BUCKET)

    assert fake_recipe().row_bytes(BUCKET) == 4 * 3 * 4 * 4 * 2
    assert rows() == 256
    assert rows(batch_size=3) == 255
    assert rows(batch_size=300) == 300
    assert rows(batch_size=3, unit_rows=6) == 6
    large = Bucket(81, 720, 1280)  # 4 x 21 x 90 x 160 values of 2 bytes
    whole = {"stream_mb": 300}
    assert fake_recipe(encode=EncodeConfig(batch_size=2, **whole)).unit_rows(large) == 12
    assert fake_recipe(encode=EncodeConfig(batch_size=2, dtype="float32", **whole)).unit_rows(large) == 6
    assert fake_recipe(encode=EncodeConfig(batch_size=32, **whole)).unit_rows(large) == 32
    assert fake_recipe(encode=EncodeConfig(batch_size=32)).unit_rows(large) == 13


@pytest.mark.parametrize(
    ("bucket", "batch_size"),
    [
        (Bucket(17, 256, 256), 4),
        (Bucket(17, 256, 288), 2),
        (Bucket(81, 480, 832), 1),
        (Bucket(1, 512, 512), 8),
        (Bucket(1, 1024, 1024), 2),
        (Bucket(9, 64, 64), 64),
        (Bucket(1, 32, 32), 64),
    ],
)
def test_small_clips_share_an_encoder_call(bucket: Bucket, batch_size: int) -> None:
    assert fake_recipe(encode=EncodeConfig(stream_mb=300)).batch_size(bucket) == batch_size
    assert fake_recipe(encode=EncodeConfig(stream_mb=300)).unit_rows(bucket) % batch_size == 0
    assert fake_recipe(encode=EncodeConfig(batch_size=3, stream_mb=300)).batch_size(bucket) == 3


def test_batches_divide_the_unit_rows_that_are_asked_for() -> None:
    tiny = Bucket(9, 64, 64)
    assert [fake_recipe(encode=EncodeConfig(unit_rows=rows)).batch_size(tiny) for rows in (1, 12, 96, 128)] == [
        1, 4, 32, 64,
    ]  # fmt: skip


def test_long_clips_stream_alone_when_the_encoder_is_causal() -> None:
    recipe = fake_recipe(encode=EncodeConfig(batch_size=4, stream_mb=1))
    short, long = Bucket(1, 512, 682), Bucket(1, 512, 683)  # 1 MiB is 512 x 682.67 pixels
    assert [recipe.streams(bucket) for bucket in (short, long)] == [False, True]
    assert [recipe.batch_size(bucket) for bucket in (short, long)] == [4, 1]
    geometry = dataclasses.replace(recipe.encoder.geometry, causality="none")
    card = dataclasses.replace(recipe.encoder, geometry=geometry)
    assert not dataclasses.replace(recipe, encoder=card).streams(long)


def test_chunks_are_of_causal_encoders_and_of_more_than_an_image() -> None:
    recipe = fake_recipe()
    assert [recipe.chunk_frames(bucket) for bucket in (BUCKET, Bucket(1, 32, 32))] == [8, None]
    assert fake_recipe(encode=EncodeConfig(chunk_frames=20)).chunk_frames(BUCKET) == 20
    for causality in ("causal-attention", "none"):
        geometry = dataclasses.replace(FAKE_GEOMETRY, causality=causality)  # type: ignore[arg-type]
        whole = fake_recipe(encoder=dataclasses.replace(FAKE_CARD, geometry=geometry))
        assert whole.chunk_frames(BUCKET) is None


class Nowhere:
    """A backend that is never called."""

    one_at_a_time = False

    def encode_chunk(self, pixels: torch.Tensor, state: Any) -> tuple[Posterior, Any]:
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        raise NotImplementedError

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        pass


@pytest.mark.parametrize("temporal_stride", [1, 2, 3, 4, 6, 8, 12, 16])
def test_the_chunks_that_a_plan_records_are_those_that_an_encoder_takes(temporal_stride: int) -> None:
    geometry = dataclasses.replace(FAKE_GEOMETRY, temporal_stride=temporal_stride)
    card = dataclasses.replace(FAKE_CARD, geometry=geometry)
    num_frames = 1 + 2 * temporal_stride
    recipe = fake_recipe(encoder=card, sampling=SamplingConfig((num_frames,)))
    stream = ChunkedEncoder(card, Nowhere(), "cpu", torch.float32).encode_stream(recipe.encode.chunk_frames)
    assert recipe.chunk_frames(Bucket(num_frames, 32, 32)) == stream.state["chunk_frames"]


def test_moments_have_twice_the_channels() -> None:
    mean, moments = fake_recipe(), fake_recipe(encode=EncodeConfig(posterior="moments"))
    assert mean.row_shape(BUCKET) == (4, 3, 4, 4)
    assert moments.row_shape(BUCKET) == (8, 3, 4, 4)
    assert moments.row_bytes(BUCKET) == 2 * mean.row_bytes(BUCKET)


def test_frames_off_the_grid_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--frames 10: for fake 10 frames are not 1\+4k: use 9 or 13"):
        fake_recipe(sampling=SamplingConfig((10,)))


def test_sizes_off_the_grid_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="30x32 is not on the encoder's grid, multiples of 8: the nearest is 32x32"):
        fake_recipe(buckets=BucketConfig(("30x32",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"stream_mb": 0}, "--stream-mb must be positive, got 0"),
        ({"unit_rows": 0}, "--unit-rows must be at least 1, got 0"),
        ({"batch_size": 4, "unit_rows": 6}, "--unit-rows must be a multiple of --batch-size 4, got 6"),
        ({"sample_seed": 1}, "--sample-seed needs --posterior sample, got --posterior mean"),
        ({"dtype": "float64"}, "--dtype is one of float16, float32, bfloat16, got 'float64'"),
        ({"posterior": "mode"}, "--posterior is one of mean, moments, sample, got 'mode'"),
        ({"compute_dtype": "float16"}, "--compute-dtype is one of float32, bfloat16, got 'float16'"),
    ],
)
def test_encode_choices_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncodeConfig(**changes)


def test_choices_that_the_encoder_cannot_serve() -> None:
    plain = dataclasses.replace(FAKE_CARD, posterior=False)
    with pytest.raises(UsageError, match="--posterior moments: fake has no log-variance; use mean"):
        fake_recipe(encoder=plain, encode=EncodeConfig(posterior="moments"))
    with pytest.raises(UsageError, match="--chunk-frames must be a multiple of 4, got 6"):
        fake_recipe(encode=EncodeConfig(chunk_frames=6))
    leaky = dataclasses.replace(FAKE_CARD, geometry=dataclasses.replace(FAKE_GEOMETRY, causality="none"))
    with pytest.raises(UsageError, match="--chunk-frames 8: fake cannot stream; leave it unset"):
        fake_recipe(encoder=leaky, encode=EncodeConfig(chunk_frames=8))
    with pytest.raises(UsageError, match="--decoder is one of auto, pyav, decord, torchcodec, got 'gpu'"):
        fake_recipe(decoder="gpu")


def test_the_normaliser_comes_back_as_tuples() -> None:
    assert from_tree(Normaliser, to_tree(FAKE_CARD.normaliser)) == FAKE_CARD.normaliser
