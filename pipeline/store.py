"""The latents at rest: plain Zarr v3, one array per bucket, one Zarr shard per unit.

In:   rows of a unit, float32, [S, C, t, h, w].
Out:  `latents.zarr/<bucket>/c.<unit>.0.0.0.0`, put if absent; the group's attributes, which explain the store.
Cost: a unit's Zarr shard is made in memory (GB/s on one core) and written with one put; zarr-python decodes it at about
      500 MB/s.
Errors: MismatchError for another recipe or format; StoreError for bytes that fail their checksum.

The fill value is NaN and a failed row is never written, so a row that nobody wrote cannot pass for a latent. bfloat16
is kept as uint16 bits, with the attribute `logical_dtype`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from pipeline.buckets import Bucket
from pipeline.errors import MismatchError, StoreError, UsageError
from pipeline.plan import Plan, Unit
from pipeline.recipe import FORMAT_VERSION, Recipe, StoreDtype, from_tree, require_same, to_tree
from pipeline.storage import Storage

GROUP = "latents.zarr"
_GROUP_METADATA = f"{GROUP}/zarr.json"
_STORED_TYPE: dict[StoreDtype, str] = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}
_BFLOAT16_NAN = 0x7FC0
_FIRST_SHARD = "c.0.0.0.0.0"
_CRC32C_BYTES = 4
_NO_CHUNK = 2**64 - 1
_LIBRARIES = ("av", "decord", "diffusers", "latentmill", "numpy", "pillow", "pyarrow", "torch", "zarr")


def array_name(bucket: Bucket) -> str:
    """The array of a bucket, relative to the store."""
    return f"{GROUP}/{bucket.name}"


def shard_name(unit: Unit) -> str:
    """The Zarr shard of a unit, relative to the store."""
    return f"{array_name(unit.bucket)}/c.{unit.number}.0.0.0.0"


def stored_nan(dtype: StoreDtype) -> Any:
    """The fill value of the arrays, in their stored type."""
    return np.uint16(_BFLOAT16_NAN) if dtype == "bfloat16" else np.dtype(dtype).type("nan")


def to_stored(values: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """float32 to the stored type, rounding to nearest even; a value too large for it becomes infinite."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_BFLOAT16_NAN), rounded)


def to_float32(stored: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """Stored values as float32."""
    if dtype != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def to_float64(stored: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """Stored values as float64."""
    return (to_float32(stored, dtype) if dtype == "bfloat16" else stored).astype(np.float64)


def checksum(row: np.ndarray) -> str:
    """blake2b-128 of a row's stored bytes, little-endian, C order."""
    return hashlib.blake2b(row.astype(row.dtype.newbyteorder("<")).tobytes(), digest_size=16).hexdigest()


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that a latent's bits may depend on."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Header:
    """What the group's attributes say: the recipe, and what a person or another program needs to use the latents.

    `versions` are those that the store was begun with; the run log names those of every run.
    """

    recipe: Recipe
    encoder_source: str
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str | None] = dataclasses.field(default_factory=library_versions)

    def to_attributes(self) -> dict[str, Any]:
        encoder = self.recipe.encoder
        return {
            "latentmill": {
                "format_version": FORMAT_VERSION,
                "recipe": to_tree(self.recipe),
                "recipe_fingerprint": self.recipe.fingerprint,
                "encoder_fingerprint": encoder.fingerprint,
                "encoder_source": self.encoder_source,
                "posterior": self.recipe.encode.posterior,
                "pixel_range": list(encoder.pixel_range),
                "normaliser": to_tree(encoder.normaliser),
                "layout": "rows, channels, frames, height, width",
                "statistics": dict(self.statistics),
                "versions": dict(self.versions),
            }
        }


def read_header(storage: Storage) -> Header | None:
    """The store's header; None for a prefix that is no store yet.

    Raises:
        MismatchError: another format version. StoreError: unreadable.
    """
    if not storage.exists(_GROUP_METADATA):
        return None
    try:
        attributes = json.loads(storage.read(_GROUP_METADATA))["attributes"]["latentmill"]
        if attributes["format_version"] != FORMAT_VERSION:
            raise MismatchError(
                f"format_version: the store {storage.url} has {attributes['format_version']}, "
                f"this release reads {FORMAT_VERSION}"
            )
        header = Header(
            from_tree(Recipe, attributes["recipe"]),
            attributes["encoder_source"],
            attributes["statistics"],
            attributes["versions"],
        )
        whole = header.recipe.fingerprint == attributes["recipe_fingerprint"]
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise StoreError(f"{storage.url}/{_GROUP_METADATA} is not a header of latentmill: {error}") from error
    if not whole:
        raise StoreError(
            f"{storage.url}/{_GROUP_METADATA}: the recipe does not have the fingerprint that stands beside it; "
            "somebody changed it. Restore it: the latents were not made by that recipe."
        )
    return header


def open_header(storage: Storage) -> Header:
    """The store's header.

    Raises:
        UsageError: there is no store at this place.
    """
    header = read_header(storage)
    if header is None:
        raise UsageError(
            f"--store {storage.url} is not a store yet: run `latentmill plan` or `latentmill encode` on it"
        )
    return header


def write_header(storage: Storage, header: Header) -> None:
    """Write or replace the group's metadata."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": header.to_attributes()}
    storage.put(_GROUP_METADATA, json.dumps(metadata, indent=2, sort_keys=True).encode())


def require_recipe(header: Header, recipe: Recipe, storage: Storage) -> None:
    """Refuse another recipe than the store's, naming the fields."""
    require_same(to_tree(header.recipe), to_tree(recipe), storage.url)


def _memory_array(recipe: Recipe, bucket: Bucket, rows: int) -> tuple[zarr.Array[Any], dict[str, Any]]:
    """A bucket's array in memory, and the objects it is made of."""
    objects: dict[str, Any] = {}
    shape = recipe.row_shape(bucket)
    array = zarr.create_array(
        MemoryStore(objects),
        shape=(rows, *shape),
        chunks=(1, *shape),
        shards=(recipe.unit_rows(bucket), *shape),
        dtype=_STORED_TYPE[recipe.encode.dtype],
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=stored_nan(recipe.encode.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("row", "channel", "frame", "height", "width"),
        attributes={"logical_dtype": recipe.encode.dtype, "bucket": bucket.name},
    )
    return array, objects


def write_arrays(storage: Storage, plan: Plan) -> None:
    """Create each bucket's array, or extend it to the plan's rows. Only the planner calls this."""
    for bucket, bucket_plan in plan.buckets.items():
        _, objects = _memory_array(plan.recipe, bucket, bucket_plan.end_row)
        storage.put(f"{array_name(bucket)}/zarr.json", objects["zarr.json"].to_bytes())


def encode_shard(recipe: Recipe, bucket: Bucket, rows: np.ndarray) -> bytes:
    """A unit's Zarr shard: stored rows [S, C, t, h, w], the last ones may be missing; empty when all rows are absent.

    Zarr v3's codec `sharding_indexed`: the chunks with their crc32c, all-NaN rows left out; then an index of offset and
    size per row of the unit, with its crc32c.

    Raises:
        ValueError: rows of another shape than the bucket's, or more than a unit has.
    """
    unit_rows, row_shape = recipe.unit_rows(bucket), recipe.row_shape(bucket)
    if rows.shape[1:] != row_shape or len(rows) > unit_rows:
        raise ValueError(f"a unit of {bucket.name} has at most {unit_rows} rows of {row_shape}, got {rows.shape}")
    rows = np.ascontiguousarray(rows, np.dtype(_STORED_TYPE[recipe.encode.dtype]).newbyteorder("<"))
    places = np.flatnonzero(~_are_absent(rows, recipe.encode.dtype))
    if not places.size:
        return b""
    chunk_bytes = rows[0].nbytes + _CRC32C_BYTES
    index = np.full((unit_rows, 2), _NO_CHUNK, "<u8")
    index[places, 0] = np.arange(places.size) * chunk_bytes
    index[places, 1] = chunk_bytes
    blocks = [*(rows[place] for place in places), index]
    return b"".join(part for block in blocks for part in (block, _crc32c(block)))


def _are_absent(rows: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """Which rows are NaN throughout; the first value of a row is enough to tell that it is not."""
    values = rows.reshape(len(rows), -1)
    is_fill = np.isnan if dtype != "bfloat16" else partial(np.equal, stored_nan(dtype))
    absent: np.ndarray = is_fill(values[:, 0])
    for place in np.flatnonzero(absent):
        absent[place] = is_fill(values[place]).all()
    return absent


def _crc32c(block: np.ndarray) -> bytes:
    value: int = google_crc32c.value(block.view(np.uint8).ravel())
    return value.to_bytes(_CRC32C_BYTES, "little")


def decode_shard(recipe: Recipe, bucket: Bucket, data: bytes, name: str) -> np.ndarray:
    """The stored rows of a Zarr shard, [S, C, t, h, w], each chunk's crc32c checked; `name` is for messages.

    Raises:
        StoreError: a checksum fails or the shard is cut short.
    """
    array, objects = _memory_array(recipe, bucket, recipe.unit_rows(bucket))
    objects[_FIRST_SHARD] = default_buffer_prototype().buffer.from_bytes(data)
    remedy = "Delete it and its ledger fragment and encode again."
    if not data:  # zarr-python takes an empty shard for an absent one.
        raise StoreError(f"{name} is damaged: it is empty. {remedy}")
    try:
        return np.asarray(array[:])
    except (ValueError, RuntimeError, IndexError) as error:
        raise StoreError(f"{name} is damaged: {error}. {remedy}") from error


def read_unit(storage: Storage, recipe: Recipe, unit: Unit) -> np.ndarray:
    """The stored rows of a unit; all NaN when no row of it was written.

    Raises:
        StoreError: damaged.
    """
    name = shard_name(unit)
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return absent_rows(recipe, unit.bucket)
    return decode_shard(recipe, unit.bucket, data, f"{storage.url}/{name}")


def absent_rows(recipe: Recipe, bucket: Bucket) -> np.ndarray:
    """The stored rows of a unit, [S, C, t, h, w], that nobody wrote."""
    shape = (recipe.unit_rows(bucket), *recipe.row_shape(bucket))
    return np.full(shape, stored_nan(recipe.encode.dtype), _STORED_TYPE[recipe.encode.dtype])


def open_array(storage: Storage, bucket: Bucket) -> zarr.Array[Any]:
    """A bucket's array, read-only, through zarr-python."""
    if "://" not in storage.url:
        return zarr.open_array(f"{storage.url}/{array_name(bucket)}", mode="r")
    from zarr.storage import ObjectStore

    from pipeline.object_store import open_obstore

    return zarr.open_array(ObjectStore(open_obstore(f"{storage.url}/{array_name(bucket)}"), read_only=True), mode="r")
