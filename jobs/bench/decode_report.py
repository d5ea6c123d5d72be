"""The decode benchmark's result as Markdown, with what it shows against the goals.

In:   the result that is also written as JSON.
Out:  Markdown.
Cost: none.
Errors: KeyError for another result.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Json = dict[str, Any]
Verdict = Literal["no", "within the spread", "yes"]
_VERDICTS: tuple[Verdict, ...] = ("no", "within the spread", "yes")
_BACK_ENDS = ("pyav", "decord", "torchcodec")


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median over rounds, between the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From one value per round."""
        return cls(statistics.median(values), min(values), max(values))

    @property
    def negated(self) -> Spread:
        """Of the values below zero."""
        return Spread(0.0 - self.median, 0.0 - self.high, 0.0 - self.low)

    def reaches(self, goal: float) -> Verdict:
        """Whether all rounds are at the goal or above, or none is, or the goal lies within what they differ by."""
        return "yes" if self.low >= goal else "no" if self.high < goal else "within the spread"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Goal:
    """What was wanted, and the worst row's measurement and verdict."""

    name: str
    measured: Spread
    wanted: float
    verdict: Verdict

    @classmethod
    def at_least(cls, name: str, wanted: float, rows: Sequence[Spread]) -> Goal:
        """Every row is to be `wanted` or more."""
        worst = min(rows, key=lambda row: (_VERDICTS.index(row.reaches(wanted)), row.median))
        return cls(name, worst, wanted, worst.reaches(wanted))

    @classmethod
    def at_most(cls, name: str, wanted: float, rows: Sequence[Spread]) -> Goal:
        """Every row is to be `wanted` or less."""
        turned = cls.at_least(name, -wanted, [row.negated for row in rows])
        return cls(name, turned.measured.negated, wanted, turned.verdict)


def to_markdown(result: Json) -> str:
    """The whole page."""
    return "\n".join([*_head(result["about"]), *_goals(result), *_rows(result["rows"]), *_long(result)]) + "\n"


def _head(about: Json) -> Iterator[str]:
    yield "# Decode benchmark"
    yield ""
    yield f"- command: `{about['command']}`"
    yield f"- date: {about['date']}, commit {about['commit']}"
    yield f"- hardware: {about['hardware']}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
    yield f"- medians of {about['repetitions']} rounds, in which the methods took turns in rotating order on a machine"
    yield "  that others used as well, so speeds are wanted frames per second of CPU time, every method on one thread"
    yield "- ratios are taken within each round; in brackets the least and the most of all rounds. A goal in"
    yield "  between is neither met nor missed: `auto` runs the code of the back end that it chooses, so it can reach"
    yield "  1.00 at most"
    yield "- few: two windows of 8 in the second half of the video; all: every frame. Loops are what people write:"
    yield "  decord `get_batch` and PyAV's full decode, both resized with torch (bicubic, antialias)"
    yield ""


def goals(result: Json) -> list[Goal]:
    """The worst row counts."""
    rows, (short, long) = result["rows"], result["memory"]
    few = result["long"]["four windows"]["auto"]
    growth = [long[kind]["peak_mib"] / short[kind]["peak_mib"] - 1 for kind in ("four windows", "all in pieces")]
    everything = [result["long"]["all"]["cpu_seconds"] / seconds for seconds in few["rounds"]]
    return [
        Goal.at_least("auto / best back end", 1.0, [against(row, _BACK_ENDS) for row in rows]),
        Goal.at_least("auto / best loop", 1.5, [against(row, _loops(row)) for row in rows]),
        Goal.at_least("all of a long video / 4 windows of it", 10.0, [Spread.of(everything)]),
        Goal.at_most("growth of peak memory, short to long", 0.10, [Spread.of([value]) for value in growth]),
        Goal.at_most("hand-over / decode time", 0.05, [handover(row) for row in result["handover"]]),
    ]


def against(row: Json, names: Sequence[str]) -> Spread:
    """The speed of `auto` over that of the fastest of these methods, round by round."""
    cells = row["cells"]
    best = max((name for name in names if name in cells), key=lambda name: _speed(cells[name]))
    if not _speed(cells["auto"]):
        return Spread.of([0.0])
    if not _speed(cells[best]):
        return Spread.of([float("inf")])
    return Spread.of([b / a for a, b in zip(cells["auto"]["rounds"], cells[best]["rounds"], strict=True)])


def handover(row: Json) -> Spread:
    """How much longer a decode process takes than this process, as a share, round by round."""
    pairs = zip(row["in_process"], row["decode_process"], strict=True)
    return Spread.of([there / here - 1 for here, there in pairs])


def _loops(row: Json) -> list[str]:
    return [name for name in row["cells"] if name.startswith("loop")]


def _speed(cell: Json) -> float:
    return float(cell["frames"] / cell["cpu_seconds"]) if "frames" in cell else 0.0


def _goals(result: Json) -> Iterator[str]:
    yield from ("| goal | worst row | wanted | met |", "|---|---|---|---|")
    for goal in goals(result):
        yield f"| {goal.name} | {goal.measured} | {goal.wanted:g} | {goal.verdict} |"
    yield ""


def _rows(rows: list[Json]) -> Iterator[str]:
    names = list(rows[0]["cells"])
    yield f"| codec | size | wanted | {' | '.join(names)} | auto / best | auto / loops |"
    yield "|" + "---|" * (len(names) + 5)
    for row in rows:
        cells = " | ".join(_cell(row["cells"][name]) for name in names)
        ratios = f"{against(row, _BACK_ENDS)} | {against(row, _loops(row))}"
        yield f"| {row['codec']} | {row['height']}p | {row['wanted']} | {cells} | {ratios} |"
    yield ""
    yield "Cells: frames per CPU second, and peak resident MiB of the process."
    yield ""


def _cell(cell: Json) -> str:
    return f"{_speed(cell):.0f}, {cell['peak_mib']:.0f} MiB" if "frames" in cell else f"- ({cell['error'][:40]})"


def _long(result: Json) -> Iterator[str]:
    long = result["long"]
    yield f"## {long['minutes']:g} minutes of {long['height']}p: 4 windows of 16 frames, or all"
    yield ""
    yield from ("| what | CPU seconds | wall seconds | peak MiB |", "|---|---|---|---|")
    cells = {f"4 windows, {name}": cell for name, cell in long["four windows"].items()}
    cells["all, in pieces"] = long["all"]
    for name, cell in cells.items():
        yield f"| {name} | {cell['cpu_seconds']:.3f} | {cell['wall_seconds']:.3f} | {cell['peak_mib']:.0f} |"
    yield ""
    yield "## Peak memory of a fresh process and length"
    yield ""
    yield "What grows is FFmpeg's index of an mp4: up to 100 bytes per frame while it opens the file."
    yield ""
    yield from ("| minutes | 4 windows, MiB | all in pieces, MiB |", "|---|---|---|")
    for row in result["memory"]:
        four, pieces = row["four windows"]["peak_mib"], row["all in pieces"]["peak_mib"]
        yield f"| {row['minutes']:g} | {four:.1f} | {pieces:.1f} |"
    yield ""
    yield "## Hand-over: 3 windows of 17 frames at 256 x 256, wall seconds"
    yield ""
    yield from ("| size | in this process | from a decode process | more |", "|---|---|---|---|")
    for row in result["handover"]:
        here, there = (statistics.median(row[name]) for name in ("in_process", "decode_process"))
        yield f"| {row['height']}p | {here:.4f} | {there:.4f} | {_percent(handover(row))} |"


def _percent(spread: Spread) -> str:
    return f"{spread.median:+.1%} ({spread.low:+.1%} to {spread.high:+.1%})"
