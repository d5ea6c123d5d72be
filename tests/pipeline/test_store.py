from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from pipeline import store
from pipeline.buckets import Bucket
from pipeline.errors import MismatchError, StoreError, UsageError
from pipeline.plan import Unit
from pipeline.recipe import EncodeConfig, Recipe, StoreDtype, to_tree
from pipeline.storage import LocalStorage
from pipeline.store import Header, checksum, decode_shard, encode_shard, to_float32, to_float64, to_stored
from tests.fakes import FAKE_CARD, fake_recipe
from tests.plans import fragment, media_info, planned_store

BUCKET = Bucket(9, 32, 32)
DTYPES: list[StoreDtype] = ["float16", "float32", "bfloat16"]
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    65504.0,
    65520.0,
    3.39e38,
    np.inf,
    -np.inf,
    np.nan,
    1e-45,
    -1e-40,
    1.00390625,
    1.01171875,
]


def recipe_of(dtype: StoreDtype, unit_rows: int = 4) -> Recipe:
    return fake_recipe(encode=EncodeConfig(dtype=dtype, batch_size=2, unit_rows=unit_rows))


def random_rows(recipe: Recipe, seed: int = 0, absent: tuple[int, ...] = ()) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(recipe.unit_rows(BUCKET), *recipe.row_shape(BUCKET)))
    rows = to_stored(values.astype(np.float32), recipe.encode.dtype)
    rows[list(absent)] = store.stored_nan(recipe.encode.dtype)
    return rows


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_values_are_those_of_torch(dtype: StoreDtype) -> None:
    random = np.random.default_rng(1).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = np.concatenate([random, np.array(SPECIAL, np.float32)])
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(to_float32(to_stored(values, dtype), dtype), expected)
    back = to_float32(to_stored(values, dtype), dtype)
    np.testing.assert_array_equal(np.signbit(back[~np.isnan(back)]), np.signbit(expected[~np.isnan(expected)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_holds_the_values_of_float32(dtype: StoreDtype) -> None:
    stored = to_stored(np.array([*SPECIAL, np.pi, 1e-7], np.float32), dtype)
    expected = to_float32(stored, dtype).astype(np.float64)
    assert to_float64(stored, dtype).tobytes() == expected.tobytes()


def test_every_nan_is_the_fill_value_in_bfloat16() -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert set(to_stored(nans, "bfloat16").tolist()) == {int(store.stored_nan("bfloat16"))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_gives_its_rows_back(dtype: StoreDtype) -> None:
    recipe = recipe_of(dtype)
    rows = random_rows(recipe, absent=(1,))
    data = encode_shard(recipe, BUCKET, rows)
    back = decode_shard(recipe, BUCKET, data, "name")
    assert back.dtype == rows.dtype
    assert back.tobytes() == rows.tobytes()
    assert np.isnan(to_float32(back[1], dtype)).all()
    row_bytes, index_bytes = recipe.row_bytes(BUCKET) + 4, 4 * 16 + 4
    assert len(data) == 3 * row_bytes + index_bytes  # The absent row takes no space.
    assert encode_shard(recipe, BUCKET, store.absent_rows(recipe, BUCKET)) == b""


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_byte_for_byte_those_of_zarr_python(
    storage: LocalStorage, tmp_path: Path, dtype: StoreDtype
) -> None:
    """Also with a last unit that is cut short by the array's end."""
    recipe = recipe_of(dtype)
    plan = planned_store(storage, recipe, [fragment("a", [media_info(30)] * 3)])  # 6 rows, units of 4
    shape = recipe.row_shape(BUCKET)
    plain = zarr.create_array(
        tmp_path / "plain",
        shape=(6, *shape),
        chunks=(1, *shape),
        shards=(4, *shape),
        dtype="uint16" if dtype == "bfloat16" else dtype,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=store.stored_nan(dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    first, second = random_rows(recipe, 1, absent=(2,)), random_rows(recipe, 2, absent=(2, 3))
    plain[:] = np.concatenate([first, second[:2]])
    for unit, rows in zip(plan.units(), (first, second), strict=True):
        ours = encode_shard(recipe, BUCKET, rows)
        assert ours == (tmp_path / "plain" / Path(store.shard_name(unit)).name).read_bytes()
        storage.put(store.shard_name(unit), ours)
    opened = store.open_array(storage, BUCKET)
    assert np.asarray(opened[:]).tobytes() == np.asarray(plain[:]).tobytes()
    assert opened.attrs.asdict() == {"logical_dtype": dtype, "bucket": "9x32x32"}
    ours_meta, plain_meta = (
        {
            name: value
            for name, value in json.loads(path.read_text()).items()
            if name not in ("attributes", "dimension_names")
        }
        for path in (Path(storage.url) / store.array_name(BUCKET) / "zarr.json", tmp_path / "plain" / "zarr.json")
    )
    assert ours_meta == plain_meta


ROWS_OF: dict[str, Callable[[np.ndarray, Any], None]] = {
    "random": lambda _row, _nan: None,
    "absent": lambda row, nan: row.fill(nan),
    "another NaN": lambda row, _nan: row.view(np.uint8).fill(0xFF),
    "first value NaN": lambda row, nan: row.put(0, nan),
    "all NaN but the last": lambda row, nan: row.put(range(row.size - 1), nan),
    "zero": lambda row, _nan: row.fill(0),
    "negative zero": lambda row, _nan: row.fill(
        np.copysign(row.dtype.type(0), -1) if row.dtype.kind == "f" else 0x8000
    ),
    "infinite": lambda row, _nan: row.fill(np.inf if row.dtype.kind == "f" else 0x7F80),
}


def zarr_shard(recipe: Recipe, rows: np.ndarray) -> bytes:
    """What zarr-python writes for the rows of one unit; nothing when all are absent."""
    objects: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(objects),
        shape=rows.shape,
        chunks=(1, *rows.shape[1:]),
        shards=(recipe.unit_rows(BUCKET), *rows.shape[1:]),
        dtype=rows.dtype,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=store.stored_nan(recipe.encode.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    array[:] = rows
    return objects["c.0.0.0.0.0"].to_bytes() if "c.0.0.0.0.0" in objects else b""


@settings(max_examples=80)
@given(
    dtype=st.sampled_from(DTYPES),
    kinds=st.lists(st.sampled_from(list(ROWS_OF)), min_size=1, max_size=8),
    missing=st.integers(0, 2),
)
@example(dtype="float16", kinds=["absent"] * 4, missing=0)
@example(dtype="float32", kinds=list(ROWS_OF), missing=0)
@example(dtype="bfloat16", kinds=list(ROWS_OF), missing=2)
def test_any_unit_is_byte_for_byte_that_of_zarr_python(dtype: StoreDtype, kinds: list[str], missing: int) -> None:
    """Whatever its rows hold, and with `missing` rows at its end."""
    recipe = recipe_of(dtype, unit_rows=2 * -(-(len(kinds) + missing) // 2))
    rows = random_rows(recipe)[: len(kinds)]
    for row, kind in zip(rows, kinds, strict=True):
        ROWS_OF[kind](row, store.stored_nan(dtype))
    data = encode_shard(recipe, BUCKET, rows)
    assert data == zarr_shard(recipe, rows)
    assert (data == b"") == (set(kinds) <= ({"absent"} if dtype == "bfloat16" else {"absent", "another NaN"}))
    if data:
        back = decode_shard(recipe, BUCKET, data, "name")
        np.testing.assert_array_equal(to_float32(back[: len(rows)], dtype), to_float32(rows, dtype))


def test_rows_in_any_layout_make_the_same_shard() -> None:
    recipe = recipe_of("float32")
    rows = random_rows(recipe)
    data = encode_shard(recipe, BUCKET, rows)
    for other in (np.asfortranarray(rows), rows.astype(">f4"), np.repeat(rows, 2, axis=0)[::2]):
        assert encode_shard(recipe, BUCKET, other) == data


def test_rows_that_are_not_of_the_unit_are_refused() -> None:
    recipe = recipe_of("float16")
    rows = random_rows(recipe)
    for other in (rows[:, :3], rows[..., None], np.concatenate([rows, rows[:1]])):
        with pytest.raises(ValueError, match=r"a unit of 9x32x32 has at most 4 rows of \(4, 3, 4, 4\), got"):
            encode_shard(recipe, BUCKET, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorstore_reads_the_rows_without_our_code(storage: LocalStorage, dtype: StoreDtype) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    recipe = recipe_of(dtype)
    planned_store(storage, recipe, [fragment("a", [media_info(30)] * 3)])
    rows = random_rows(recipe, absent=(1,))
    storage.put(store.shard_name(Unit(BUCKET, 0)), encode_shard(recipe, BUCKET, rows))
    path = Path(storage.url) / store.array_name(BUCKET)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    array = tensorstore.open(spec).result().read().result()
    assert array.shape == (6, *recipe.row_shape(BUCKET))
    assert array[:4].tobytes() == rows.tobytes()
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    if attributes["logical_dtype"] == "bfloat16":
        array = torch.from_numpy(array).view(torch.bfloat16).float().numpy()
    assert np.isnan(array[1]).all()
    assert np.isnan(array[4:]).all()  # A unit that nobody wrote.
    np.testing.assert_array_equal(np.asarray(array[0], np.float32), to_float32(rows[0], dtype))


def test_plain_zarr_opens_the_group(storage: LocalStorage) -> None:
    planned_store(storage, fake_recipe(), [fragment("a", [media_info(30), media_info(kind="image")])])
    group = zarr.open_group(f"{storage.url}/latents.zarr", mode="r")
    assert sorted(group.array_keys()) == ["1x32x32", "9x32x32"]
    assert group["9x32x32"].shape == (2, 4, 3, 4, 4)
    assert np.isnan(np.asarray(group["9x32x32"][:])).all()
    assert group.attrs["latentmill"]["format_version"] == 1


def test_arrays_grow_with_the_plan(storage: LocalStorage) -> None:
    plan = planned_store(storage, fake_recipe(), [fragment("a", [media_info(30)])])
    assert store.open_array(storage, BUCKET).shape[0] == 2
    planned_store(storage, fake_recipe(), [fragment("b", [media_info(30)])], plan)
    assert store.open_array(storage, BUCKET).shape[0] == 6


def test_a_unit_that_nobody_wrote_reads_nan(storage: LocalStorage) -> None:
    for dtype in DTYPES:
        rows = store.read_unit(storage, recipe_of(dtype), Unit(BUCKET, 0))
        assert rows.shape == (4, 4, 3, 4, 4)
        assert np.isnan(to_float32(rows, dtype)).all()


def test_any_flipped_byte_and_any_cut_is_found(storage: LocalStorage) -> None:
    recipe = recipe_of("float16")
    name = store.shard_name(Unit(BUCKET, 0))
    data = encode_shard(recipe, BUCKET, random_rows(recipe, absent=(2,)))
    starts = [place * (recipe.row_bytes(BUCKET) + 4) for place in range(4)]
    edges = [position for start in starts for position in range(start - 6, start + 6) if 0 <= position < len(data)]
    for position in sorted({*range(0, len(data), 61), *edges, *range(len(data) - 68, len(data))}):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(StoreError, match=r"c\.0\.0\.0\.0\.0 is damaged: .*Delete it and its ledger fragment"):
            decode_shard(recipe, BUCKET, bytes(flipped), name)
    for length in [0, 1, 67, 68, 500, len(data) - 68, len(data) - 1]:
        storage.put(name, data[:length])
        with pytest.raises(StoreError, match=rf"{storage.url}/{name} is damaged"):
            store.read_unit(storage, recipe, Unit(BUCKET, 0))
    with pytest.raises(StoreError, match="is damaged"):
        decode_shard(recipe, BUCKET, data + b"\0", name)


def test_checksum_is_of_the_bytes_in_c_order_whatever_the_layout() -> None:
    row = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float16)
    assert checksum(row) == checksum(np.asfortranarray(row)) == checksum(row.astype(">f2"))
    other = row.copy()
    other[0, 0, 0, 0] = -other[0, 0, 0, 0]
    assert checksum(row) != checksum(other)


def test_the_header_explains_the_store(storage: LocalStorage) -> None:
    recipe = fake_recipe()
    store.write_header(storage, Header(recipe, "/models/fake", {"rows": 3}))
    attributes = json.loads(storage.read("latents.zarr/zarr.json"))["attributes"]["latentmill"]
    assert attributes.pop("versions").keys() >= {"latentmill", "torch", "zarr", "av", "numpy"}
    assert attributes == {
        "format_version": 1,
        "recipe": to_tree(recipe),
        "recipe_fingerprint": recipe.fingerprint,
        "encoder_fingerprint": "f" * 64,
        "encoder_source": "/models/fake",
        "posterior": "mean",
        "pixel_range": [-1.0, 1.0],
        "normaliser": {
            "mean": [0.5, 0.0, 0.0, -1.0],
            "std": [1.0, 2.0, 4.0, 0.5],
            "formula": "(latent - mean) / std",
        },
        "layout": "rows, channels, frames, height, width",
        "statistics": {"rows": 3},
    }
    assert attributes["recipe"]["encode"]["dtype"] == "float16"
    assert attributes["recipe"]["encoder"]["geometry"]["spatial_stride"] == 8


def test_a_header_survives_its_file_with_the_versions_of_its_making(storage: LocalStorage) -> None:
    header = Header(fake_recipe(), "here", {"rows": 1}, {"torch": "1.0", "diffusers": None})
    store.write_header(storage, header)
    assert store.read_header(storage) == store.open_header(storage) == header
    assert store.library_versions()["torch"] == torch.__version__


def rewrite_header(storage: LocalStorage, **changes: Any) -> None:
    document = json.loads(storage.read("latents.zarr/zarr.json"))
    document["attributes"]["latentmill"] |= changes
    storage.put("latents.zarr/zarr.json", json.dumps(document).encode())


def test_headers_that_do_not_fit_are_refused(storage: LocalStorage) -> None:
    assert store.read_header(storage) is None
    with pytest.raises(UsageError, match=rf"--store {storage.url} is not a store yet: run `latentmill plan`"):
        store.open_header(storage)
    store.write_header(storage, Header(fake_recipe(), "here"))
    rewrite_header(storage, format_version=99)
    with pytest.raises(MismatchError, match=r"format_version: the store .* has 99, this release reads 1"):
        store.read_header(storage)
    other = fake_recipe(encoder=dataclasses.replace(FAKE_CARD, fingerprint="e" * 64))
    rewrite_header(storage, format_version=1, recipe=to_tree(other))
    with pytest.raises(StoreError, match="the recipe does not have the fingerprint that stands beside it"):
        store.read_header(storage)
    rewrite_header(storage, recipe={"encoder": to_tree(FAKE_CARD), "windows": 3})
    with pytest.raises(StoreError, match="is not a header of latentmill: Recipe has no field windows"):
        store.read_header(storage)
    for damage in (b"", b"{", b"[]", b"{}", b"\xff\xfe"):
        storage.put("latents.zarr/zarr.json", damage)
        with pytest.raises(StoreError, match=r"latents.zarr/zarr.json is not a header of latentmill"):
            store.read_header(storage)


def test_another_recipe_is_refused_by_its_fields(storage: LocalStorage) -> None:
    header = Header(fake_recipe(), "here")
    store.require_recipe(header, fake_recipe(), storage)
    other = fake_recipe(encode=EncodeConfig(batch_size=2, unit_rows=8, dtype="float32"))
    with pytest.raises(
        MismatchError, match=r"(?s)encode.dtype: .*\"float16\".*\"float32\".*encode.unit_rows: .* 4, .* 8"
    ):
        store.require_recipe(header, other, storage)
