"""What a driver does with a plan of many units, in a process of its own, so that its time and its memory are its own.

In:   one JSON object on stdin: {"step", "directory", "units", "workers"}; see STEPS.
Out:  one JSON object on stdout: CPU seconds of the step's parts, and MiB by which the process grew.
Cost: what is measured; some microseconds a unit for the controller, some milliseconds for the books.
Errors: whatever the measured code raises ends the process.

The units are those of a real plan file, of one line for each shard of 1000 clips. The workers are fakes that finish a
unit as soon as it is submitted, one event at a time, which costs the job's loop the most. The ledger's fragments are
all the same file.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jobs.rehearsal import describe_rehearsal
from pipeline import ledger
from pipeline.account import close_books, take_account, units_left
from pipeline.buckets import Bucket
from pipeline.controller import Controller, Policy
from pipeline.engine import Event, UnitDone, WorkerReady, run
from pipeline.generation import Generation, Line, to_parquet
from pipeline.ledger import WRITTEN, LedgerRow
from pipeline.plan import Unit, load_plan
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage
from pipeline.store import Header, write_header
from pipeline.unit_job import UnitReport

Json = dict[str, Any]
Result = TypeVar("Result")
UNIT_ROWS = 64
_SHARD_CLIPS = 1000
_LINKS_PER_FILE = 50_000  # file systems bound the names of one file
_BUCKET = Bucket(17, 256, 256)
_SOURCE = "rehearsal:4x8x8x16@50"
_RECIPE = Recipe(describe_rehearsal(_SOURCE), encode=EncodeConfig(batch_size=4, unit_rows=UNIT_ROWS))


def make_plan(directory: Path, units: int, _: int) -> Json:
    """Write the plan of a store with that many units."""
    clips = units * UNIT_ROWS
    lines = tuple(
        Line(_shard(first), _BUCKET, "planned", "", first, min(_SHARD_CLIPS, clips - first))
        for first in range(0, clips, _SHARD_CLIPS)
    )
    storage = LocalStorage(directory)
    generation = Generation.of(0, lines, _RECIPE)
    storage.put(generation.name, to_parquet(generation))
    write_header(storage, Header(_RECIPE, _SOURCE))
    return {"lines": len(lines)}


def _shard(first_row: int) -> ShardRef:
    return ShardRef(f"s3://bucket/videos/2026/shard-{first_row // _SHARD_CLIPS:06d}.tar", 10**9, f"{first_row:032x}")


def drive(directory: Path, units: int, workers: int) -> Json:
    """Load the plan, then lease all its units to fake workers."""
    (plan, load_seconds), plan_mib = _grown(lambda: _timed(lambda: load_plan(LocalStorage(directory), _RECIPE)))
    controller = Controller(plan.units(), Policy())
    seconds, loop_mib = _grown(lambda: _run(controller, workers))
    assert controller.progress.units == units
    return {
        "load_seconds": load_seconds,
        "plan_mib": plan_mib,
        "seconds_per_unit": seconds / units,
        "loop_mib": loop_mib,
    }


def _run(controller: Controller, workers: int) -> float:
    return _timed(
        lambda: run(
            controller,
            _FakeEngine(),
            num_workers=workers,
            unit_timeout_seconds=3600.0,
            stop=threading.Event(),
            on_tick=lambda _: None,
        )
    )[1]


class _FakeEngine:
    """Workers without work: a unit is done when it is submitted, and `wait` tells of one event at a time."""

    places: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (the protocol's property; nobody writes it)

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._started = 0

    def start_worker(self) -> str:
        self._started += 1
        name = f"encode-{self._started:08x}"
        self._events.append(WorkerReady(name))
        return name

    def submit(self, worker: str, unit: Unit) -> None:
        report = UnitReport(unit, UNIT_ROWS, {}, (), UNIT_ROWS * 17, 1, 1, won=True, encode_seconds=1.0)
        self._events.append(UnitDone(worker, report))

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        return [self._events.popleft()] if self._events else []

    def kill_worker(self, worker: str) -> None:
        raise AssertionError(f"{worker} does not hang")

    def close(self) -> None:
        self._events.clear()


def make_ledger(directory: Path, units: int, _: int) -> Json:
    """Write the fragments of all units, as names of one file."""
    storage = LocalStorage(directory)
    plan = load_plan(storage, _RECIPE)
    data = ledger.to_parquet([_row(number) for number in range(UNIT_ROWS)], plan.generations[0].fingerprint)
    for number, unit in enumerate(plan.units()):
        path = directory / ledger.unit_name(unit)
        if number % _LINKS_PER_FILE == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            first = path
        else:
            path.hardlink_to(first)
    return {"fragment_bytes": len(data), "units": units}


def _row(number: int) -> LedgerRow:
    return LedgerRow(
        key=f"{number:09d}",
        shard=_shard(0).url,
        member=f"{number:09d}.mp4",
        offset=512 * number,
        status=WRITTEN,
        row=number,
        num_frames=17,
        valid_frames=17,
        pts_seconds=tuple(frame / 25 for frame in range(17)),
        decoder="pyav",
        kind="video",
        caption=f"a video of about as many words as people write, number {number}",
        checksum=f"{number * 2**97 + number:032x}",
        minimum=-1.0 - number,
        maximum=1.0 + number,
        channel_mean=tuple(number / 7 + channel for channel in range(16)),
        channel_variance=tuple(number / 11 + channel + 1 for channel in range(16)),
    )


def keep_books(directory: Path, units: int, _: int) -> Json:
    """What a job does with the ledger of a finished store: count it, look for units left, close it, count again."""
    storage = LocalStorage(directory)
    plan = load_plan(storage, _RECIPE)
    steps: dict[str, Callable[[], object]] = {
        "count": lambda: take_account(storage, plan),
        "list": lambda: _none_left(units_left(storage, plan)),
        "close": lambda: close_books(storage, plan),
        "count again": lambda: take_account(storage, plan, max_failures=10),
    }
    seconds, mib = _grown(lambda: {name: _timed(work)[1] / units for name, work in steps.items()})
    return {"seconds_per_unit": seconds, "books_mib": mib}


def _none_left(left: Iterator[Unit]) -> None:
    assert next(left, None) is None


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def _grown(work: Callable[[], Result]) -> tuple[Result, float]:
    """The work's result, and by how many MiB this process was larger at its largest than before."""
    before = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    result = work()
    return result, max(0.0, _status_mib("VmHWM") - before)


def _status_mib(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


STEPS: dict[str, Callable[[Path, int, int], Json]] = {
    "plan": make_plan,
    "drive": drive,
    "ledger": make_ledger,
    "books": keep_books,
}


def main() -> None:
    """Do one step and end."""
    asked = json.load(sys.stdin)
    step = STEPS[asked["step"]]
    print(json.dumps(step(Path(asked["directory"]), asked["units"], asked["workers"])))


if __name__ == "__main__":
    main()
