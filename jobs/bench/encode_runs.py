"""One run of one contender of the encode benchmark, or of the bare stages: commands, and what is read off them.

In:   a Job: tars, flags, encoder, workers and threads.
Out:  cells: clips saved, seconds of start-up, of work and in all, CPU seconds, peak memory, or {"error"}; seconds per
      clip of the bare stages and of the encoder alone.
Cost: what is measured; the files of a run are deleted after it.
Errors: RuntimeError when the bare stages die; a contender that dies is a cell.

Start-up ends when the encoder is loaded and decoding begins. Ours indexes the tars before; that is told apart, as the
other scripts get what they need of the index for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.bench.config import OURS
from jobs.bench.processes import Watched, watch
from jobs.rehearsal import is_rehearsal
from pipeline.account import take_account
from pipeline.heap import HEAP_ENVIRONMENT
from pipeline.index import list_fragments, read_fragment
from pipeline.placement import PlacedShard
from pipeline.plan import load_plan
from pipeline.storage import open_storage
from pipeline.store import open_header

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What every contender of a case is given.

    samples: those of one tar, as jobs.bench.encode_child's Work, broken ones included. clips: that the plan has.
    good_clips: that can be decoded.
    """

    name: str
    scratch: Path
    tars: tuple[Path, ...]
    flags: tuple[str, ...]
    batch_size: int
    encoder: str
    device: str
    compute_dtype: str
    decode_workers: int
    encode_threads: int
    limit_seconds: float
    samples: tuple[Json, ...] = ()
    clips: int = 0
    good_clips: int = 0

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the encoder shares the cores with everything else."""
        return self.device == "cpu" and not is_rehearsal(self.encoder)


def store_with_plan(job: Job, tars: Sequence[Path], store: Path) -> Path:
    """A store of these tars, indexed and planned, with nothing encoded."""
    _require(watch(_index(job, tars, store), job.limit_seconds))
    argv = [*_latentmill("plan"), "--store", str(store), "--encoder", job.encoder, *job.flags]
    _require(watch(argv, job.limit_seconds))
    return store


def _latentmill(command: str) -> list[str]:
    return [sys.executable, "-m", "jobs", command]


def _index(job: Job, tars: Sequence[Path], store: Path) -> list[str]:
    shared = ["--store", str(store), "--local", "--decode-workers", str(job.decode_workers)]
    return [*_latentmill("index"), *map(str, tars), *shared]


def _require(watched: Watched) -> Watched:
    if watched.returncode:
        sys.stderr.writelines(line for _, line in watched.stderr)
        raise RuntimeError(watched.cause)
    return watched


def samples_of(store: Path) -> tuple[list[Json], int, float]:
    """Of a store with one tar: its samples for the scripts, its clips, and their megapixels."""
    storage = open_storage(str(store))
    recipe = open_header(storage).recipe
    (shard_id,) = list_fragments(storage)
    placed = PlacedShard.of(read_fragment(storage, shard_id), recipe)
    samples = []
    for place in placed.placements:
        bucket, media = place.bucket, place.media
        scale = max(bucket.height / media.height, bucket.width / media.width)
        cover = [max(bucket.height, round(media.height * scale)), max(bucket.width, round(media.width * scale))]
        shape = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width, "cover": cover}
        where = {"key": place.sample.key, "offset": place.sample.offset, "size_bytes": place.sample.size_bytes}
        samples.append({**where, "starts": list(place.windows.starts), **shape})
    samples += [_broken_sample(unplaced.sample, samples[0]) for unplaced in placed.unplaced]
    per_bucket = placed.rows_per_bucket().items()
    pixels = sum(rows * bucket.num_frames * bucket.height * bucket.width for bucket, rows in per_bucket)
    return sorted(samples, key=lambda sample: int(sample["offset"])), sum(rows for _, rows in per_bucket), pixels / 1e6


def _broken_sample(sample: Any, like: Json) -> Json:
    """What our index has refused, the scripts find out by themselves."""
    return {**like, "key": sample.key, "offset": sample.offset, "size_bytes": sample.size_bytes}


# the bare stages


def bare(job: Job, store: Path, copies: int) -> Json:
    """Seconds per clip of the stages and of the encoder alone."""
    stages, alone = bare_stages(job, store, copies), bare_encoder(job, store)
    if job.device == "cuda":  # its calls, which may wait busily, are not in the stages
        stages["encode_cpu_seconds"] += alone["encoder_cpu_seconds"]
    return {**stages, **alone}


def bare_stages(job: Job, store: Path, copies: int) -> Json:
    """CPU seconds per clip of decode, encode and write, with one copy per core at the same time, as in a job.

    An encoder that leaves the CPU alone is replaced by one that takes no time.
    """
    encoder = job.encoder if job.computes_on_cpu else None
    outputs = [job.scratch / f"bare-{number}" for number in range(copies)]
    with ThreadPoolExecutor(copies) as threads:
        found = list(threads.map(lambda output: _bare(job, "stages", store, encoder, 1, output), outputs))
    clips = sum(one["clips"] for one in found)
    names = ("decode_cpu_seconds", "encode_cpu_seconds", "write_cpu_seconds")
    return {name: sum(one.get(name, 0.0) for one in found) / clips for name in names}


def bare_encoder(job: Job, store: Path) -> Json:
    """Seconds per clip of the encoder alone, on clips in memory (the speed of light of one encoder), and its CPU's."""
    found = _bare(job, "encoder", store, job.encoder, job.encode_threads, job.scratch / "alone")
    seconds = {"encoder_seconds": "encoder_wall_seconds", "encoder_cpu_seconds": "encoder_cpu_seconds"}
    return {name: found[measured] / found["clips"] for name, measured in seconds.items()}


def _bare(job: Job, what: str, store: Path, encoder: str | None, threads: int, output: Path) -> Json:
    output.mkdir()
    path = output / "spec.json"
    spec = {
        "what": what,
        "store": str(store),
        "encoder": encoder,
        "device": job.device,
        "encode_threads": threads,
        "output": str(output),
    }
    path.write_text(json.dumps(spec))
    try:
        environment = [f"{name}={value}" for name, value in HEAP_ENVIRONMENT.items()]  # at their best
        argv = ["env", *environment, sys.executable, "-m", "jobs.bench.encode_bare", str(path)]
        watched = _require(watch(argv, job.limit_seconds))
    finally:
        shutil.rmtree(output)
    result: Json = json.loads(watched.stdout[-1][1])
    return result


# contenders


def run_contender(job: Job, name: str) -> Json:
    """One contender, once."""
    directory = job.scratch / "run"
    directory.mkdir()
    try:
        return _run_ours(job, name, directory / "store") if name in OURS else _run_other(job, name, directory)
    finally:
        shutil.rmtree(directory)


def _run_ours(job: Job, name: str, store: Path) -> Json:
    workers = ["--local"]
    commands = [[*_latentmill("encode"), *map(str, job.tars)]]
    threads = job.encode_threads
    if name != "local":
        num_workers = int(name.removeprefix("ray-"))
        workers, threads = ["--workers", str(num_workers)], max(1, threads // num_workers)
        commands = [_index(job, job.tars, store), commands[0]]  # in a process of its own, to tell it from Ray's start
    commands[-1] += ["--store", str(store), "--encoder", job.encoder, *job.flags, *workers]
    commands[-1] += ["--decode-workers", str(job.decode_workers), "--encode-threads", str(threads)]
    commands[-1] += ["--device", job.device]
    watched = []
    for command in commands:
        watched.append(watch(command, job.limit_seconds))
        if watched[-1].returncode:
            return {"error": f"died: {watched[-1].cause}"}
    index, encode = watched[0], watched[-1]
    marks = [index.when("^index: .* are new"), index.when("^index: done"), encode.when("worker .* is ready")]
    marks.append(encode.when("^store: "))
    if None in marks:
        return {"error": f"died: its output lacks a line that tells of its stages: {marks}"}
    index_began, index_done, ready, done = (mark for mark in marks if mark is not None)
    storage = open_storage(str(store))
    (log,) = (json.loads(storage.read(found)) for found in storage.list("runs/"))
    account = take_account(storage, load_plan(storage, open_header(storage).recipe))
    # Busy from the first unit's wait to the last one's end.
    facts = {"clips": account.written, "busy": log["progress"]["busy_share"], "workers": len(log["workers"])}
    return {**_cell(watched, done - ready, index_done - index_began), **facts}


def _cell(watched: Sequence[Watched], seconds: float, index_seconds: float = 0.0) -> Json:
    total = sum(one.seconds for one in watched)
    return {
        "seconds": seconds,
        "index_seconds": index_seconds,
        "total_seconds": total,
        "startup_seconds": total - seconds - index_seconds,
        "cpu_seconds": sum(one.cpu_seconds for one in watched),
        "peak_mib": max(one.peak_mib for one in watched),
    }


def _run_other(job: Job, name: str, directory: Path) -> Json:
    output = directory / "latents"
    output.mkdir()
    spec = {
        "contender": name,
        "encoder": job.encoder,
        "device": job.device,
        "compute_dtype": job.compute_dtype,
        "decode_workers": job.decode_workers,
        "encode_threads": job.encode_threads,
        "batch_size": job.batch_size,
        "shards": [str(path) for path in job.tars],
        "samples": job.samples,
        "output": str(output),
    }
    path = directory / "spec.json"
    path.write_text(json.dumps(spec))
    watched = watch([sys.executable, "-m", "jobs.bench.encode_child", str(path)], job.limit_seconds)
    if watched.returncode or not watched.stdout:
        return {"error": f"died: {watched.cause}"}
    clock = json.loads(watched.stdout[-1][1])
    return {**_cell([watched], clock["done"] - clock["ready"]), "clips": _saved(output)}


def _saved(output: Path) -> int:
    """Latents in a directory of .pt or .parquet files."""
    import pyarrow.parquet as pq

    rows = sum(int(pq.ParquetFile(path).metadata.num_rows) for path in output.glob("*.parquet"))
    return rows + sum(1 for _ in output.glob("*.pt"))
