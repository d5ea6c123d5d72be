"""`latentmill bench scale`: what grows with the job, and what must not.

In:   which parts; numbers of units, lengths of videos, numbers of clips; a directory for the result.
Out:  scale_<hardware>_<date>.md and .json: the driver's cost per unit and its memory, peak memory of every process of a
      job for short and long videos and for few and many clips, the parts of a small job's wall time, goals.
Cost: some minutes; videos are kept in a directory for temporary files for the next run.
Errors: UsageError when the output is no directory or an encoder is not known; RuntimeError for a job that fails.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs.bench.about import about
from jobs.bench.config import TINY_VAE, BenchScale
from jobs.bench.scale_jobs import Bench, measure_memory, measure_starts
from jobs.bench.scale_report import to_markdown
from jobs.rehearsal import describe_rehearsal, is_rehearsal
from pipeline.errors import UsageError

Json = dict[str, Any]
_LIBRARIES = ("torch", "av", "pyarrow", "zarr", "ray")


def run_bench_scale(command: BenchScale) -> int:
    """Measure, write, print. Returns the exit code."""
    _check(command)
    videos = Path(tempfile.gettempdir()) / "latentmill-bench"
    videos.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lm-scale-") as scratch:  # short: Ray's sockets lie in it
        bench = Bench(command, videos, Path(scratch))
        result = {"about": about("scale", _LIBRARIES, repetitions=command.repetitions), **_measured(bench)}
    name = f"scale_{command.hardware}_{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    text = to_markdown(result)
    (command.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (command.output / f"{name}.md").write_text(text)
    print(text)
    return 0


def _check(command: BenchScale) -> None:
    if not command.output.is_dir():
        raise UsageError(f"--output {command.output} is no directory: make it first")
    for encoder in command.encoders:
        if is_rehearsal(encoder):
            describe_rehearsal(encoder)
        elif encoder != TINY_VAE:
            raise UsageError(f"--encoders {encoder}: use rehearsal:TxHxWxC@MEGAPIXELS or {TINY_VAE}")


def _measured(bench: Bench) -> dict[str, list[Json]]:
    parts = {
        "controller": _measure_controller,
        "books": _measure_books,
        "memory": measure_memory,
        "start": measure_starts,
    }
    return {name: measure(bench) for name, measure in parts.items() if name in bench.command.parts}


def _measure_controller(bench: Bench) -> list[Json]:
    """Load a plan and lease its units to fake workers; each number of units and workers in a process of its own."""
    command, rows = bench.command, []
    cases = [(units, 1) for units in command.units] + [(command.worker_units, workers) for workers in command.workers]
    for units, workers in cases:
        directory = bench.scratch / f"plan-{units}"
        made = _child("plan", directory, units)
        row = {"units": units, "workers": workers, **made, **_child("drive", directory, units, workers)}
        print(f"controller: {row}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _measure_books(bench: Bench) -> list[Json]:
    """Read and close the books of a finished store, in a process of its own."""
    rows = []
    for units in bench.command.books_units:
        directory = bench.scratch / f"books-{units}"
        for step in ("plan", "ledger"):
            _child(step, directory, units)
        row = {"units": units, **_child("books", directory, units)}
        print(f"books: {row}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _child(step: str, directory: Path, units: int, workers: int = 0) -> Json:
    asked = {"step": step, "directory": str(directory), "units": units, "workers": workers}
    argv = [sys.executable, "-m", "jobs.bench.scale_child"]
    done = subprocess.run(argv, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    fields: Json = json.loads(done.stdout)
    return fields
