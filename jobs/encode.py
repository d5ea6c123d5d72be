"""`encode`: index, plan and encode; the same command goes on where it stopped.

In:   shards, a store, an encoder.
Out:  a complete store and its books on stdout.
Cost: what the plan says; a finished job costs seconds and decodes nothing.
Errors: JobError of every kind; Interrupted on Ctrl-C or SIGTERM, with exit code 130 or 143.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jobs.device import job_device
from jobs.flags import EngineFlags
from jobs.index import index_shards
from jobs.prepare import describe_encoder, make_plan, make_recipe, ready_encoder
from jobs.progress import Reporter
from jobs.rehearsal import is_rehearsal
from jobs.start_times import StartTimes
from jobs.store_config import Encode
from pipeline.account import Account, close_books, open_books, take_account, units_left
from pipeline.controller import Controller, Policy, judge_failures
from pipeline.decode.pool import ProcessPool
from pipeline.engine import Engine, Interrupted, run
from pipeline.errors import LatentmillError, UsageError
from pipeline.index import list_fragments, read_fragment
from pipeline.plan import Plan
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage, Storage, open_storage

_MEGABYTE = 1 << 20
_STALE_SECONDS = 24 * 3600.0


def run_encode(command: Encode) -> int:
    """`latentmill encode SHARDS... --store S --encoder E`."""
    start_times = StartTimes()
    start_times.reach("imports")
    storage = open_storage(command.store)
    if isinstance(storage, LocalStorage):
        storage.sweep(older_than_seconds=_STALE_SECONDS)
    card, source = describe_encoder(command.recipe)
    recipe = make_recipe(command.recipe, card)
    pool = None
    if command.engine.local:
        # Importing torch takes longer than all else of a small job: begin while decode processes probe the videos.
        threading.Thread(target=importlib.import_module, args=("pipeline.local",), name="import").start()
        pool = ProcessPool(command.engine.decode_processes, command.engine.decode_limits)
    with pool or contextlib.nullcontext():
        shards = _indexed(storage, command, pool)
        start_times.reach("index")
        plan, price = make_plan(storage, shards, recipe, source, command.limits.max_failed_share)
        print("\n".join(price.lines()))
        before = take_account(storage, plan)
        if not before.is_complete:
            start_times.reach("plan")
            _encode_units(storage, plan, source, command, before, pool, start_times)
    account = take_account(storage, plan, max_failures=10)
    print("\n".join(account.lines()))
    judge_failures(account.clips_done, account.clips_failed, command.limits.max_failed_share)
    close_books(storage, plan)
    print(f"store: {storage.url}")
    return 0


def _indexed(storage: Storage, command: Encode, pool: ProcessPool | None) -> list[ShardRef]:
    """The named shards, or all that have an index."""
    if command.shards:
        return index_shards(storage, command.shards, command.engine, pool)
    shards = [read_fragment(storage, shard_id).shard for shard_id in list_fragments(storage)]
    if not shards:
        raise UsageError(f"--store {command.store} has no index yet: name SHARDS to encode")
    return shards


def _encode_units(
    storage: Storage,
    plan: Plan,
    source: str,
    command: Encode,
    before: Account,
    pool: ProcessPool | None,
    start_times: StartTimes,
) -> None:
    num_units = before.units - before.units_done
    flags = dataclasses.replace(command.engine, workers=min(command.engine.workers, num_units))
    policy = Policy(units_in_flight=flags.units_in_flight, max_failed_share=command.limits.max_failed_share)
    controller = Controller(units_left(storage, plan), policy, before.clips_done, before.clips_failed)
    open_books(storage)
    if not flags.local:
        from jobs.ray_cluster import connect

        connect(flags)  # before signals are ours: Ray's start takes them
    with _stop_on_signals() as stop, _engine(storage, plan, source, flags, pool) as (engine, device):
        start_times.reach("encoder" if flags.local else "cluster")
        reporter = Reporter(
            storage,
            command.engine,
            device,
            controller,
            before.clips_left,
            num_units,
            start_times,
            encoder_sleeps=is_rehearsal(source),
        )
        outcome = "crashed"
        try:
            run(
                controller,
                engine,
                num_workers=flags.workers,
                unit_timeout_seconds=flags.unit_timeout_seconds,
                stop=stop.event,
                on_tick=reporter.tick,
            )
            outcome = "done"
        except (LatentmillError, KeyboardInterrupt) as error:
            outcome = f"stopped by {type(error).__name__}"
            if isinstance(error, Interrupted):
                error.exit_code = 128 + stop.signal
            raise
        finally:
            reporter.finish(outcome, engine.places)


@contextlib.contextmanager
def _engine(
    storage: Storage, plan: Plan, source: str, flags: EngineFlags, pool: ProcessPool | None
) -> Iterator[tuple[Engine, str]]:
    """The engine, and the device of its encoders."""
    device = job_device(flags.device, flags)
    is_fallback = flags.device == "auto" and device == "cpu"
    hint = " (--device auto found no GPU; --device cuda insists on one)" if is_fallback else ""
    print(f"encode: the encoder runs on {device}{hint}", file=sys.stderr)
    if pool is None:
        engine = _ray_engine(storage, source, flags, device)
    else:
        engine = _local_engine(storage, plan, source, flags, device, pool)
    gc.freeze()  # torch's objects, through which every full collection would go, with all threads waiting
    try:
        yield engine, device
    finally:
        gc.unfreeze()
        engine.close()


def _local_engine(
    storage: Storage, plan: Plan, source: str, flags: EngineFlags, device: str, pool: ProcessPool
) -> Engine:
    import torch

    from pipeline.feed import default_window_bytes
    from pipeline.local import LocalEngine

    torch.set_num_threads(flags.encode_threads)
    pool.start()  # while the encoder loads
    if device == "cpu" and not is_rehearsal(source):
        pool.let_others_first()
    window_bytes = flags.window_mb * _MEGABYTE or default_window_bytes(plan, pool.num_processes)
    encoder = ready_encoder(source, device, plan, window_bytes)
    return LocalEngine(encoder, pool, storage, plan, window_bytes, flags.encode_threads)


def _ray_engine(storage: Storage, source: str, flags: EngineFlags, device: str) -> Engine:
    from jobs.ray_cluster import cluster_nodes, connect, node_share
    from jobs.ray_engine import RayEngine, WorkerSpec

    connect(flags)
    share = node_share(cluster_nodes(), flags, on_gpu=device == "cuda")
    print(f"encode: {share.told(flags)}", file=sys.stderr)
    return RayEngine(
        WorkerSpec(
            store_url=storage.url,
            encoder_source=source,
            device=device,
            encode_threads=flags.encode_threads,
            share=share,
            window_mb=flags.window_mb if share.decode_processes else flags.usual_window_mb,
            limits=flags.decode_limits,
        ),
        flags,
    )


class _Stop:
    """A flag that signals raise; remembers which, for the exit code."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal = signal.SIGINT

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt  # The second time the user means it.
        self.signal = signal.Signals(number)
        self.event.set()
        print("stopping: units in flight are left for the next run (again to stop at once)", file=sys.stderr)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
