"""What every back end makes of every kind of input: the questions, and the table of answers.

In:   the cases of tests/conformance_cases.py and conformance_broken.py; the back ends that are installed, each in a
      decode process of its own.
Out:  an Answer per input and back end. `python -m tests.conformance --write` measures speed and memory too and writes
    pipeline/decode/conformance.json, which `--decoder auto` reads, and the tables of pipeline/README.md.
Cost: questions about 20 s per back end; `--write` some minutes.
Errors: a wrong answer is an Answer; only a back end that cannot be loaded raises.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.decode.choice import TABLE_PATH, Answer, Row, Table, Verdict
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import (
    ClipShape,
    DecodedClip,
    DecodeOutcome,
    DecodeRequest,
    DecoderName,
    Grid,
    MediaSource,
    Window,
)
from pipeline.errors import DecodeError
from tests.clips import read_number, stored
from tests.colours import read_chart
from tests.conformance_broken import BROKEN, BrokenCase
from tests.conformance_cases import CASES, Case

COMMAND = "python -m tests.conformance --write"
README = Path(__file__).parents[1] / "pipeline" / "README.md"
VIDEO_BACKENDS: tuple[DecoderName, ...] = ("pyav", "decord", "torchcodec")
COLOUR_TOLERANCE = 6.0  # of 255, for the mean of a patch
LIMITS = DecodeLimits(timeout_seconds=30)
_BEGIN, _END = "<!-- conformance -->", "<!-- /conformance -->"
_SEVERITY: tuple[Verdict, ...] = ("exact", "unsupported", "error", "crash", "wrong")
_CRASHES = ("crash", "timeout", "out_of_memory")
_PTS_TOLERANCE = 0.0011  # containers that count in milliseconds
_FPS = (Fraction(10), Fraction(30000, 1001), Fraction(60))


@dataclasses.dataclass(frozen=True)
class Asker:
    """One back end in a process that can be killed."""

    backend: str
    process: DecodeProcess

    def decode(
        self, source: MediaSource, shape: ClipShape, windows: Sequence[tuple[int, int]], fps: Fraction | None = None
    ) -> tuple[DecodeOutcome, ...]:
        """One outcome per (start, num_frames)."""
        decoder: DecoderName = "auto" if self.backend == "pillow" else self.backend  # type: ignore[assignment]
        chosen = tuple(Window(*window) for window in windows)
        return self.process.decode(DecodeRequest(source, Grid(fps), chosen, shape, decoder))

    def ask(self, case: Case, source: MediaSource) -> Answer:
        """The worst answer to all questions about a sound input, and the first question that it was given to."""
        return _worst(_questions(self, case, source))

    def ask_broken(self, case: BrokenCase, folder: Path) -> Answer:
        """`exact` when every outcome is a clear error or shows the right frames."""
        return _worst(_broken_questions(self, case, folder))


_Reply = tuple[str, Verdict]


def _worst(replies: Iterator[_Reply]) -> Answer:
    question, verdict = max(replies, key=lambda reply: _SEVERITY.index(reply[1]))  # the first among equals
    return Answer(verdict, "" if verdict == "exact" else question)


def _questions(asker: Asker, case: Case, source: MediaSource) -> Iterator[_Reply]:
    last = len(case.numbers) - 1
    yield "all frames in order", _judged(case, asker.decode(source, case.shape, [(0, last + 1)])[0], range(last + 1))
    windows = [(last * 2 // 3, 3), (0, 2), (last // 3, 5), (last, 1)]
    windows = [(start, min(count, last + 1 - start)) for start, count in windows]
    for (start, count), outcome in zip(windows, asker.decode(source, case.shape, windows), strict=True):
        yield "windows out of order", _judged(case, outcome, range(start, start + count))
    yield "the last frame", _judged(case, asker.decode(source, case.shape, [(last, 1)])[0], range(last, last + 1))
    inside, across, outside = asker.decode(source, case.shape, [(last, 1), (last, 2), (last + 3, 1)])
    yield "past the end", _judged(case, inside, range(last, last + 1))
    yield "past the end", _judged_past_end(across)
    yield "past the end", _judged_past_end(outside)
    for fps in _FPS if case.kind == "video" else ():
        taken = _on_screen(case.pts_seconds, fps)
        for start in {0, len(taken) // 2, max(0, len(taken) - 3)}:
            window = (start, min(6, len(taken) - start))
            outcome = asker.decode(source, case.shape, [window], fps)[0]
            yield f"{float(fps):.3g} frames per second", _judged(case, outcome, taken[start : start + window[1]])
    yield "its count of frames", _judged_info(asker, case, source)


def _on_screen(pts_seconds: Sequence[float], fps: Fraction) -> list[int]:
    """The frame at each position of an fps grid, up to the last frame's time; a rounded pts is still in time."""
    length = math.floor(pts_seconds[-1] * fps) + 1
    return [
        max(i for i, pts in enumerate(pts_seconds) if pts <= k / float(fps) + _PTS_TOLERANCE / 2) for k in range(length)
    ]


def _judged(case: Case, outcome: DecodeOutcome, expected: Sequence[int]) -> Verdict:
    """Whether a window shows the expected frames of the case, at their times, in their colours."""
    if isinstance(outcome, DecodeError):
        return _verdict(outcome)
    try:
        numbers = [case.read(frame) for frame in outcome.frames]
    except ValueError:
        return "wrong"
    times = np.array([case.pts_seconds[i] for i in expected])
    right = (
        numbers == [case.numbers[i] for i in expected]
        and np.abs(outcome.pts_seconds - times).max() <= _PTS_TOLERANCE
        and (case.colours is None or _colours_are_right(case, outcome))
    )
    return "exact" if right else "wrong"


def _colours_are_right(case: Case, clip: DecodedClip) -> bool:
    return all(np.abs(read_chart(frame) - case.colours).max() <= COLOUR_TOLERANCE for frame in clip.frames)


def _judged_past_end(outcome: DecodeOutcome) -> Verdict:
    if isinstance(outcome, DecodedClip):
        return "wrong"
    return "exact" if outcome.reason == "past_end" else _verdict(outcome)


def _judged_info(asker: Asker, case: Case, source: MediaSource) -> Verdict:
    try:
        info = asker.process.probe(source)
    except DecodeError as error:
        return _verdict(error)
    found = (info.num_frames, info.container, info.codec, info.interlaced)
    return "exact" if found == (len(case.numbers), case.container, case.codec, case.interlaced) else "wrong"


def _verdict(error: DecodeError) -> Verdict:
    if error.reason in _CRASHES:
        return "crash"
    return "unsupported" if error.reason.startswith("unsupported") else "error"


def _broken_questions(asker: Asker, case: BrokenCase, folder: Path) -> Iterator[_Reply]:
    for number, data in enumerate(case.make()):
        source = stored(folder, data, case.kind)
        windows = [(0, 3), (12, 4), (26, 4)] if case.kind == "video" else [(0, 1)]
        outcomes = asker.decode(source, ClipShape(64, 64), windows)
        sampled = asker.decode(source, ClipShape(64, 64), [(5, 2)], Fraction(25))
        for (start, _), outcome in zip([*windows, (5, 2)], [*outcomes, *sampled], strict=True):
            yield f"number {number}", _judged_broken(outcome, start)


def _judged_broken(outcome: DecodeOutcome, start: int) -> Verdict:
    if isinstance(outcome, DecodeError):
        return "crash" if outcome.reason in _CRASHES else "exact"
    try:
        numbers = [read_number(frame) for frame in outcome.frames]
    except ValueError:
        return "wrong"
    # Where frames are missing, the others are right when they come with their own times.
    told = zip(numbers, range(start, start + len(numbers)), outcome.pts_seconds, strict=True)
    return "exact" if all(number in (position, round(pts * 25)) for number, position, pts in told) else "wrong"


def ask_all(backend: str, folder: Path) -> Iterator[tuple[str, Answer]]:
    """(name of the case, answer) for every case that the back end is asked about."""
    with DecodeProcess(LIMITS) as process:
        asker = Asker(backend, process)
        for case in CASES:
            if _concerns(backend, case):
                yield case.name, asker.ask(case, stored(folder, case.make(), case.kind, case.name))
        for broken in BROKEN:
            if _concerns(backend, broken):
                yield broken.name, asker.ask_broken(broken, folder)


def _concerns(backend: str, case: Case | BrokenCase) -> bool:
    return (backend == "pillow") == (case.kind == "image" or case.container == "webp")


def measured(backend: str, source: MediaSource) -> Answer:
    """With the frames per second of a warm process, and the peak MiB of one that decoded nothing else."""
    with DecodeProcess(LIMITS) as process:
        asker, shape, seconds = Asker(backend, process), ClipShape(180, 320), []
        count = process.probe(source).num_frames
        asker.decode(source, shape, [(0, 1)])
        for _ in range(2):
            begin = time.perf_counter()
            (outcome,) = asker.decode(source, shape, [(0, count)])
            seconds.append(time.perf_counter() - begin)
            if isinstance(outcome, DecodeError):
                return Answer(_verdict(outcome), "a larger file")
        status = Path(f"/proc/{process.pid}/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return Answer("exact", "", _two_digits(count / min(seconds)), _two_digits(int(peak) / 1024))


def _two_digits(value: float) -> int:
    places = 1 - math.floor(math.log10(value))
    return round(round(value, places))


def versions() -> dict[str, str]:
    """What the answers hang on."""
    found = {name: importlib.metadata.version(name) for name in ("av", "decord", "pillow", "torchcodec")}
    ffmpeg = {"av": av.library_versions["libavcodec"]}
    from torchcodec._core import get_ffmpeg_library_versions

    ffmpeg["torchcodec"] = get_ffmpeg_library_versions()["libavcodec"]
    return found | {f"libavcodec of {name}": ".".join(map(str, version)) for name, version in ffmpeg.items()}


def full_table(folder: Path) -> Table:
    """Every answer, with speed and memory where it is `exact`."""
    answers = {backend: dict(ask_all(backend, folder)) for backend in (*VIDEO_BACKENDS, "pillow")}
    rows = []
    for case in (*CASES, *BROKEN):
        cells = {}
        large = stored(folder, case.make_large(), case.kind, case.name) if isinstance(case, Case) else None
        for backend, given in answers.items():
            if (answer := given.get(case.name)) is None:
                continue
            if answer.verdict == "exact" and large is not None:
                answer = measured(backend, large)
            cells[backend] = answer
        rows.append(Row(case.container, case.codec, case.feature, isinstance(case, BrokenCase), cells))
    return Table(versions(), tuple(rows))


def as_markdown(table: Table) -> str:
    """The table for people."""
    lines = [
        "Made by `" + COMMAND + "` with " + ", ".join(f"{k} {v}" for k, v in table.versions.items()) + ".",
        "",
        *_markdown_rows([row for row in table.rows if not row.broken], (*VIDEO_BACKENDS, "pillow")),
        "",
        "Damaged and foreign inputs; `exact` means: every window is a clear error or shows the right frames.",
        "",
        *_markdown_rows([row for row in table.rows if row.broken], (*VIDEO_BACKENDS, "pillow")),
    ]
    return "\n".join(lines) + "\n"


def _markdown_rows(rows: Sequence[Row], backends: Sequence[str]) -> Iterator[str]:
    yield "| container | codec | input | " + " | ".join(backends) + " |"
    yield "|---" * (3 + len(backends)) + "|"
    for row in rows:
        cells = " | ".join(_markdown_cell(row.answers.get(backend)) for backend in backends)
        yield f"| {row.container} | {row.codec} | {row.feature} | {cells} |"


def _markdown_cell(answer: Answer | None) -> str:
    if answer is None:
        return ""
    if answer.verdict == "exact":
        return f"exact, {answer.frames_per_second}/s, {answer.peak_mib} MiB" if answer.frames_per_second else "exact"
    return answer.verdict if answer.verdict == "unsupported" else f"{answer.verdict}: {answer.question}"


def main() -> None:
    """Entry point of `python -m tests.conformance`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table instead of printing it")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        table = full_table(Path(folder))
    markdown = as_markdown(table)
    if not write:
        print(markdown)  # noqa: T201
        return
    TABLE_PATH.write_text(table.to_json())
    head, rest = README.read_text().split(_BEGIN)
    README.write_text(f"{head}{_BEGIN}\n{markdown}{_END}{rest.split(_END)[1]}")


if __name__ == "__main__":
    main()
