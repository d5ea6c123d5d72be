"""`index`: what the shards hold, one fragment per shard.

In:   shards: paths of tars, globs or braces.
Out:  the fragments that the store lacks; a line on stderr now and then, a summary on stdout.
Cost: one header read and one probe per sample, in parallel.
Errors: UsageError for the patterns; ShardError for shards that cannot be read, when all others are indexed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from jobs.flags import ClusterFlags
from jobs.store_config import Index
from pipeline import store
from pipeline.decode.pool import ProcessPool
from pipeline.errors import ShardError, UnitError, UsageError
from pipeline.index import (
    fragment_name,
    index_shard,
    list_fragments,
    missing_fragments,
    read_fragment,
    summarise,
    write_fragment,
)
from pipeline.plan import load_plan
from pipeline.shards import ShardRef, expand, identify
from pipeline.storage import Storage, open_storage

_PROGRESS_SECONDS = 10.0
_MOST_UNREADABLE = 20  # with more it is the place that cannot be read, each time after the retries of a minute


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

    Raises:
        ShardError: shards cannot be read; the others are indexed.
    """
    shards = [identify(url) for url in expand(patterns)]
    missing = missing_fragments(storage, shards)
    if missing:
        started = time.monotonic()
        print(f"index: {len(missing)} of {len(shards)} shards are new", file=sys.stderr)
        finish(_indexed(storage, missing, flags, pool), len(missing))
        print(f"index: done in {time.monotonic() - started:.1f} s", file=sys.stderr)
    _forget_stale(storage, shards)
    return shards


def finish(outcomes: Iterable[ShardError | UnitError | None], num_shards: int) -> None:
    """Take what came of each shard, None or why it could not be indexed, and tell how far that is.

    Raises:
        ShardError: some could not be indexed; too many at once end it early.
    """
    unreadable, printed, done = list[ShardError | UnitError](), time.monotonic(), 0
    for outcome in outcomes:
        done += 1
        if outcome is not None:
            unreadable.append(outcome)
            if len(unreadable) == _MOST_UNREADABLE:
                break
        if time.monotonic() - printed >= _PROGRESS_SECONDS:
            printed = time.monotonic()
            failed = f", {len(unreadable)} cannot be indexed" if unreadable else ""
            print(f"index: {done} of {num_shards} shards{failed}", file=sys.stderr)
    if unreadable:
        causes = "; ".join(map(str, unreadable))
        if num_shards == 1:
            raise ShardError(causes)
        raise ShardError(
            f"{len(unreadable)} of {done} shards cannot be indexed: {causes}. What is indexed stays: mend these, or "
            "leave them out, and run the same command again"
        )


def _indexed(
    storage: Storage, shards: Sequence[ShardRef], flags: ClusterFlags, pool: ProcessPool | None
) -> Iterator[ShardError | UnitError | None]:
    if pool is not None:
        yield from _index_local(storage, shards, pool)
    elif flags.local:
        with ProcessPool(flags.decode_processes, flags.decode_limits) as own_pool:
            yield from _index_local(storage, shards, own_pool)
    else:
        from jobs.ray_cluster import connect
        from jobs.ray_decode import index_on_ray

        connect(flags)
        yield from index_on_ray(storage.url, shards, flags.decode_limits)


def _index_local(
    storage: Storage, shards: Sequence[ShardRef], pool: ProcessPool
) -> Iterator[ShardError | UnitError | None]:
    def index_one(shard: ShardRef) -> ShardError | UnitError | None:
        try:
            write_fragment(storage, index_shard(shard, lambda source: pool.probe(source).result()))
        except (ShardError, UnitError) as error:
            return error
        return None

    with ThreadPoolExecutor(pool.num_processes) as threads:
        yield from threads.map(index_one, shards)


def _forget_stale(storage: Storage, shards: Sequence[ShardRef]) -> None:
    """Delete fragments of earlier versions of these shards, unless a plan stands on them."""
    header = store.read_header(storage)
    planned = load_plan(storage, header.recipe).shards if header else {}
    keep = {shard.shard_id for shard in planned.values()} | {shard.shard_id for shard in shards}
    urls = {shard.url for shard in shards}
    for shard_id in list_fragments(storage):
        if shard_id not in keep and read_fragment(storage, shard_id).shard.url in urls:
            storage.delete(fragment_name(shard_id))
