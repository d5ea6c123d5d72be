"""`plan`: which clips of the indexed shards are encoded, into which units, at which price.

In:   a store with an index, and a recipe.
Out:  the store's header, arrays and plan; a price on stdout.
Cost: one pass over the index.
Errors: UsageError, MismatchError, ShardError, FailureLimitError.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from jobs.flags import RecipeFlags
from jobs.rehearsal import RehearsalEncoder, describe_rehearsal, is_rehearsal
from jobs.store_config import PlanCommand
from models.spec import EncoderCard, VideoEncoder
from pipeline import ledger, store
from pipeline.errors import FailureLimitError, MismatchError, UsageError
from pipeline.generation import Generation, to_parquet
from pipeline.index import (
    list_fragments,
    read_fragment,
)
from pipeline.placement import PlacedShard
from pipeline.plan import Plan, extend, load_plan, new_shards
from pipeline.price import Price
from pipeline.recipe import Recipe, to_tree
from pipeline.shards import ShardRef
from pipeline.storage import Storage, open_storage


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


def ready_encoder(source: str, device: str, plan: Plan, window_bytes: int) -> VideoEncoder:
    """A plan's encoder on its device; what a GPU spends at its first calls is spent. `window_bytes`: its worker's.

    Raises:
        UsageError: it cannot be loaded. MismatchError: it is not the one that the plan was made with, since the place
        was written to since, or holds another copy on this node. JobError: the GPU has no memory for the largest call.
    """
    from pipeline.encoder_call import warm_up

    encoder = open_encoder(source, device, plan.recipe.encode.compute_dtype)
    found, planned = encoder.card.fingerprint, plan.recipe.encoder.fingerprint
    if found != planned:
        raise MismatchError(
            f"the encoder {source} on {socket.gethostname()} is not the one that the job was planned with: its "
            f"fingerprint is {found}, the recipe has {planned}. Put the same files there on every node, or write to a "
            "new --store."
        )
    if device != "cpu":
        warm_up(encoder, plan, window_bytes)
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
        _judge_samples(storage, price, max_failed_share)
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


def _judge_samples(storage: Storage, price: Price, max_failed_share: float) -> None:
    samples = sum(bucket.samples for bucket in price.buckets.values()) + price.unplaced.total()
    if samples and price.failed_samples / samples > max_failed_share:
        reasons = ", ".join(
            f"{reason} {n}" for (status, reason), n in price.unplaced.most_common() if status == "failed"
        )
        raise FailureLimitError(
            f"{price.failed_samples} of {samples} samples cannot be read, more than --max-failed-share "
            f"{max_failed_share:g} allows: {reasons}. {storage.url}/index/*.parquet names them, in the columns key, "
            "status, reason and detail."
        )
