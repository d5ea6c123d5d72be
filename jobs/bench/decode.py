"""`latentmill bench decode`: every back end, `auto` and the loops that people write, on the same videos.

In:   codecs, sizes, lengths; a directory for the result.
Out:  decode_<hardware>_<date>.md and .json: frames per second and core, peak memory, long videos, hand-over, goals.
Cost: some minutes; videos are made in a directory for temporary files and kept there for the next run.
Errors: UsageError when the output is no directory, or a codec is not known. A method that cannot decode a row says so
    in its cell.

Every method has a process of its own per row. Within a row the methods take turns, in an order that rotates, so that
what else the machine does at a time meets all of them; ratios are taken within a round, medians over the rounds.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.bench.about import about, rotated
from jobs.bench.config import BenchDecode
from jobs.bench.decode_child import request_of
from jobs.bench.decode_report import to_markdown
from jobs.bench.videos import ENCODERS, FPS, long_video, texture_video
from pipeline.decode.backend import decode_windows
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.errors import DecodeError, UsageError

BACK_ENDS = ("pyav", "decord", "torchcodec")
LOOPS = ("loop: decord get_batch", "loop: PyAV all, torch resize")
_LIBRARIES = ("av", "decord", "torchcodec", "torch", "numpy")
_WINDOW_FRAMES = 16
_SAMPLE_SECONDS = 0.2  # a sample repeats what is shorter: a single decode of 20 ms says little

Windows = list[tuple[int, int]]
Json = dict[str, Any]


def run_bench_decode(command: BenchDecode) -> int:
    """Measure, write, print. Returns the exit code."""
    if not command.output.is_dir():
        raise UsageError(f"--output {command.output} is no directory: make it first")
    if unknown := [codec for codec in command.codecs if codec not in ENCODERS]:
        raise UsageError(f"--codecs {' '.join(unknown)}: there is {' '.join(ENCODERS)}")
    videos = Path(tempfile.gettempdir()) / "latentmill-bench"
    videos.mkdir(exist_ok=True)
    result = {
        "about": about("decode", _LIBRARIES, repetitions=command.repetitions, frames=command.frames),
        "rows": [_row(command, videos, *case) for case in _cases(command)],
        "long": _long(command, videos),
        "memory": _memory(command, videos),
        "handover": [_handover(command, videos, height) for height in command.heights],
    }
    name = f"decode_{command.hardware}_{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    (command.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = to_markdown(result)
    (command.output / f"{name}.md").write_text(text)
    print(text)
    return 0


def _cases(command: BenchDecode) -> Iterator[tuple[str, int, str, Windows]]:
    """(codec, height, what is wanted, windows): few frames are two windows of 8 in the second half."""
    half = command.frames // 2
    few = [(half + 3, 8), (command.frames - 12, 8)]
    for codec in command.codecs:
        for height in command.heights:
            yield codec, height, "few", few
            yield codec, height, "all", [(0, command.frames)]


def _row(command: BenchDecode, videos: Path, codec: str, height: int, wanted: str, windows: Windows) -> Json:
    path = texture_video(videos, codec, height, command.frames)
    methods = ("auto", *BACK_ENDS, *LOOPS)
    cells = measured(methods, path, windows, command.side, command.repetitions, sample_seconds=_SAMPLE_SECONDS)
    print(f"{codec} {height}p {wanted}: " + _progress(cells), file=sys.stderr)
    return {"codec": codec, "height": height, "wanted": wanted, "cells": cells}


def _progress(cells: dict[str, Json]) -> str:
    return ", ".join(f"{name} {cell['cpu_seconds']:.2f} s" for name, cell in cells.items() if "cpu_seconds" in cell)


def measured(
    methods: Sequence[str],
    path: Path,
    windows: Windows,
    side: int,
    repetitions: int,
    *,
    warm_up: int = 1,
    sample_seconds: float = 0.0,
) -> dict[str, Json]:
    """Each method's medians over rounds, and its CPU seconds in each; `warm_up` rounds do not count."""
    question = {"path": str(path), "windows": windows, "side": side, "least_seconds": sample_seconds}
    with contextlib.ExitStack() as stack:
        children = {method: stack.enter_context(_child()) for method in methods}
        rounds = [
            {method: children[method]({"method": method} | question) for method in rotated(methods, number)}
            for number in range(warm_up + repetitions)
        ]
    return {method: _summary([turn[method] for turn in rounds[warm_up:]]) for method in methods}


def _summary(samples: Sequence[Json]) -> Json:
    failed = next((sample for sample in samples if "error" in sample), None)
    if failed is not None:
        return failed
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    return medians | {"rounds": [sample["cpu_seconds"] for sample in samples]}


@contextlib.contextmanager
def _child() -> Iterator[Callable[[Json], Json]]:
    """A function that has a process of its own do one measurement."""
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.bench.decode_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(message: Json) -> Json:
            with contextlib.suppress(BrokenPipeError):  # reading the reply will tell
                stdin.write(json.dumps(message) + "\n")
                stdin.flush()
            reply = stdout.readline()
            fields: Json = json.loads(reply) if reply else {"error": f"the process ended with {process.wait()}"}
            return fields

        yield ask


def spread_windows(num_frames: int) -> Windows:
    """Four windows, spread over a video."""
    return [(num_frames * (2 * k + 1) // 8, _WINDOW_FRAMES) for k in range(4)]


def _long(command: BenchDecode, videos: Path) -> Json:
    path = long_video(videos, command.long_height, command.long_minutes)
    num_frames = round(command.long_minutes * 60 * FPS)
    few = measured(("auto", "pyav"), path, spread_windows(num_frames), command.side, command.repetitions)
    everything = measured(("stream",), path, [(0, num_frames)], command.side, 1)
    return {
        "minutes": command.long_minutes,
        "height": command.long_height,
        "four windows": few,
        "all": everything["stream"],
    }


def _memory(command: BenchDecode, videos: Path) -> list[Json]:
    """Peak memory of a fresh process for a short and a long video: four windows, and all frames in pieces."""
    rows = []
    for minutes in (1.0, command.memory_minutes):
        path = long_video(videos, 96, minutes)
        num_frames = round(minutes * 60 * FPS)
        few = measured(("auto",), path, spread_windows(num_frames), 64, 1, warm_up=0)["auto"]
        everything = measured(("stream",), path, [(0, num_frames)], 64, 1, warm_up=0)["stream"]
        rows.append({"minutes": minutes, "four windows": few, "all in pieces": everything})
    return rows


def _handover(command: BenchDecode, videos: Path, height: int) -> Json:
    """Wall time of the same requests in this process and in a decode process, in turns."""
    path = texture_video(videos, "h264", height, command.frames)
    request = request_of(str(path), [(0, 17), (20, 17), (40, 17)], 256)
    limits = DecodeLimits()
    for outcome in decode_windows(request, limits):
        if isinstance(outcome, DecodeError):
            raise outcome
    rounds: dict[str, list[float]] = {"in_process": [], "decode_process": []}
    with DecodeProcess(limits) as process:
        works = {
            "in_process": lambda: decode_windows(request, limits),
            "decode_process": lambda: process.decode(request),
        }
        for number in range(8 * command.repetitions + 2):
            for name in rotated(tuple(works), number):
                rounds[name].append(_seconds(works[name]))
    return {"height": height} | {name: seconds[2:] for name, seconds in rounds.items()}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
