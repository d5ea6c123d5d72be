"""Hand-made index fragments, plans and stores: no tar, no decoder, every number known.

In:   frame counts, sizes, keys.
Out:  IndexFragments, Plans, planned stores, decoded clips whose pixels follow from what the clip is.
Cost: milliseconds.
Errors: none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from models.spec import VideoEncoder
from pipeline import ledger, store
from pipeline.commit import CommitReport, RowResult, commit
from pipeline.decode.records import DecodedClip, DecodeOutcome, MediaInfo, MediaKind
from pipeline.encode import encode_slice
from pipeline.errors import DecodeError
from pipeline.index import IndexFragment, MemberCounts, write_fragment
from pipeline.placement import Clip, PlacedShard
from pipeline.plan import Plan, Unit, extend, to_parquet
from pipeline.recipe import Recipe
from pipeline.samples import Sample
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage


def media_info(
    num_frames: int = 20, height: int = 96, width: int = 96, kind: MediaKind = "video", fps: float = 25.0
) -> MediaInfo:
    """A video at `fps`, or an image."""
    if kind == "image":
        return MediaInfo("image", "png", "png", width, height, 0, 0.0, 1, 0.0, "rgb24", 1)
    return MediaInfo("video", "mp4", "h264", width, height, 0, fps, num_frames, num_frames / fps, "yuv420p", 1)


def fragment(url: str, media: Sequence[MediaInfo | str], version: str = "1") -> IndexFragment:
    """A shard of samples 0, 1, ...; a string is the reason with which a sample failed."""
    samples = []
    for number, info in enumerate(media):
        key, offset = f"{url}-{number}", 512 + 4096 * number
        if isinstance(info, str):
            samples.append(Sample(key, status="failed", reason=info, detail=f"detail {number}"))
        else:
            samples.append(Sample(key, offset, 2000 + number, f"{key}.mp4", info, caption=f"caption {number}"))
    return IndexFragment(ShardRef(url, 10_000, version), tuple(samples), MemberCounts(0, 0, 0))


def plan_of(recipe: Recipe, *batches: Sequence[IndexFragment]) -> Plan:
    """A plan with one generation per batch."""
    plan = Plan([], recipe)
    for batch in batches:
        plan = Plan([*plan.generations, extend(plan, batch, recipe, lambda *_: None)], recipe)
    return plan


def all_clips(plan: Plan, fragments: Sequence[IndexFragment]) -> list[Clip]:
    """The clips of every unit, in unit order."""
    return [clip for unit in plan.units() for clip in clips_of(plan, unit, fragments)]


def clips_of(plan: Plan, unit: Unit, fragments: Sequence[IndexFragment]) -> list[Clip]:
    """The clips of one unit."""
    by_shard = {one.shard: one for one in fragments}
    return list(plan.clips_of(unit, lambda shard: PlacedShard.of(by_shard[shard], plan.recipe)))


def planned_store(
    storage: LocalStorage, recipe: Recipe, fragments: Sequence[IndexFragment], before: Plan | None = None
) -> Plan:
    """Write index, header, unplaced ledger, arrays and a generation, as `latentmill plan` does."""
    before = before or Plan([], recipe)

    def on_placed(shard: ShardRef, placed: PlacedShard) -> None:
        ledger.write_unplaced(storage, shard, placed, recipe.fingerprint)

    for one in fragments:
        write_fragment(storage, one)
    generation = extend(before, fragments, recipe, on_placed)
    plan = Plan([*before.generations, generation], recipe)
    if not before.generations:
        store.write_header(storage, store.Header(recipe, "somewhere"))
    store.write_arrays(storage, plan)
    storage.put(generation.name, to_parquet(generation))
    return plan


def decoded(clip: Clip) -> DecodedClip:
    """Frames of noise about a level, both from the clip's key and window."""
    digest = hashlib.blake2b(f"{clip.sample.key}/{clip.window.start}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "little"))
    shape = (clip.window.num_frames, clip.bucket.height, clip.bucket.width, 3)
    frames = random.integers(0, 56, shape, np.uint8) + random.integers(0, 200, dtype=np.uint8)
    return DecodedClip(frames, np.arange(clip.window.num_frames) / 25, "fake")


def outcomes_of(clips: Sequence[Clip], failed: Mapping[int, str] | None = None) -> list[DecodeOutcome]:
    """Decoded clips; `failed` gives the reason why a row failed."""
    reasons = failed or {}
    return [DecodeError(reasons[clip.row], "told to") if clip.row in reasons else decoded(clip) for clip in clips]


def slices(unit: Unit, clips: Sequence[Clip], recipe: Recipe) -> Iterator[list[Clip]]:
    """The fixed slices of a unit's rows."""
    size = recipe.encode.batch_size
    for start in range(unit.number * recipe.unit_rows(unit.bucket), clips[-1].row + 1, size):
        yield [clip for clip in clips if start <= clip.row < start + size]


def encode_rows(
    encoder: VideoEncoder, recipe: Recipe, unit: Unit, clips: Sequence[Clip], failed: Mapping[int, str] | None = None
) -> tuple[np.ndarray, list[RowResult]]:
    """The unit's stored rows [S, C, t, h, w], and what became of its clips."""
    rows = store.absent_rows(recipe, unit.bucket)
    results: list[RowResult] = []
    for part in slices(unit, clips, recipe):
        stored, judged = encode_slice(encoder, recipe, part, outcomes_of(part, failed))
        start = part[0].row - unit.number * recipe.unit_rows(unit.bucket)
        rows[start : start + len(part)] = stored
        results += judged
    return rows, results


def encode_unit(
    encoder: VideoEncoder,
    storage: LocalStorage,
    plan: Plan,
    unit: Unit,
    fragments: Sequence[IndexFragment],
    failed: Mapping[int, str] | None = None,
) -> CommitReport:
    """Encode and commit one unit."""
    clips = clips_of(plan, unit, fragments)
    rows, results = encode_rows(encoder, plan.recipe, unit, clips, failed)
    return commit(storage, plan, unit, clips, results, rows)


def encode_all(
    encoder: VideoEncoder,
    storage: LocalStorage,
    plan: Plan,
    fragments: Sequence[IndexFragment],
    failed: Mapping[int, str] | None = None,
) -> None:
    """Encode and commit every unit."""
    for unit in plan.units():
        encode_unit(encoder, storage, plan, unit, fragments, failed)
