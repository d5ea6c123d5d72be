"""The stages of the job alone, one after another in one process: what no engine can do without.

In:   a JSON file: {"what": "stages" or "encoder", "store": indexed and planned, "encoder": null for one that takes no
      time, "device", "encode_threads", "output"}.
Out:  JSON on stdout: clips, and seconds per stage; see `stages` and `encoder_alone`.
Cost: what is measured.
Errors: those of the pipeline.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from jobs.prepare import open_encoder
from models.spec import VideoEncoder
from pipeline.buckets import Bucket
from pipeline.commit import RowResult, commit
from pipeline.decode.backend import decode_windows
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import DecodeOutcome
from pipeline.decode_requests import next_slice, to_requests
from pipeline.encode import encode_slice
from pipeline.encode_stage import num_callers
from pipeline.index import read_fragment
from pipeline.placement import Clip, PlacedShard
from pipeline.plan import Plan, Unit, load_plan
from pipeline.shards import ShardRef
from pipeline.storage import Storage, open_storage
from pipeline.store import absent_rows, open_header

Json = dict[str, Any]
Value = TypeVar("Value")
_GROUP_BYTES = 128 << 20


class _Clock:
    """Wall and CPU seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, stage: str, work: Callable[[], Value]) -> Value:
        began, cpu_began = time.perf_counter(), time.process_time()
        value = work()
        self.seconds[f"{stage}_cpu_seconds"] += time.process_time() - cpu_began
        self.seconds[f"{stage}_wall_seconds"] += time.perf_counter() - began
        return value


class _Stages:
    """Decode, encode and commit, one after another; reads from one store and writes to another."""

    def __init__(self, storage: Storage, output: Storage, plan: Plan, encoder: VideoEncoder) -> None:
        self._storage, self._output, self._plan, self._encoder = storage, output, plan, encoder
        self.clock = _Clock()

    @functools.lru_cache(maxsize=1)  # noqa: B019 (lives as long as the process)
    def _placed(self, shard: ShardRef) -> PlacedShard:
        return PlacedShard.of(read_fragment(self._storage, shard.shard_id), self._plan.recipe)

    def run(self, unit: Unit, at_most: int | None = None) -> int:
        """A unit, or its first clips; returns how many."""
        recipe = self._plan.recipe
        clips = list(itertools.islice(self._plan.clips_of(unit, self._placed), at_most))
        rows, results = absent_rows(recipe, unit.bucket), list[RowResult]()
        first_row = unit.number * recipe.unit_rows(unit.bucket)
        outcomes = self._outcomes(clips)
        while len(results) < len(clips):
            part = next_slice(clips, len(results), recipe, first_row)
            found = list(itertools.islice(outcomes, len(part)))
            encode = functools.partial(encode_slice, self._encoder, recipe, part, found)
            stored, facts = self.clock("encode", encode)
            start = part[0].row - first_row
            rows[start : start + len(part)] = stored
            results += facts
        self.clock("write", functools.partial(commit, self._output, self._plan, unit, clips, results, rows))
        return len(clips)

    def _outcomes(self, clips: Sequence[Clip]) -> Iterator[DecodeOutcome]:
        for request in to_requests(clips, self._plan.recipe, _GROUP_BYTES):
            yield from self.clock("decode", functools.partial(decode_windows, request, DecodeLimits()))


def stages(storage: Storage, output: Path, plan: Plan, encoder: VideoEncoder) -> Json:
    """Every unit, after a warm-up: {"clips", "<stage>_cpu_seconds", "<stage>_wall_seconds"}."""
    warm_up = _Stages(storage, open_storage(str(output / "warm-up")), plan, encoder)
    for unit in _one_per_bucket(plan):
        warm_up.run(unit, plan.recipe.encode.batch_size)
    measured = _Stages(storage, open_storage(str(output / "store")), plan, encoder)
    clips = sum(measured.run(unit) for unit in plan.units())
    return {"clips": clips, **measured.clock.seconds}


def _one_per_bucket(plan: Plan) -> Iterable[Unit]:
    return {unit.bucket: unit for unit in plan.units()}.values()


def _random_batch(plan: Plan, bucket: Bucket) -> torch.Tensor:
    """A full one: so is every call of a job, whose short batches are filled up."""
    shape = (plan.recipe.batch_size(bucket), bucket.num_frames, bucket.height, bucket.width, 3)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def encoder_alone(plan: Plan, encoder: VideoEncoder, threads: int) -> Json:
    """The encoder on clips in memory, after a warm-up: {"clips", "encoder_cpu_seconds", "encoder_wall_seconds"}.

    As many calls at a time as a job with these threads makes.
    """
    clock, num_clips = _Clock(), 0
    callers = num_callers(encoder, plan.recipe, threads)
    with ThreadPoolExecutor(callers, initializer=torch.set_num_threads, initargs=(threads // callers,)) as pool:

        def encode(batch: torch.Tensor, calls: int) -> None:
            for _ in pool.map(encoder.encode, itertools.repeat(batch, calls)):
                pass

        for unit in _one_per_bucket(plan):
            encode(_random_batch(plan, unit.bucket), callers)
        for unit in plan.units():
            batch, clips = _random_batch(plan, unit.bucket), plan.num_rows(unit)
            clock("encoder", functools.partial(encode, batch, -(-clips // len(batch))))
            num_clips += clips
    return {"clips": num_clips, **clock.seconds}


def _at_once(plan: Plan) -> str:
    """An encoder of the plan's geometry that takes no time."""
    geometry = plan.recipe.encoder.geometry
    side = geometry.spatial_stride
    return f"rehearsal:{geometry.temporal_stride}x{side}x{side}x{geometry.channels}@1000000000"


def main() -> None:
    """Measure once."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["encode_threads"])
    storage = open_storage(spec["store"])
    plan = load_plan(storage, open_header(storage).recipe)
    encoder = open_encoder(spec["encoder"] or _at_once(plan), spec["device"], plan.recipe.encode.compute_dtype)
    gc.freeze()  # as jobs do
    alone = spec["what"] == "encoder"
    if alone:
        result = encoder_alone(plan, encoder, spec["encode_threads"])
    else:
        result = stages(storage, Path(spec["output"]), plan, encoder)
    print(json.dumps(result), file=reply, flush=True)


if __name__ == "__main__":
    main()
