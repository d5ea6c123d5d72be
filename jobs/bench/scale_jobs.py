"""Whole `encode` jobs on made-up tars, each in processes of its own: their memory and their start-up.

In:   the benchmark's flags; directories for videos that are kept and for stores that are not.
Out:  JSON-ready rows: peak MiB by role for a small and a large set; seconds of a small job, part by part.
Cost: seconds per job, a minute or more for the large sets.
Errors: RuntimeError for a job that fails, with its last words.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.config import TINY_VAE, BenchScale
from jobs.bench.encode_sets import save_preset
from jobs.bench.processes import Watched, watch
from jobs.bench.scale_memory import MemoryWatch
from jobs.bench.videos import long_video, texture_video
from jobs.rehearsal import is_rehearsal

Json = dict[str, Any]
_FRAMES = 17
_WINDOWS = 4
_CLIPS_PER_TAR = 100
_LIMIT_SECONDS = 3600.0
# Small, so that a hundred short clips fill every queue there is, and more of them cannot add to it.
_BOUNDS = ("--decode-workers", "2", "--window-mb", "8", "--unit-rows", "16", "--batch-size", "4")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where a run of the benchmark keeps its videos, and its tars, encoders and stores."""

    command: BenchScale
    videos: Path
    scratch: Path

    def encode(self, name: str, tars: Sequence[Path], encoder: str, engine: str, *flags: str) -> Watched:
        """Run one job into a fresh store."""
        argv = [sys.executable, "-m", "jobs", "encode", *map(str, tars), "--store", str(self.store(name))]
        where = ["--local"] if engine == "local" else ["--workers", "1"]
        size = f"{self.command.size}x{self.command.size}"
        argv += ["--encoder", self._source(encoder), "--frames", str(_FRAMES), "--sizes", size, *_BOUNDS, *where]
        done = watch(["env", f"RAY_TMPDIR={self.ray_tmpdir}", *argv, *flags], _LIMIT_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} failed: {done.cause}")
        print(f"{name}: {done.seconds:.1f} s", file=sys.stderr, flush=True)
        return done

    def store(self, name: str) -> Path:
        """Where a job's store lies."""
        return self.scratch / name.replace(" ", "_").replace("/", "_")

    @property
    def ray_tmpdir(self) -> Path:
        """Below which Ray keeps its sockets, logs and spilled objects."""
        return self.scratch

    def _source(self, encoder: str) -> str:
        if is_rehearsal(encoder):
            return encoder
        directory = self.scratch / TINY_VAE
        return str(directory) if directory.exists() else save_preset(directory)

    def tars(self, name: str, video: Path, count: int, per_tar: int = _CLIPS_PER_TAR) -> list[Path]:
        """`count` samples of the same video; full tars are one file under many names."""
        directory = self.scratch / name
        if not directory.exists():
            directory.mkdir()
            full, rest = divmod(count, per_tar)
            paths = [directory / f"{number:05d}.tar" for number in range(full)]
            for path in paths[:1]:
                _write_tar(path, video, per_tar)
            for path in paths[1:]:
                path.hardlink_to(paths[0])
            if rest:
                _write_tar(directory / f"{full:05d}.tar", video, rest)
        return sorted(directory.iterdir())


def _write_tar(path: Path, video: Path, count: int) -> None:
    payload = video.read_bytes()
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:06d}.mp4")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def measure_memory(bench: Bench) -> list[Json]:
    """Peak memory of a job's processes: short against long videos, few against many clips."""
    return [
        _memory_row(bench, what, engine, encoder)
        for engine in bench.command.engines
        for encoder in (bench.command.encoders if engine == "local" else bench.command.encoders[:1])
        for what in ("video seconds", "clips")
    ]


def _memory_row(bench: Bench, what: str, engine: str, encoder: str) -> Json:
    amounts = bench.command.video_seconds if what == "video seconds" else bench.command.clips
    cells = [_memory_cell(bench, what, amount, engine, encoder) for amount in amounts]
    return {"what": what, "engine": engine, "encoder": encoder, "cells": cells}


def _memory_cell(bench: Bench, what: str, amount: int, engine: str, encoder: str) -> Json:
    if what == "clips":
        tars = bench.tars(f"{amount} clips", _short_video(bench), amount)
        flags: tuple[str, ...] = ()
    else:
        video = long_video(bench.videos, bench.command.video_height, amount / 60)
        tars = bench.tars(f"{amount} s", video, bench.command.videos)
        flags = ("--windows", "uniform", "--num-windows", str(_WINDOWS))
    with MemoryWatch(bench.ray_tmpdir) as memory:
        done = bench.encode(f"memory {engine} {encoder} {amount} {what}", tars, encoder, engine, *flags)
    if engine == "ray" and memory.spilled_files is None:
        raise RuntimeError(f"Ray had no session in {bench.ray_tmpdir}, so nobody knows what it spilled")
    return {
        "amount": amount,
        "seconds": done.seconds,
        "peak_mib": memory.peak_mib,
        "spilled_files": memory.spilled_files,
    }


def _short_video(bench: Bench) -> Path:
    return texture_video(bench.videos, "h264", 128, _FRAMES)


def measure_starts(bench: Bench) -> list[Json]:
    """A job of one tar, part by part; Ray once."""
    cases = [
        (engine, encoder, repetition)
        for engine in bench.command.engines
        for encoder in (bench.command.encoders if engine == "local" else bench.command.encoders[:1])
        for repetition in range(bench.command.repetitions if engine == "local" else 1)
    ]
    return [_start(bench, *case) for case in cases]


def _start(bench: Bench, engine: str, encoder: str, repetition: int) -> Json:
    count = bench.command.start_clips
    tars = bench.tars("one tar", _short_video(bench), count, per_tar=count)
    name = f"start {engine} {encoder} {repetition}"
    done = bench.encode(name, tars, encoder, engine)
    (log,) = (json.loads(path.read_text()) for path in (bench.store(name) / "runs").glob("*.json"))
    parts = start_parts(done.seconds, log["start_seconds"])
    row = {"engine": engine, "encoder": encoder, "seconds": done.seconds, "cpu_seconds": done.cpu_seconds}
    return {**row, "parts": parts}


def start_parts(wall_seconds: float, start_seconds: Json) -> dict[str, float]:
    """Where a job's wall time went: the run log's steps up to the first unit, and the rest."""
    return {**start_seconds, "other units, books, exit": wall_seconds - sum(start_seconds.values())}
