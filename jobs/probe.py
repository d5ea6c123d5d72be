"""`plan --probe`: what encoding will take, from a short trial with the real encoder and decoder.

In:   a plan's price and its first clips.
Out:  lines: seconds per clip of decode and encode per bucket, hours in all, which of the two is the limit.
Cost: loads the encoder; decodes and encodes two slices per bucket.
Errors: those of the encoder, UsageError for a --device that is not there; a bucket whose first clips cannot be decoded
      is left out of the estimate, which says so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from jobs.flags import TrialFlags
from jobs.prepare import open_encoder
from jobs.progress import format_seconds
from models.spec import VideoEncoder
from pipeline.buckets import Bucket
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import DecodedClip
from pipeline.decode_requests import to_requests
from pipeline.encode import encode_slice
from pipeline.placement import Clip
from pipeline.plan import Plan, Unit, load_plan
from pipeline.price import Price
from pipeline.recipe import Recipe
from pipeline.storage import Storage
from pipeline.verify import unit_clips


@dataclasses.dataclass(frozen=True)
class Trial:
    """Seconds per clip, on one decode process and on one encode worker."""

    decode_seconds: float
    encode_seconds: float


def estimate(storage: Storage, recipe: Recipe, source: str, price: Price, flags: TrialFlags) -> Iterator[str]:
    """Lines for people."""
    import torch

    from jobs.device import local_device

    torch.set_num_threads(flags.encode_threads)
    device = local_device(flags.device)
    encoder = open_encoder(source, device, recipe.encode.compute_dtype)
    plan = load_plan(storage, recipe)
    trials: dict[Bucket, Trial] = {}
    with DecodeProcess(flags.decode_limits) as process:
        for bucket in plan.buckets:
            trial = _try_bucket(storage, plan, bucket, encoder, process, flags.encode_threads)
            if trial is None:
                yield f"probe {bucket.name}: none of the first clips can be decoded; no estimate for this bucket"
                continue
            trials[bucket] = trial
            yield (
                f"probe {bucket.name}: decode {trial.decode_seconds * 1e3:.1f} ms per clip and process, "
                f"encode {trial.encode_seconds * 1e3:.1f} ms per clip on {device}"
            )
    yield total_line({bucket: price.buckets[bucket].clips for bucket in plan.buckets}, trials, flags)


def total_line(num_clips: Mapping[Bucket, int], trials: Mapping[Bucket, Trial], flags: TrialFlags) -> str:
    """What the clips of the buckets that were tried take together, and which others that leaves out. Pure."""
    if not trials:
        return "estimate: none, since no clip was tried"
    decode_total = sum(num_clips[bucket] * trial.decode_seconds for bucket, trial in trials.items())
    encode_total = sum(num_clips[bucket] * trial.encode_seconds for bucket, trial in trials.items())
    decode_wall, encode_wall = decode_total / flags.decode_processes, encode_total / flags.workers
    limit = "encode" if encode_wall >= decode_wall else "decode"
    untried = [bucket for bucket in num_clips if bucket not in trials]
    names = ", ".join(bucket.name for bucket in untried)
    without = f", without {sum(num_clips[bucket] for bucket in untried)} clips of {names}" if untried else ""
    return (
        f"estimate: {format_seconds(max(decode_wall, encode_wall))}{without}, with {flags.workers} encode workers and "
        f"{flags.decode_processes} decode processes, {limit}-bound (encode {encode_total / 3600:.3f} worker hours, "
        f"decode {decode_total / 3600:.3f} core hours; each worker on a device of its own)"
    )


def _try_bucket(
    storage: Storage, plan: Plan, bucket: Bucket, encoder: VideoEncoder, process: DecodeProcess, threads: int
) -> Trial | None:
    batch_size = plan.recipe.batch_size(bucket)
    units = (unit for unit in plan.units() if unit.bucket == bucket)
    unit = next(units, Unit(bucket, 0))
    clips = list(islice(unit_clips(storage, plan, unit), 2 * batch_size))
    decoded, decode_seconds = _decode(plan.recipe, clips, process)
    if not decoded:
        return None
    slice_ = [list(part) for part in zip(*decoded[:batch_size], strict=True)]
    return Trial(decode_seconds / len(clips), _encode(encoder, plan.recipe, slice_, threads) / batch_size)


def _encode(encoder: VideoEncoder, recipe: Recipe, slice_: list[Any], threads: int) -> float:
    """Seconds per slice, of as many at a time as a worker encodes."""
    import torch

    from pipeline.encode_stage import num_callers

    callers = num_callers(encoder, recipe, threads)
    with ThreadPoolExecutor(callers, initializer=torch.set_num_threads, initargs=(threads // callers,)) as pool:
        for _ in range(2):  # The first call warms up.
            started = time.perf_counter()
            list(pool.map(lambda _: encode_slice(encoder, recipe, *slice_), range(callers)))
            seconds = time.perf_counter() - started
    return seconds / callers


def _decode(recipe: Recipe, clips: list[Clip], process: DecodeProcess) -> tuple[list[tuple[Clip, DecodedClip]], float]:
    decoded: list[tuple[Clip, DecodedClip]] = []
    requests = to_requests(clips, recipe, 1 << 30)
    process.decode(requests[0])  # Starts the process, which is not what is measured.
    started = time.perf_counter()
    position = 0
    for request in requests:
        for outcome in process.decode(request):
            if isinstance(outcome, DecodedClip):
                decoded.append((clips[position], outcome))
            position += 1
    return decoded, time.perf_counter() - started
