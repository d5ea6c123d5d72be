"""`status`, `verify`, `reconstruct`: look at a store.

In:   a store; for pixels also its encoder and its shards.
Out:  lines on stdout; videos and film strips; exit code 1 when `verify` finds a problem.
Cost: status reads the ledger; verify reads every latent; reconstruct decodes what it is asked for.
Errors: UsageError for keys, encoders and devices that do not fit the store or this machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from jobs.device import local_device
from jobs.flags import Device
from jobs.prepare import open_encoder
from jobs.store_config import Reconstruct, Status, Verify
from models.spec import VideoEncoder
from pipeline import ledger
from pipeline.account import take_account
from pipeline.errors import ShardError, UsageError
from pipeline.index import read_fragment
from pipeline.placement import PlacedShard, Placement, Unplaced
from pipeline.plan import Plan, Unit, load_plan
from pipeline.shards import ShardRef
from pipeline.storage import Storage, open_storage
from pipeline.store import Header, open_header


def _open(url: str) -> tuple[Storage, Header, Plan]:
    storage = open_storage(url)
    header = open_header(storage)
    return storage, header, load_plan(storage, header.recipe)


def run_status(command: Status) -> int:
    """`latentmill status --store S`."""
    storage, header, plan = _open(command.store)
    account = take_account(storage, plan, command.failures)
    encoder = header.recipe.encoder
    print(f"store: {storage.url}")
    print(f"encoder: {encoder.name} {encoder.fingerprint[:12]}, recipe {header.recipe.fingerprint[:12]}")
    for bucket, bucket_plan in sorted(plan.buckets.items()):
        print(f"bucket {bucket.name}: {bucket_plan.num_clips} clips, latent {plan.recipe.row_shape(bucket)}")
    print("\n".join(account.lines()))
    return 0


def run_verify(command: Verify) -> int:
    """`latentmill verify --store S`."""
    storage, header, plan = _open(command.store)
    found = 0
    for problem in _problems(storage, header, plan, command):
        print(f"problem: {problem}")
        found += 1
    print("verify: " + (f"{found} problems" if found else "the store is sound"))
    return 1 if found else 0


def _problems(storage: Storage, header: Header, plan: Plan, command: Verify) -> Iterator[str]:
    """What is wrong with the store; where that is its own books, no more is built on them."""
    from pipeline.verify import check_store

    sound = True
    for problem in check_store(storage, plan):
        sound = False
        yield problem
    if not sound:
        return
    account = take_account(storage, plan)
    print(f"verify: {account.written} rows of {account.units_done} units match their checksums")
    print("\n".join(account.lines()))
    if not account.is_complete:
        yield f"{account.units - account.units_done} units are not encoded yet: run `latentmill encode`"
    if command.share and account.written:
        yield from _compare(storage, header, plan, command)


def _compare(storage: Storage, header: Header, plan: Plan, command: Verify) -> Iterator[str]:
    """Clips that reconstruct badly, or not at all; a table of the others on stdout."""
    from pipeline.decode.pool import ProcessPool
    from pipeline.verify import Comparison, compare

    encoder = load_store_encoder(header, command.encoder, command.device)
    comparisons: list[Comparison] = []
    with ProcessPool(command.engine.decode_processes, command.engine.decode_limits) as pool:
        for result in compare(storage, plan, encoder, pool, command.share):
            if isinstance(result, str):
                yield f"{result} (--share 0 verifies without the shards)"
                continue
            comparisons.append(result)
            if result.psnr < command.min_psnr:
                yield f"{result.key}: {result.psnr:.2f} dB is below --min-psnr {command.min_psnr:g}"
    print("\n".join(_table(comparisons, command.worst)))


def _table(comparisons: Sequence[Any], worst: int) -> Iterator[str]:
    by_bucket = defaultdict(list)
    for result in comparisons:
        by_bucket[result.bucket].append(result)
    for bucket, results in sorted(by_bucket.items()):
        mean_psnr = sum(result.psnr for result in results) / len(results)
        mean_ssim = sum(result.ssim for result in results) / len(results)
        yield f"reconstruction {bucket}: {len(results)} clips, mean PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.4f}"
    for result in sorted(comparisons, key=lambda result: result.psnr)[:worst]:
        yield f"  worst: {result.key} (row {result.row}): {result.psnr:.2f} dB, SSIM {result.ssim:.4f}"


def load_store_encoder(header: Header, source: str | None, device: Device) -> VideoEncoder:
    """The store's encoder, from where it lies now or lay then, checked by its fingerprint; `device` as in --device."""
    place = source or header.encoder_source
    encoder = open_encoder(place, local_device(device), header.recipe.encode.compute_dtype)
    require_encoder_of(header, place, encoder.card.fingerprint)
    return encoder


def require_encoder_of(header: Header, place: str, fingerprint: str) -> None:
    """Refuse another encoder than the store's."""
    card = header.recipe.encoder
    if fingerprint != card.fingerprint:
        raise UsageError(
            f"--encoder {place} has fingerprint {fingerprint[:12]}, "
            f"the store was made with {card.fingerprint[:12]} ({card.name})"
        )


def run_reconstruct(command: Reconstruct) -> int:
    """`latentmill reconstruct KEY... --store S`."""
    from pipeline.decode.pool import ProcessPool
    from pipeline.filmstrip import safe_stem, write_comparison
    from pipeline.quality import psnr, ssim
    from pipeline.verify import restore

    if not command.keys:
        raise UsageError(f"reconstruct needs KEYs: {where_keys_are(command.store)}")
    storage, header, plan = _open(command.store)
    found = find_rows(storage, plan, command.keys, command.window)
    encoder = load_store_encoder(header, command.encoder, command.device)
    with ProcessPool(command.engine.decode_processes, command.engine.decode_limits) as pool:
        for key, (unit, line) in found.items():
            for result in restore(storage, plan, unit, [line], encoder, pool):
                if isinstance(result, str):
                    raise ShardError(result)
                quality = f"{psnr(result.source, result.reconstruction):.2f} dB"
                quality += f", SSIM {ssim(result.source, result.reconstruction):.4f}"
                name = f"{key} window {command.window}" if command.window else key
                fps = header.recipe.sampling.fps or result.clip.media.fps or 1.0
                stem = command.output / safe_stem(name)
                try:
                    paths = write_comparison(stem, result.source, result.reconstruction, fps, name, quality)
                except OSError as error:
                    raise UsageError(f"--output {command.output} cannot be written: {error}") from error
                print(f"{name}: {quality} -> {', '.join(map(str, paths))}")
    return 0


def where_keys_are(store: str) -> str:
    """For messages that ask for keys. Pure."""
    return f"column `key` of {store}/samples/*.parquet, or of {store}/ledger/*/*.parquet until it is complete"


def find_rows(storage: Storage, plan: Plan, keys: Sequence[str], window: int) -> dict[str, tuple[Unit, dict[str, Any]]]:
    """The unit and ledger row of each sample's clip; one pass over the index of the planned shards.

    A key is a sample's, or `SHARD.tar:KEY`, or the shard's whole path or url before the colon.

    Raises:
        UsageError: a key has no latent (the message says what became of it), or several shards have it.
    """
    samples: dict[str, list[tuple[ShardRef, Placement | Unplaced]]] = {key: [] for key in keys}
    for shard in plan.shards.values():
        placed = PlacedShard.of(read_fragment(storage, shard.shard_id), plan.recipe)
        results: list[Placement | Unplaced] = [*placed.placements, *placed.unplaced]
        for result in results:
            for name in _names(shard, result.sample.key):
                if name in samples:
                    samples[name].append((shard, result))
    return {key: _written_row(storage, plan, key, found, window) for key, found in samples.items()}


def _names(shard: ShardRef, key: str) -> tuple[str, str, str]:
    return key, f"{PurePosixPath(shard.url).name}:{key}", f"{shard.url}:{key}"


def _written_row(
    storage: Storage, plan: Plan, key: str, found: Sequence[tuple[ShardRef, Placement | Unplaced]], window: int
) -> tuple[Unit, dict[str, Any]]:
    missing = f"the store has no latent of {key!r}, window {window}"
    if not found:
        raise UsageError(f"{missing}: no planned shard has a sample with this key")
    if len(found) > 1:
        names = ", ".join(f"{shard.url}:{result.sample.key}" for shard, result in found)
        raise UsageError(f"{key!r} is the key of {len(found)} samples, name one as SHARD:KEY: {names}")
    shard, result = found[0]
    if isinstance(result, Unplaced):
        raise UsageError(f"{missing}: it was {result.status}: {result.reason} {result.detail}".rstrip())
    if not 0 <= window < result.windows.count:
        raise UsageError(f"{missing}: it has {result.windows.count} clips, --window counts them from 0")
    row = _row_of(storage, plan, shard, result, window)
    unit = Unit(result.bucket, row // plan.buckets[result.bucket].unit_rows)
    if not storage.exists(ledger.unit_name(unit)):
        raise UsageError(f"{missing}: its unit {unit.name} is not encoded yet, run `latentmill encode`")
    line = next(line for line in ledger.read_rows(storage, ledger.unit_name(unit)) if line["row"] == row)
    if line["status"] != ledger.WRITTEN:
        raise UsageError(f"{missing}: it {line['status']}: {line['reason']} {line['detail']}".rstrip())
    return unit, line


def _row_of(storage: Storage, plan: Plan, shard: ShardRef, placement: Placement, window: int) -> int:
    """The row that the plan gives to a clip."""
    placed = PlacedShard.of(read_fragment(storage, shard.shard_id), plan.recipe)
    rows = (
        clip.row
        for line in plan.buckets[placement.bucket].lines
        if line.shard == shard
        for clip in placed.clips(placement.bucket, line.first_row, 0, line.rows)
        if clip.sample.offset == placement.sample.offset and clip.window_index == window
    )
    return next(rows)
