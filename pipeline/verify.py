"""Is the store what it says it is? Checksums, books, arrays, and a share of the clips against their source.

In:   a store; for the comparison also its encoder and decoders.
Out:  problems as sentences (none: the store is sound), and Comparisons.
Cost: one read of every latent; decoding and reconstructing the share.
Errors: none for what is wrong with the store, that is the output; StoreError when its plan cannot be read at all;
      JobError when the GPU has no memory to decode a latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from models.spec import VideoEncoder
from pipeline import ledger
from pipeline.decode.records import DecodedClip
from pipeline.decode_requests import Decoders, require_unchanged, to_requests
from pipeline.encode import to_batch
from pipeline.errors import JobError, SampleError, ShardError, StoreError, UnitError
from pipeline.index import read_fragment
from pipeline.ledger import WRITTEN
from pipeline.placement import Clip, PlacedShard
from pipeline.plan import Plan, Unit
from pipeline.quality import psnr, ssim
from pipeline.recipe import Recipe
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage, Storage
from pipeline.store import GROUP, array_name, checksum, read_unit, shard_name, to_float32, write_arrays

_ARRAY_FIELDS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A clip's reconstruction from its stored latent against its source pixels."""

    key: str
    bucket: str
    row: int
    psnr: float
    ssim: float


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A written row with what it was made from: uint8 frames T H W 3 of source and reconstruction (valid ones only)."""

    clip: Clip
    row: dict[str, Any]
    source: np.ndarray
    reconstruction: np.ndarray


def unit_clips(storage: Storage, plan: Plan, unit: Unit) -> list[Clip]:
    """The unit's clips, by the index."""

    def placed(shard: ShardRef) -> PlacedShard:
        return PlacedShard.of(read_fragment(storage, shard.shard_id), plan.recipe)

    return list(plan.clips_of(unit, placed))


def check_store(storage: Storage, plan: Plan) -> Iterator[str]:
    """Problems of everything that the store holds; units that are not committed yet are none."""
    yield from check_arrays(storage, plan)
    yield from check_unplaced(storage, plan)
    for unit in ledger.listed_units(storage, plan):
        yield from check_unit(storage, plan, unit)


def check_arrays(storage: Storage, plan: Plan) -> Iterator[str]:
    """Problems with the arrays' metadata, and objects that no unit of the plan explains."""
    names = {f"{array_name(bucket)}/zarr.json" for bucket in plan.buckets}
    with tempfile.TemporaryDirectory() as scratch:
        written_now = LocalStorage(scratch)
        write_arrays(written_now, plan)
        for name in sorted(names):
            yield from _check_metadata(name, storage, json.loads(written_now.read(name)))
    explained = {f"{GROUP}/zarr.json"} | names
    for unit in plan.units():
        explained |= {shard_name(unit), ledger.unit_name(unit)}
    for name in [*storage.list(f"{GROUP}/"), *storage.list("ledger/")]:
        # An unplaced fragment without its shard is left by a planning that stopped; it says nothing wrong.
        if name not in explained and not name.startswith("ledger/unplaced/"):
            yield f"{name} belongs to no unit of the plan"


def _check_metadata(name: str, storage: Storage, expected: dict[str, Any]) -> Iterator[str]:
    try:
        there = json.loads(storage.read(name))
        facts = {field: there[field] for field in _ARRAY_FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{name} cannot be read: {error}"
        return
    for field, value in facts.items():
        if value != expected[field]:
            yield f"{name} has {field} {value}, the plan says {expected[field]}"


def check_unplaced(storage: Storage, plan: Plan) -> Iterator[str]:
    """Problems of the fragments that say why samples have no row: they hold what the plan counted."""
    counted: defaultdict[ShardRef, Counter[tuple[str, str]]] = defaultdict(Counter)
    for line in plan.unplaced():
        if line.rows:
            counted[line.shard][line.status, line.reason] += line.rows
    for shard, counts in counted.items():
        name = ledger.unplaced_name(shard)
        try:
            lines = ledger.read_rows(storage, name, ["status", "reason"])
        except StoreError as error:
            yield str(error)
            continue
        if Counter((line["status"], line["reason"]) for line in lines) != counts:
            yield f"{name} does not list the {counts.total()} samples of {shard.url} that the plan counts"


def check_unit(storage: Storage, plan: Plan, unit: Unit) -> Iterator[str]:
    """Problems of one committed unit: its ledger against the plan, its rows against their checksums."""
    name = ledger.unit_name(unit)
    try:
        fragment = ledger.read_fragment(storage, name)
    except StoreError as error:
        yield str(error)
        return
    lines: list[dict[str, Any]] = fragment.table.to_pylist()
    if fragment.plan != plan.generation_of(unit).fingerprint:
        yield f"{name} fulfils another plan than the store's"
        return
    try:
        planned = [_planned(clip) for clip in unit_clips(storage, plan, unit)]
    except StoreError as error:
        yield f"{name} cannot be compared with the plan: {error}"
        return
    if planned != [_recorded(line) for line in lines]:
        yield f"{name} does not list the clips that the plan gives to {unit.name}"
        return
    yield from _check_rows(storage, plan, unit, lines)


def _planned(clip: Clip) -> tuple[Any, ...]:
    place = clip.row, clip.shard_url, clip.sample.offset, clip.sample.key
    return *place, clip.window_index, clip.window.start, clip.window.num_frames


def _recorded(line: dict[str, Any]) -> tuple[Any, ...]:
    names = ("row", "shard", "offset", "key", "window_index", "window_start", "valid_frames")
    return tuple(line[name] for name in names)


def _check_rows(storage: Storage, plan: Plan, unit: Unit, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    written = sum(line["status"] == WRITTEN for line in lines)
    if written and not storage.exists(shard_name(unit)):
        yield f"{shard_name(unit)} is missing, with {written} written rows"
        return
    try:
        rows = read_unit(storage, plan.recipe, unit)
    except StoreError as error:
        yield str(error)
        return
    first_row = plan.first_row(unit)
    for line in lines:
        problem = _check_row(line, rows[line["row"] - first_row], plan.recipe)
        if problem:
            yield f"{unit.name} row {line['row']} ({line['key']}): {problem}"


def _check_row(line: dict[str, Any], row: np.ndarray, recipe: Recipe) -> str | None:
    values = to_float32(row, recipe.encode.dtype)
    if line["status"] != WRITTEN:
        return None if np.isnan(values).all() else "failed in the ledger, and the array holds values"
    if not np.isfinite(values).all():
        return "the array holds no latent"
    return None if checksum(row) == line["checksum"] else f"its checksum is {checksum(row)}, not {line['checksum']}"


def choose(lines: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The written rows to compare: by a hash of key and window, so that every run takes the same ones. Pure."""

    def draw(line: dict[str, Any]) -> float:
        digest = hashlib.blake2b(f"{line['key']}/{line['window_index']}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    return [line for line in lines if line["status"] == WRITTEN and draw(line) < share]


def compare(
    storage: Storage, plan: Plan, encoder: VideoEncoder, decoders: Decoders, share: float
) -> Iterator[Comparison | str]:
    """Reconstruct a share of the clips, at least one per bucket that has any; a problem where the source is gone."""
    seen = set()
    for unit in ledger.done_units(storage, plan):
        lines = ledger.read_rows(storage, ledger.unit_name(unit))
        chosen = choose(lines, share)
        if not chosen and unit.bucket not in seen:
            chosen = [line for line in lines if line["status"] == WRITTEN][:1]
        if chosen:
            seen.add(unit.bucket)
            yield from _compare_unit(storage, plan, unit, chosen, encoder, decoders)


def _compare_unit(
    storage: Storage,
    plan: Plan,
    unit: Unit,
    chosen: Sequence[dict[str, Any]],
    encoder: VideoEncoder,
    decoders: Decoders,
) -> Iterator[Comparison | str]:
    for result in restore(storage, plan, unit, chosen, encoder, decoders):
        if isinstance(result, str):
            yield result
            continue
        clip = result.clip
        quality = psnr(result.source, result.reconstruction), ssim(result.source, result.reconstruction)
        yield Comparison(clip.sample.key, unit.bucket.name, clip.row, *quality)


def restore(
    storage: Storage,
    plan: Plan,
    unit: Unit,
    chosen: Sequence[dict[str, Any]],
    encoder: VideoEncoder,
    decoders: Decoders,
) -> Iterator[StoredClip | str]:
    """Chosen rows of a unit, decoded from the store and from their source; a sentence where the source is gone."""
    clips = {clip.row: clip for clip in unit_clips(storage, plan, unit)}
    shards = plan.shards
    rows = read_unit(storage, plan.recipe, unit)
    first_row = plan.first_row(unit)
    for line in chosen:
        clip = clips[line["row"]]
        outcome = _decode_source(clip, shards[clip.shard_url], plan.recipe, decoders)
        if isinstance(outcome, DecodedClip):
            yield StoredClip(clip, line, *_frames(clip, outcome, rows[clip.row - first_row], plan.recipe, encoder))
        else:
            yield f"{unit.name} row {clip.row} ({clip.sample.key}): written, but its source now fails with {outcome}"


def _decode_source(
    clip: Clip, shard: ShardRef, recipe: Recipe, decoders: Decoders
) -> DecodedClip | SampleError | ShardError | UnitError:
    (request,) = to_requests([clip], recipe, clip.decoded_bytes)
    try:
        require_unchanged(shard)
        (outcome,) = decoders.submit(request).result()
    except (ShardError, UnitError) as error:
        return error
    return outcome


def _frames(
    clip: Clip, outcome: DecodedClip, row: np.ndarray, recipe: Recipe, encoder: VideoEncoder
) -> tuple[np.ndarray, np.ndarray]:
    latent = to_float32(row, recipe.encode.dtype)[: recipe.encoder.geometry.channels]
    reconstruction = decode_latent(encoder, torch.from_numpy(np.ascontiguousarray(latent)))
    source = to_batch([clip], [outcome], 1)[0]
    valid = clip.window.num_frames
    return source[:valid], reconstruction[:valid]


def decode_latent(encoder: VideoEncoder, latent: torch.Tensor) -> np.ndarray:
    """The frames T H W 3 of one clip's latent, C t h w.

    Raises:
        JobError: the GPU has no memory for them.
    """
    try:
        with torch.inference_mode():
            return encoder.decode(latent[None])[0].numpy()
    except torch.OutOfMemoryError as error:
        shape, told = "x".join(map(str, latent.shape)), str(error).splitlines()[0]
        raise JobError(f"the GPU has no memory to decode a latent of {shape}: use --device cpu ({told})") from error
