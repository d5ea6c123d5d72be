"""`index` and `plan`: what has to be known before anything is encoded.

In:   shards and a recipe.
Out:  the store's index, header, arrays and plan; a price on stdout.
Cost: index: one header read and one probe per sample, in parallel; plan: one pass over the index.
Errors: UsageError, MismatchError, ShardError, FailureLimitError.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.flags import ClusterFlags, DecodeFlags, RecipeFlags
from jobs.rehearsal import RehearsalEncoder, describe_rehearsal, is_rehearsal
from jobs.store_config import Index, PlanCommand
from models.spec import EncoderCard, VideoEncoder
from pipeline import ledger, store
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.errors import FailureLimitError, MismatchError, UsageError
from pipeline.generation import Generation, to_parquet
from pipeline.index import (
    fragment_name,
    index_shard,
    list_fragments,
    missing_fragments,
    read_fragment,
    summarise,
    write_fragment,
)
from pipeline.placement import PlacedShard
from pipeline.plan import Plan, extend, load_plan, new_shards
from pipeline.price import Price
from pipeline.recipe import Recipe, to_tree
from pipeline.shards import ShardRef, expand, identify
from pipeline.storage import Storage, open_storage

_MEGABYTE = 1 << 20


def decode_limits(flags: DecodeFlags) -> DecodeLimits:
    """The limits of one decode process."""
    return DecodeLimits(timeout_seconds=flags.decode_timeout_seconds, memory_bytes=flags.decode_memory_mb * _MEGABYTE)


def run_index(command: Index) -> int:
    """`latentmill index SHARDS... --store S`."""
    if not command.shards:
        raise UsageError("index needs SHARDS: paths of tars, globs or braces")
    storage = open_storage(command.store)
    shards = index_shards(storage, command.shards, command.engine)
    summary = summarise(read_fragment(storage, shard.shard_id) for shard in shards)
    print("\n".join(summary.lines()))
    return 0


def index_shards(
    storage: Storage, patterns: Sequence[str], flags: ClusterFlags, pool: ProcessPool | None = None
) -> list[ShardRef]:
    """Index what is missing; returns all the shards that the patterns name.

    With --local in `pool`, whose processes then are warm, or in one of its own.
    """
    shards = [identify(url) for url in expand(patterns)]
    missing = missing_fragments(storage, shards)
    if missing:
        started = time.monotonic()
        print(f"index: {len(missing)} of {len(shards)} shards are new", file=sys.stderr)
        if pool is not None:
            _index_local(storage, missing, pool)
        elif flags.local:
            with ProcessPool(flags.decode_processes, decode_limits(flags)) as own_pool:
                _index_local(storage, missing, own_pool)
        else:
            _index_on_ray(storage, missing, flags)
        print(f"index: done in {time.monotonic() - started:.1f} s", file=sys.stderr)
    _forget_stale(storage, shards)
    return shards


def _index_local(storage: Storage, shards: Sequence[ShardRef], pool: ProcessPool) -> None:
    def index_one(shard: ShardRef) -> None:
        write_fragment(storage, index_shard(shard, lambda source: pool.probe(source).result()))

    with ThreadPoolExecutor(pool.num_processes) as threads:
        for _ in threads.map(index_one, shards):
            pass


def _index_on_ray(storage: Storage, shards: Sequence[ShardRef], flags: ClusterFlags) -> None:
    from jobs.ray_cluster import connect
    from jobs.ray_decode import index_on_ray

    connect(flags)
    index_on_ray(storage.url, shards, decode_limits(flags))


def _forget_stale(storage: Storage, shards: Sequence[ShardRef]) -> None:
    """Delete fragments of earlier versions of these shards, unless a plan stands on them."""
    header = store.read_header(storage)
    planned = load_plan(storage, header.recipe).shards if header else {}
    keep = {shard.shard_id for shard in planned.values()} | {shard.shard_id for shard in shards}
    urls = {shard.url for shard in shards}
    for shard_id in list_fragments(storage):
        if shard_id not in keep and read_fragment(storage, shard_id).shard.url in urls:
            storage.delete(fragment_name(shard_id))


def make_recipe(flags: RecipeFlags, card: EncoderCard) -> Recipe:
    """The recipe that these flags and this encoder ask for.

    Raises:
        UsageError: choices that cannot be, or a decoder that is not installed here.
    """
    if flags.decoder == "torchcodec":
        from pipeline.decode.torchcodec_backend import video_decoder_class

        video_decoder_class()
    return Recipe(card, flags.sampling, flags.buckets, flags.filters, flags.encode, flags.decoder, flags.caption_field)


def describe_encoder(flags: RecipeFlags) -> tuple[EncoderCard, str]:
    """The encoder's card, and where it lies (absolute, when it is a directory)."""
    from models.encoders import describe

    if flags.encoder is None:
        raise UsageError("--encoder is needed: the directory of a trained model, or a hub id of a diffusers model")
    if is_rehearsal(flags.encoder):
        return describe_rehearsal(flags.encoder), flags.encoder
    source = str(Path(flags.encoder).absolute()) if Path(flags.encoder).is_dir() else flags.encoder
    try:
        return describe(source), source
    except ValueError as error:
        raise UsageError(f"--encoder {flags.encoder}: {error}") from error


def open_encoder(source: str, device: str = "cpu", compute_dtype: str = "float32") -> VideoEncoder:
    """The encoder, loaded and probed.

    Raises:
        UsageError: it cannot be loaded; the message names the file and the reason.
    """
    from models.encoders import load_encoder

    if is_rehearsal(source):
        return RehearsalEncoder(source)
    try:
        return load_encoder(source, device=device, compute_dtype=compute_dtype)
    except ValueError as error:
        raise UsageError(f"the encoder {source} cannot be loaded: {error}") from error


def ready_encoder(source: str, device: str, plan: Plan) -> VideoEncoder:
    """A plan's encoder on its device; what a GPU spends at its first calls is spent.

    Raises:
        UsageError: it cannot be loaded. JobError: the GPU has no memory for the plan's largest call.
    """
    from pipeline.encoder_call import warm_up

    encoder = open_encoder(source, device, plan.recipe.encode.compute_dtype)
    if device != "cpu":
        warm_up(encoder, plan)
    return encoder


def run_plan(command: PlanCommand) -> int:
    """`latentmill plan --store S --encoder E`."""
    storage = open_storage(command.store)
    shards = [read_fragment(storage, shard_id).shard for shard_id in list_fragments(storage)]
    if not shards:
        raise UsageError(
            f"--store {command.store} has no index yet: run `latentmill index SHARDS... --store ...` first"
        )
    card, source = describe_encoder(command.recipe)
    recipe = make_recipe(command.recipe, card)
    price = make_plan(storage, shards, recipe, source, command.limits.max_failed_share)[1]
    print("\n".join(price.lines()))
    if command.probe:
        from jobs.probe import estimate

        print("\n".join(estimate(storage, recipe, source, price, command.trial)))
    return 0


def make_plan(
    storage: Storage, shards: Sequence[ShardRef], recipe: Recipe, encoder_source: str, max_failed_share: float
) -> tuple[Plan, Price]:
    """Extend the store's plan by the shards that are new to it; the plan, and the price of all its shards.

    A store in which no unit is committed takes the new recipe; any other refuses another recipe.

    Raises:
        MismatchError: the store holds latents of another recipe. FailureLimitError: too many samples are broken.
        ShardError: a planned shard has changed.
    """
    has_header = _settle_recipe(storage, recipe)
    plan = load_plan(storage, recipe)
    fresh = new_shards(plan, shards)
    price = Price(recipe)
    if fresh:
        fragments = (read_fragment(storage, shard.shard_id) for shard in fresh)
        generation = extend(plan, fragments, recipe, lambda _, placed: price.add(placed))
        _judge_samples(price, max_failed_share)
        if not has_header:
            store.write_header(storage, store.Header(recipe, encoder_source))
        _write_generation(storage, plan, generation, fresh)
    for shard in plan.shards.values():
        price.add(PlacedShard.of(read_fragment(storage, shard.shard_id), recipe))
    return (load_plan(storage, recipe) if fresh else plan), price


def _settle_recipe(storage: Storage, recipe: Recipe) -> bool:
    """Whether the store has this recipe; a plan of another one is forgotten, or refused where it has latents."""
    header = store.read_header(storage)
    if header is None or to_tree(header.recipe) == to_tree(recipe):
        return header is not None
    if any(not name.startswith("ledger/unplaced/") for name in storage.list("ledger/")):
        store.require_recipe(header, recipe, storage)
    # The header goes last ("latents.zarr/zarr.json" sorts behind the arrays): until then this can be repeated.
    for prefix in ("plan/", "ledger/", "samples/", f"{store.GROUP}/"):
        for name in storage.list(prefix):
            storage.delete(name)
    return False


def _write_generation(storage: Storage, plan: Plan, generation: Generation, shards: Sequence[ShardRef]) -> None:
    """What a generation needs, then the generation itself, with which it counts."""
    recipe = plan.recipe
    for shard in shards:
        placed = PlacedShard.of(read_fragment(storage, shard.shard_id), recipe)
        ledger.write_unplaced(storage, shard, placed, recipe.fingerprint)
    store.write_arrays(storage, Plan([*plan.generations, generation], recipe))
    if not storage.put_if_absent(generation.name, to_parquet(generation)):
        raise MismatchError(
            f"another command wrote {storage.url}/{generation.name} at the same time: run this one again"
        )


def _judge_samples(price: Price, max_failed_share: float) -> None:
    samples = sum(bucket.samples for bucket in price.buckets.values()) + price.unplaced.total()
    if samples and price.failed_samples / samples > max_failed_share:
        reasons = ", ".join(
            f"{reason} {n}" for (status, reason), n in price.unplaced.most_common() if status == "failed"
        )
        raise FailureLimitError(
            f"{price.failed_samples} of {samples} samples cannot be read, more than --max-failed-share "
            f"{max_failed_share:g} allows: {reasons}. The index names them."
        )
