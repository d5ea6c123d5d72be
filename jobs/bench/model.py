"""`latentmill bench model`: what each preset and each released diffusers config costs to encode with.

In:   names of models, a clip's size, a device; a directory for the result.
Out:  model_<hardware>_<date>.md and .json, rewritten after every row: parameters, kMAC per pixel, frames per second and
      peak memory, for the model's own call on the whole clip and for our streaming, eager and compiled, per dtype and
      layout, with what each changes in the latent; memory against length.
Cost: seconds to minutes per row on a CPU; a process each.
Errors: UsageError for an unknown name or an output that is no directory; a way that a model cannot run, or that takes
    longer than half an hour, says so in its row. The exit code is 1 where no row could be measured.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.bench.about import about, device_name
from jobs.bench.config import BenchModel
from jobs.device import local_device
from models.config import PRESETS
from models.pretrained import real_configs
from pipeline.errors import UsageError

Json = dict[str, Any]
_LENGTHS = (33, 1025)
_LIMIT_SECONDS = 1800.0  # of a row
_PEAK = {"cpu": "of the process", "cuda": "that torch allocated on the GPU"}
# glibc keeps freed buffers as it sees fit, which hides tens of MiB of memory that is or is not in use.
_GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}


def run_bench_model(command: BenchModel) -> int:
    """Measure, write, print. Returns the exit code."""
    known = (*PRESETS, *real_configs())
    unknown = [name for name in command.models if name not in known]
    if unknown:
        raise UsageError(f"--models {' '.join(unknown)}: use some of {', '.join(known)}")
    if not command.output.is_dir():
        raise UsageError(f"--output {command.output} is no directory: make it first")
    device = local_device(command.device)
    path = command.output / f"model_{command.hardware}_{dt.datetime.now(dt.UTC):%Y-%m-%d}.json"
    result: Json = {"about": _about(command, device), "rows": [], "lengths": []}
    for kind, row in _all_rows(command, device, command.models or known):
        result[kind].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(to_markdown(result)) + "\n")
    print("\n".join(to_markdown(result)))
    return 1 if all("error" in row for row in result["rows"]) else 0


def _all_rows(command: BenchModel, device: str, models: Sequence[str]) -> Iterator[tuple[str, Json]]:
    ways = itertools.product(
        models, command.dtypes, ("plain", "streamed"), command.layouts, (False, True) if command.compile else (False,)
    )
    for way in ways:
        yield (
            "rows",
            _row(command, device, dict(zip(("model", "dtype", "how", "layout", "compiled"), way, strict=True))),
        )
    for frames in _LENGTHS:
        yield "lengths", _length(command, device, frames)


def _row(command: BenchModel, device: str, spec: Json) -> Json:
    cell = _measured(command, device, spec, command.frames, command.size)
    print(f"{spec['model']} {_how(spec)} {spec['dtype']}: {_speed(cell)}", file=sys.stderr, flush=True)
    return {**spec, **cell}


def _how(spec: Json) -> str:
    layout = "channels last" if spec["layout"] == "channels_last_3d" else ""
    return ", ".join(filter(None, (spec["how"], layout, "compiled" if spec["compiled"] else "")))


def _length(command: BenchModel, device: str, frames: int) -> Json:
    spec = {
        "model": "tiny-4x8x8x16",
        "how": "length",
        "compiled": False,
        "dtype": "float32",
        "layout": "contiguous",
    }
    return {
        "frames": frames,
        **_measured(dataclasses.replace(command, repetitions=1), device, spec, frames, command.size),
    }


def _measured(command: BenchModel, device: str, spec: Json, frames: int, size: int) -> Json:
    asked = {
        **spec,
        "device": device,
        "frames": frames,
        "size": size,
        "repetitions": command.repetitions,
        "threads": command.threads,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.bench.model_child"],
            input=json.dumps(asked),
            capture_output=True,
            env={**os.environ, **(_GIVE_MEMORY_BACK if spec["how"] == "length" else {})},
            text=True,
            check=False,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {_LIMIT_SECONDS:g} s"}
    if not done.stdout:
        return {"error": (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1][:100]}
    fields: Json = json.loads(done.stdout)
    return fields


def _about(command: BenchModel, device: str) -> Json:
    told = about(
        "model",
        ("torch", "diffusers"),
        repetitions=command.repetitions,
        threads=command.threads,
        device=device,
        clip=f"{command.frames}x{command.size}x{command.size} (or the nearest on a model's grid)",
    )
    return {**told, "hardware": f"{told['hardware']}; on {device_name(device)}"}


def to_markdown(result: Json) -> Iterator[str]:
    """The whole page."""
    told, peak = result["about"], _PEAK[result["about"]["device"]]
    yield from ("# Model benchmark", "", f"- command: `{told['command']}`", f"- date: {told['date']}")
    yield f"- commit: {told['commit']}"
    yield f"- hardware: {told['hardware']}; {told['threads']} threads, glibc's own settings (a job keeps freed memory)"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in told['versions'].items())}"
    yield f"- one clip of {told['clip']}, random weights; medians of {told['repetitions']} after a warm-up"
    yield "- plain: the model's own call on the whole clip; streamed: canonical chunks of at least 8 frames"
    yield "- share: of the rate of a large matrix product in the same process, a moment later: rough on a busy machine"
    yield "- latent error: the largest against float32, eager and contiguous, in standard deviations of the latent"
    yield f"- peak MiB: {peak}, in the timed encodes"
    if told["device"] == "cuda":
        tf32 = "with" if any(row.get("tf32") for row in result["rows"]) else "without"
        yield f"- float32 rows: convolutions, and the product that is 100 %, {tf32} TF32; the reference latent without"
    yield ""
    yield "| model | encoder / decoder, M | dtype | how | kMAC/pixel | frames/s | peak MiB | share | latent error |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in result["rows"]:
        how = _how(row)
        if "error" in row:
            yield f"| {row['model']} | | {row['dtype']} | {how} | {row['error']} | | | | |"
            continue
        sizes = f"{row['encoder'] / 1e6:.1f} / {row['decoder'] / 1e6:.1f}"
        kmacs = "" if row["kmacs_per_pixel"] is None else f"{row['kmacs_per_pixel']:.0f}"
        share = "" if row["matrix_share"] is None else f"{row['matrix_share']:.0%}"
        yield (
            f"| {row['model']} | {sizes} | {row['dtype']} | {how} | {kmacs} | {row['frames_per_second']:.1f} | "
            f"{row['peak_mib']:.0f} | {share} | {row['latent_error_std']:.1g} |"
        )
    yield from ("", "## Memory of a streamed encode and length: tiny-4x8x8x16, float32", "")
    yield from (f"| frames | peak MiB {peak} |", "|---|---|")
    for row in result["lengths"]:
        yield f"| {row['frames']} | {row['error'] if 'error' in row else format(row['peak_mib'], '.1f')} |"


def _speed(cell: Json) -> str:
    return cell["error"] if "error" in cell else f"{cell['frames_per_second']:.1f} frames/s"
