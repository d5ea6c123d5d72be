"""`latentmill bench encode`: whole jobs, ours and those that people write, on the same clips with the same encoder.

In:   cases (a set and an encoder), contenders, how long; a directory for the result.
Out:  encode_<hardware>_<date>.md and .json, rewritten after every case: clips per second, share of the bare encoder and
      of the work-conserving bound, start-up, memory, goals.
Cost: per case and round about 10 to 15 times --seconds-per-set, and half a minute of start-ups.
Errors: UsageError when the output is no directory. A contender that dies says so in its row, a case whose bare stages
    die in its section: the others go on. The exit code is 1 for such a case, or when one of ours died or lost clips.

A pilot of one tar measures what a clip costs; the number of tars, and the speed of an encoder that sleeps, follow from
it. Then the contenders take turns, in an order that rotates; ratios are taken within a round, medians over the rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.bench.about import about, device_name, rotated
from jobs.bench.config import BenchEncode
from jobs.bench.encode_report import faults, to_markdown
from jobs.bench.encode_runs import Job, bare, bare_encoder, bare_stages, run_contender, samples_of, store_with_plan
from jobs.bench.encode_sets import REAL, SETS, SLEEPING, write_tars
from jobs.device import local_device
from jobs.rehearsal import is_rehearsal
from pipeline.errors import UsageError

Json = dict[str, Any]
_LIBRARIES = ("torch", "ray", "av", "decord", "numpy", "zarr", "pyarrow", "pandas", "diffusers")
# What the speed of a sleeping encoder comes from: a second of decoding, all that one tar gives, is too little for that.
_PILOT_TARS = 8
_BARE_SHARE = 4  # the bare stages see a quarter of the tars, which are all alike
_AT_ONCE = "rehearsal:4x8x8x16@1000000000"  # until a pilot says how fast it sleeps


def run_bench_encode(command: BenchEncode) -> int:
    """Measure, write, print. Returns the exit code."""
    if not command.output.is_dir():
        raise UsageError(f"--output {command.output} is no directory: make it first")
    videos = Path(tempfile.gettempdir()) / "latentmill-bench"
    videos.mkdir(exist_ok=True)
    path = command.output / f"encode_{command.hardware}_{dt.datetime.now(dt.UTC):%Y-%m-%d}.json"
    device = local_device(command.device)
    result: Json = {"about": _about(command, device), "cases": []}
    with _held_to(command.cores):
        for case in command.cases:
            result["cases"].append(_case(command, case, device, videos))
            path.write_text(json.dumps(result, indent=1) + "\n")
            path.with_suffix(".md").write_text(to_markdown(result))
    print(to_markdown(result))
    return 1 if faults(result) or any("error" in case for case in result["cases"]) else 0


@contextlib.contextmanager
def _held_to(cores: int) -> Iterator[None]:
    """This process, and those that it starts, on so many cores."""
    before = os.sched_getaffinity(0)
    if cores > len(before):
        raise UsageError(f"--cores {cores}: this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _about(command: BenchEncode, device: str) -> Json:
    return about(
        "encode",
        _LIBRARIES,
        device=device_name(device),
        compute_dtype=command.compute_dtype,
        repetitions=command.repetitions,
        cores=command.cores,
        decode_workers=command.decode_processes,
        encode_threads=command.threads_on(device),
        sleeping_threads=command.threads_on("cuda"),
        seconds_per_set=command.seconds_per_set,
    )


def _case(command: BenchEncode, case: str, device: str, videos: Path) -> Json:
    """One set with one encoder, or why that could not be measured."""
    set_name, _, encoder = case.partition(":")
    facts = {"set": set_name, "about": SETS[set_name].about, "encoder": encoder}
    try:
        with tempfile.TemporaryDirectory(prefix="latentmill-bench-encode-") as scratch:
            return {**facts, **_rounds(command, case, device, videos, Path(scratch))}
    except RuntimeError as error:
        print(f"{case}: {error}", file=sys.stderr, flush=True)
        return {**facts, "error": str(error)}


def _rounds(command: BenchEncode, case: str, device: str, videos: Path, scratch: Path) -> Json:
    """What a case's contenders are given, and all their rounds."""
    job = _sized_job(command, case, device, videos, scratch)
    quarter = store_with_plan(job, job.tars[: -(-len(job.tars) // _BARE_SHARE)], scratch / "quarter")
    rounds = []
    for number in range(command.repetitions):
        order = rotated(("bare", *command.contenders), number)
        rounds.append({name: _measured(command, job, name, quarter) for name in order})
    sleeps = is_rehearsal(job.encoder)
    return {
        "source": job.encoder if sleeps else "",
        "runs_on": "nothing" if sleeps else job.device,
        "clips": job.clips,
        "good_clips": job.good_clips,
        "rounds": rounds,
    }


def _measured(command: BenchEncode, job: Job, name: str, quarter: Path) -> Json:
    """One contender, or the bare stages, once."""
    if name == "bare":
        cell = bare(job, quarter, command.cores)
        told = f"{1 / cell['encoder_seconds']:.1f} clips/s of the encoder alone"
    else:
        cell = run_contender(job, name)
        told = cell.get("error") or f"{cell['clips'] / cell['seconds']:.1f} clips/s"
    print(f"{job.name} {name}: {told}", file=sys.stderr, flush=True)
    return cell


def sleep_seconds(cost: Json, cores: int, encoder: str) -> float:
    """How long an encoder sleeps for a clip that all cores decode in `cost`. Pure."""
    return float(cost["decode_cpu_seconds"] / cores / SLEEPING[encoder])


def tars_for(seconds: float, clips_per_tar: int, cost: Json, cores: int, encode_seconds: float) -> int:
    """How many tars keep the cores, or an encoder beside them, busy for so long; at least two. Pure."""
    # Not the write: it goes by the unit, and a pilot's units are small.
    on_cores: float = (cost["decode_cpu_seconds"] + cost["encode_cpu_seconds"]) / cores
    return max(2, math.ceil(seconds / max(on_cores, encode_seconds) / clips_per_tar))


def _sized_job(command: BenchEncode, case: str, device: str, videos: Path, scratch: Path) -> Job:
    """The job whose clips keep all cores, or the encoder, busy for `seconds_per_set`."""
    set_name, _, encoder = case.partition(":")
    chosen = SETS[set_name]
    sleeps = encoder in SLEEPING
    source = _AT_ONCE if sleeps else REAL[encoder](scratch / "encoder")
    job = Job(
        name=case,
        scratch=scratch,
        tars=tuple(write_tars(set_name, videos, scratch / "pilot-tars", _PILOT_TARS if sleeps else 1)),
        flags=(*chosen.flags, "--batch-size", str(chosen.batch_size), "--compute-dtype", command.compute_dtype),
        batch_size=chosen.batch_size,
        encoder=source,
        device="cpu" if sleeps else device,
        compute_dtype=command.compute_dtype,
        decode_workers=command.decode_processes,
        encode_threads=command.threads_on("cuda" if sleeps else device),
        limit_seconds=300 + 30 * command.seconds_per_set,
    )
    one = store_with_plan(job, job.tars[:1], scratch / "one")
    samples, clips, megapixels = samples_of(one)
    pilot = store_with_plan(job, job.tars, scratch / "pilot")
    cost = bare_stages(job, pilot, command.cores)
    encode_seconds = 0.0
    if sleeps:
        encode_seconds = sleep_seconds(cost, command.cores, encoder)
        source = f"rehearsal:4x8x8x16@{megapixels / clips / encode_seconds:.3f}"
    elif not job.computes_on_cpu:
        encode_seconds = bare_encoder(job, pilot)["encoder_seconds"]
    num_tars = tars_for(command.seconds_per_set, clips, cost, command.cores, encode_seconds)
    return dataclasses.replace(
        job,
        tars=tuple(write_tars(set_name, videos, scratch / "tars", num_tars)),
        encoder=source,
        samples=tuple(samples),
        clips=clips * num_tars,
        good_clips=chosen.good_clips * num_tars,
    )
