"""The recipe: everything that a latent's value depends on, its fingerprint, and the words for a difference.

In:   the user's choices (frozen dataclasses) and the encoder's card.
Out:  Recipe, `fingerprint`, `to_tree` / `from_tree` (plain JSON), `differences` field by field.
Cost: none; pure.
Errors: UsageError for choices that cannot be; MismatchError from `require_same`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args

from models.spec import EncoderCard, GeometryError, PosteriorMode
from pipeline.buckets import Bucket, BucketConfig, resolve_sizes
from pipeline.decode.records import DecoderName
from pipeline.errors import MismatchError, UsageError
from pipeline.filters import FilterConfig
from pipeline.sampling import SamplingConfig

FORMAT_VERSION = 1
StoreDtype = Literal["float16", "float32", "bfloat16"]
ComputeDtype = Literal["float32", "bfloat16"]
_BYTES_PER_VALUE: dict[StoreDtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_MEGABYTE = 1 << 20
_UNIT_BYTES = 32 << 20
_UNIT_ROWS_AT_MOST = 256
_CALL_PIXELS, _CALL_FRAMES, _BATCH_AT_MOST = 1 << 21, 8, 64

Record = TypeVar("Record")


def _require_word(flag: str, value: str, words: Any) -> None:
    if value not in get_args(words):
        raise UsageError(f"{flag} is one of {', '.join(get_args(words))}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How clips become stored latents."""

    posterior: PosteriorMode = "mean"
    """What is stored: the posterior mean, mean and log-variance ("moments", 2C channels), or a seeded sample."""
    dtype: StoreDtype = "float16"
    """Type of the stored values. bfloat16 is kept as its bits in uint16."""
    compute_dtype: ComputeDtype = "float32"
    """Type the encoder computes in. bfloat16 is faster on GPUs and shifts the latents."""
    batch_size: int | None = None
    """Clips per encoder call: fixed slices of a unit's rows, since the batch size changes the last bits. None: by the
    bucket, as many as 2 megapixels of at most 8 frames hold, up to 64: 4 clips of 17x256x256, 1 of 81x480x832."""
    chunk_frames: int | None = None
    """Frames per streamed piece after the leading frame; None is the encoder's own default."""
    stream_mb: float = 128.0
    """Longer clips (MB of decoded frames) are encoded piece by piece as they are decoded, one clip per encoder call,
    when the encoder is causal. So memory does not grow with a clip's length."""
    sample_seed: int = 0
    """With posterior "sample": mixed with each clip's identity."""
    unit_rows: int | None = None
    """Rows per unit (one Zarr shard), best a multiple of 64: unless --batch-size is given, a batch is the largest power
    of two that divides it and suits the bucket. None: about 32 MB, at most 256 rows."""

    def __post_init__(self) -> None:
        _require_word("--posterior", self.posterior, PosteriorMode)
        _require_word("--dtype", self.dtype, StoreDtype)
        _require_word("--compute-dtype", self.compute_dtype, ComputeDtype)
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, got {self.batch_size}")
        if not self.stream_mb > 0:
            raise UsageError(f"--stream-mb must be positive, got {self.stream_mb}")
        if self.unit_rows is not None and self.unit_rows < 1:
            raise UsageError(f"--unit-rows must be at least 1, got {self.unit_rows}")
        if self.unit_rows is not None and self.unit_rows % (self.batch_size or 1):
            raise UsageError(f"--unit-rows must be a multiple of --batch-size {self.batch_size}, got {self.unit_rows}")
        if self.sample_seed and self.posterior != "sample":
            raise UsageError(f"--sample-seed needs --posterior sample, got --posterior {self.posterior}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a latent's value, row and ledger line depend on, besides the shards."""

    encoder: EncoderCard
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    filters: FilterConfig = FilterConfig()
    encode: EncodeConfig = EncodeConfig()
    decoder: DecoderName = "auto"
    caption_field: str | None = None

    def __post_init__(self) -> None:
        _require_word("--decoder", self.decoder, DecoderName)
        if self.encode.posterior != "mean" and not self.encoder.posterior:
            raise UsageError(f"--posterior {self.encode.posterior}: {self.encoder.name} has no log-variance; use mean")
        self._check_frames()
        resolve_sizes(self.buckets, self.encoder.geometry.spatial_stride)

    def _check_frames(self) -> None:
        geometry, chunk_frames = self.encoder.geometry, self.encode.chunk_frames
        for num_frames in self.sampling.frames:
            try:
                geometry.latent_shape(num_frames, geometry.spatial_stride, geometry.spatial_stride)
            except GeometryError as error:
                raise UsageError(f"--frames {num_frames}: for {self.encoder.name} {error}") from error
        if chunk_frames is None:
            return
        if geometry.causality != "causal":
            raise UsageError(f"--chunk-frames {chunk_frames}: {self.encoder.name} cannot stream; leave it unset")
        if chunk_frames < 1 or chunk_frames % geometry.temporal_stride:
            raise UsageError(f"--chunk-frames must be a multiple of {geometry.temporal_stride}, got {chunk_frames}")

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of the buckets, on the encoder's spatial grid."""
        return resolve_sizes(self.buckets, self.encoder.geometry.spatial_stride)

    def row_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(C, t, h, w) of one stored row; C is doubled for moments."""
        channels, t, h, w = self.encoder.geometry.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        return channels * (2 if self.encode.posterior == "moments" else 1), t, h, w

    def row_bytes(self, bucket: Bucket) -> int:
        """Bytes of one stored row."""
        channels, t, h, w = self.row_shape(bucket)
        return channels * t * h * w * _BYTES_PER_VALUE[self.encode.dtype]

    def streams(self, bucket: Bucket) -> bool:
        """Whether a bucket's clips, all of them, go through decoder and encoder in pieces."""
        is_long = bucket.decoded_bytes > self.encode.stream_mb * _MEGABYTE
        return is_long and self.encoder.geometry.causality == "causal"

    def batch_size(self, bucket: Bucket) -> int:
        """Clips per encoder call."""
        if self.streams(bucket):
            return 1
        return self.encode.batch_size or math.gcd(default_batch_size(bucket), self.encode.unit_rows or 0)

    def chunk_frames(self, bucket: Bucket) -> int | None:
        """Frames per chunk after the leading one; None for an image, and where the encoder takes clips whole."""
        geometry = self.encoder.geometry
        if geometry.causality != "causal" or bucket.num_frames == 1:
            return None
        return self.encode.chunk_frames or geometry.default_chunk_frames

    def unit_rows(self, bucket: Bucket) -> int:
        """S, the rows of a unit: whole encoder batches."""
        if self.encode.unit_rows is not None:
            return self.encode.unit_rows
        rows = min(_UNIT_ROWS_AT_MOST, _UNIT_BYTES // self.row_bytes(bucket))
        return max(1, rows // self.batch_size(bucket)) * self.batch_size(bucket)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the recipe and the format version."""
        return fingerprint({"format_version": FORMAT_VERSION, "recipe": to_tree(self)})


def default_batch_size(bucket: Bucket) -> int:
    """A power of two, so that a call has about the same work in every bucket, whose frames come 8 at a time. Pure."""
    pixels = min(bucket.num_frames, _CALL_FRAMES) * bucket.height * bucket.width
    fitting = max(1, min(_BATCH_AT_MOST, _CALL_PIXELS // pixels))
    return 1 << fitting.bit_length() - 1


def fingerprint(tree: object) -> str:
    """sha256 of a JSON tree in canonical form: equal trees, equal sums, whether a number came as 8 or as 8.0."""
    return hashlib.sha256(json.dumps(_canonical(tree), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_tree(record: Any) -> dict[str, Any]:
    """A record as plain JSON values."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record)))
    return tree


def from_tree(kind: type[Record], tree: Mapping[str, Any]) -> Record:
    """The record that `to_tree` was given; unknown fields are refused."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UsageError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    return kind(**{name: _revive(hints[name], value) for name, value in tree.items()})


def _revive(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        record = next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        return from_tree(record, value) if isinstance(record, type) else dict(value)
    if isinstance(value, list):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = next((typing.get_args(option)[0] for option in options if typing.get_args(option)), Any)
        return tuple(_revive(inner, item) for item in value)
    return value


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per field in which two trees differ, named as `sampling.frames`."""
    for name in sorted(set(there) | set(here)):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: the store has {json.dumps(old)}, this command asks for {json.dumps(new)}"


def require_same(there: Mapping[str, Any], here: Mapping[str, Any], store_url: str) -> None:
    """Refuse to mix recipes.

    Raises:
        MismatchError: naming every field that differs.
    """
    lines = list(differences(there, here))
    if lines:
        raise MismatchError(
            f"the store {store_url} was made with another recipe:\n  " + "\n  ".join(lines) + "\n"
            "Give the same values, or write to a new --store."
        )
