"""What a job says at its end: where the time went, and what would make it faster."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import progress as progress_module
from jobs.__main__ import main
from jobs.flags import EngineFlags
from jobs.progress import Reporter, advice, format_seconds, time_lines
from jobs.start_times import StartTimes, process_seconds
from pipeline.controller import Controller, Policy, Progress
from pipeline.engine import UnitDone, WorkerLost, WorkerReady
from pipeline.errors import UnitError
from pipeline.storage import LocalStorage
from tests.fakes import write_numbered_shards
from tests.pipeline.test_controller import report, units


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ({"encode": 98, "starved": 1, "blocked": 1}, "encode-bound: the encoders were busy 98% of the time"),
        (
            {"encode": 25, "starved": 70, "blocked": 5, "decode": 100},  # 4 cores would do, and 1 was at work
            "decode-bound: the encoders waited 75% of the time, .* about 6 more decode cores would keep them busy",
        ),
        ({"encode": 90, "starved": 10, "decode": 50}, "decode-bound: .* about 1 more decode core would keep"),
        ({"encode": 50, "starved": 40, "decode": 30, "read": 31}, "read-bound: the encoders waited 44% of the time"),
        ({"encode": 50, "starved": 10, "blocked": 40}, "write-bound: the encoders waited 50% of the time"),
        ({"encode": 60, "starved": 10, "blocked": 10, "copy": 20}, "copy-bound: the encoders waited 40% of the time"),
        ({}, "nothing was encoded, so nothing is known of its speed"),  # every clip failed
        ({"starved": 10, "decode": 30}, "nothing was encoded, so nothing is known of its speed"),
    ],
)
def test_advice_follows_the_seconds(seconds: dict[str, int], line: str) -> None:
    progress = Progress(units=1, **{f"{stage}_seconds": float(value) for stage, value in seconds.items()})  # type: ignore[arg-type]
    assert re.match(line, advice(progress, workers=2))


@pytest.mark.parametrize(("at_work", "told"), [(70, "feed-bound"), (75, "decode-bound")])  # cores of 12
def test_advice_to_feed_decoders_that_are_idle(at_work: int, told: str) -> None:
    seconds = {"encode": 10.0, "starved": 10.0, "decode": 0.9 * at_work, "read": 0.1 * at_work}
    progress = Progress(units=1, **{f"{stage}_seconds": value for stage, value in seconds.items()})  # type: ignore[arg-type]
    line = advice(progress, workers=2, processes=12)
    assert line.startswith(f"{told}: the encoders waited 50% of the time, most of it for frames")
    assert advice(progress, workers=2).startswith("decode-bound")
    if told == "feed-bound":
        assert "of 12 decode processes 7.0 were at work; a larger --window-mb or --units-in-flight" in line


@pytest.mark.parametrize(("at_work", "told"), [(3.7, "balanced"), (3.5, "encode-bound")])  # of 4
def test_advice_where_decoding_and_encoding_are_both_at_their_limit(at_work: float, told: str) -> None:
    seconds = {"encode": 98.0, "starved": 2.0, "decode": 45 * at_work, "read": 5 * at_work}
    progress = Progress(units=1, **{f"{stage}_seconds": value for stage, value in seconds.items()})  # type: ignore[arg-type]
    line = advice(progress, workers=2, processes=4)
    assert line.startswith(f"{told}: the encoders were busy 98% of the time")
    if told == "balanced":
        assert line.endswith("and of 4 decode processes 3.7; more of both would help")
    assert advice(progress, workers=2).startswith("encode-bound")


def test_shares_are_of_the_encoders_span() -> None:
    progress = Progress(
        encode_seconds=60.0, starved_seconds=20.0, blocked_seconds=15.0, copy_seconds=5.0, write_seconds=33.0,
        decode_seconds=44.0, read_seconds=11.0, start_seconds=9.0, batch_seconds=7.0, rows_seconds=8.0,
    )  # fmt: skip
    shares, stages = time_lines(progress, has_own_device=True)
    waits = "starved for input 20.0%, blocked on output 15.0%, copying 5.0%"
    assert shares == f"encoder busy 60.0% of its span, so at 0.60 of the bare encoder's speed: {waits}"
    reach = "what it would reach on these cores if it never waited"
    shares, _ = time_lines(progress, has_own_device=False)
    assert shares == f"encoder busy 60.0% of its span, so at 0.60 of {reach}: {waits}"
    assert stages == (
        "stages: wait for bytes or a core 11.0 s, decode 44.0 s, wait for the first frames 9.0 s, "
        "wait for input 20.0 s, batch 7.0 s, encode 60.0 s, rows 13.0 s, wait for output 15.0 s, "
        "write and commit 33.0 s"
    )


def test_steps_of_the_start_are_told_once_each() -> None:
    clock = iter([2.0, 2.5, 7.5, 9.0])
    times = StartTimes(lambda: next(clock))
    for step in ("imports", "index", "index", "worker"):
        times.reach(step)
    assert times.steps == {"imports": 2.0, "index": 0.5, "worker": 6.5}
    assert times.total == 9.0


def test_the_age_of_this_process_grows() -> None:
    before = process_seconds()
    time.sleep(0.05)
    assert 0 < before < process_seconds() - 0.04 < before + 5


def test_a_job_tells_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_numbered_shards(tmp_path / "shards", 1, 3)
    store = tmp_path / "store"
    recipe = ["--encoder", "rehearsal:4x8x8x16@2", "--frames", "9", "--sizes", "32x32", "--unit-rows", "4"]
    assert main(["encode", str(shard), "--store", str(store), *recipe, "--local"]) == 0
    told = capsys.readouterr().err
    for line in (
        "done: 1 units, 3 clips",
        "first unit committed",
        r"encoder busy [\d.]+% of its span, so at [\d.]+ of the bare encoder's speed: ",  # a rehearsal's
        "stages: ",
        r"(\w+-bound|balanced): ",
    ):
        assert re.search(f"^encode: {line}", told, re.MULTILINE)
    (log,) = (json.loads(path.read_text()) for path in store.glob("runs/*.json"))
    assert list(log["start_seconds"]) == ["imports", "index", "plan", "encoder", "worker", "first unit"]
    progress = log["progress"]
    assert progress["encode_seconds"] >= 4 * 9 * 32 * 32 / 2e6  # a slice of four clips at two megapixels per second
    assert min(progress[f"{stage}_seconds"] for stage in ("decode", "start", "batch", "rows", "write")) > 0
    assert log["first_unit_seconds"] <= log["seconds"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.24, "4.2 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min"), (59.6, "1 min 00 s")]
)
def test_seconds_are_told_as_people_do(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Told:
    """A Reporter with a clock of its own, and the lines it has said since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path) -> None:
        self.now, self._capsys, self._storage = 0.0, capsys, storage
        monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.controller = Controller(units(2), Policy())
        flags = EngineFlags(workers=8, progress_seconds=10)
        self.reporter = Reporter(
            LocalStorage(storage), flags, "cuda", self.controller, clips_left=10, units_left=2,
            start_times=StartTimes(lambda: self.now),
        )  # fmt: skip

    def lines(self) -> list[str]:
        return [line.removeprefix("encode: ") for line in self._capsys.readouterr().err.splitlines()]

    def tick(self, now: float, *events: WorkerReady | WorkerLost | UnitDone) -> list[str]:
        self.now = now
        self.reporter.tick(events)
        return self.lines()

    def commit(self, written: int = 4, **failed: int) -> UnitDone:
        unit = self.controller.lease("w0")
        assert unit
        done = report(unit, written, **failed)
        if not written:
            done = dataclasses.replace(done, encode_seconds=0.0)
        self.controller.done("w0", done)
        return UnitDone("w0", done)

    def log(self) -> dict[str, object]:
        (path,) = (self._storage / "runs").glob("*.json")
        return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Told:
    return Told(monkeypatch, capsys, tmp_path)


NONE_READY = ["no worker is ready: does the cluster have the CPUs and GPUs for one? (`ray status`)"]


def test_workers_and_progress_are_told_as_they_come(told: Told) -> None:
    assert told.tick(5, WorkerReady("w0")) == ["worker w0 is ready after 5.0 s"]
    done = told.commit(4, crash=1)
    assert told.tick(8, done) == []
    (line,) = told.tick(10)
    assert line == ("1 of 2 units, 5 of 10 clips, 0.5 clips/s, 4 frames/s, encoder busy 50%, failed 1, ETA 10.0 s")
    assert told.tick(19) == []
    assert told.tick(20, WorkerLost("w0", "signal 9")) == [
        "worker w0 died, another takes its units: signal 9",
        "1 of 2 units, 5 of 10 clips, 0.2 clips/s, 2 frames/s, encoder busy 50%, failed 1, ETA 20.0 s",
    ]


def test_a_job_without_a_worker_says_so_from_the_start_and_after_the_last_was_lost(told: Told) -> None:
    assert told.tick(59) == []
    assert told.tick(60) == NONE_READY
    assert told.tick(119) == []
    assert told.tick(120) == NONE_READY
    told.tick(130, WorkerReady("w0"), WorkerReady("w1"))
    told.tick(131, told.commit())
    told.tick(300, WorkerLost("w1", "signal 9"))
    assert NONE_READY[0] not in told.tick(400)
    told.tick(401, WorkerLost("w0", "signal 9"))
    lines = [line for second in range(402, 460) for line in told.tick(second)]
    assert len(lines) > 4  # the progress
    assert not set(NONE_READY) & set(lines)
    assert NONE_READY[0] in told.tick(460)


def test_the_run_log_holds_a_failure_with_all_that_is_known(told: Told) -> None:
    """Every clip of it failed before the encoder, and nothing was encoded."""
    told.tick(2, WorkerReady("w0"))
    told.tick(3, told.commit(0, timeout=5))
    told.now = 4.0
    told.reporter.finish("stopped by FailureLimitError", {"w0": {"node": "n"}})
    lines = told.lines()
    assert lines[0].startswith("stopped by FailureLimitError: 1 units, 5 clips in 4.0 s (1.2 clips/s")
    assert lines[-1].startswith("nothing was encoded")
    log = told.log()
    assert (log["outcome"], log["device"], log["workers"]) == (
        "stopped by FailureLimitError", "cuda", {"w0": {"node": "n"}},
    )  # fmt: skip
    assert log["flags"]["workers"] == 8  # type: ignore[index]


@pytest.mark.parametrize(("device", "bare"), [("cpu", False), ("cuda", True)])
def test_only_on_a_device_of_its_own_an_encoder_is_compared_with_the_bare_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, bare: bool
) -> None:
    controller = Controller(units(1), Policy())
    reporter = Reporter(LocalStorage(tmp_path), EngineFlags(), device, controller, 10, 1, StartTimes())
    reporter.tick([UnitDone("w0", report(next(iter(units(1)))))])
    reporter.finish("done", {})
    assert ("of the bare encoder's speed" in capsys.readouterr().err) == bare


def test_a_run_log_that_cannot_be_written_hides_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*_: object) -> None:
        raise UnitError("503 Service Unavailable")

    monkeypatch.setattr(LocalStorage, "put", put)
    told.now = 4.0
    told.reporter.finish("stopped by Interrupted", {})
    first, last = told.lines()
    assert first.startswith("stopped by Interrupted")
    assert last == "no run log: 503 Service Unavailable"


def test_advice_counts_the_workers_that_ran_at_a_time(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the eight that were asked for."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(progress_module, "advice", lambda _, workers, processes: seen.append((workers, processes)))
    told.tick(1, WorkerReady("w0"), WorkerReady("w1"))
    told.tick(2, WorkerLost("w1", "signal 9"), WorkerReady("w2"))
    told.tick(3, told.commit())
    told.reporter.finish("done", {})
    assert seen == [(2, 0)]


@pytest.mark.parametrize(
    ("flags", "units_left", "expected"),
    [
        ({"workers": 2}, 12, 7),
        ({"workers": 2}, 11, 0),  # all of the job is start and end
        ({"local": True, "decode_workers": 5}, 12, 5),
    ],
)
def test_decode_processes_are_those_that_had_enough_to_do(
    tmp_path: Path, flags: dict[str, Any], units_left: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(progress_module, "advice", lambda _, workers, processes: seen.append(processes))
    reporter = Reporter(
        LocalStorage(tmp_path),
        EngineFlags(**flags),
        "cpu",
        Controller(units(1), Policy()),
        10,
        units_left,
        StartTimes(),
    )
    done = report(next(iter(units(1))))
    reporter.tick([WorkerReady("w0"), WorkerReady("w1"), UnitDone("w0", done)])
    reporter.finish(
        "done", {"w0": {"decode_processes": 4}, "w1": {"decode_processes": 3}, "w2": {"decode_processes": None}}
    )
    assert seen == [expected]
