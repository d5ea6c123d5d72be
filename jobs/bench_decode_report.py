"""The decode benchmark's result as Markdown, with what it shows against the goals.

In:   the result that is also written as JSON.
Out:  Markdown.
Cost: none.
Errors: KeyError for another result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
_BACK_ENDS = ("pyav", "decord", "torchcodec")


def to_markdown(result: Json) -> str:
    """The whole page."""
    return "\n".join([*_head(result["about"]), *_goals(result), *_rows(result["rows"]), *_long(result)]) + "\n"


def _head(about: Json) -> Iterator[str]:
    yield "# Decode benchmark"
    yield ""
    yield f"- command: `{about['command']}`"
    yield f"- date: {about['date']}"
    yield f"- hardware: {about['hardware']}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
    yield f"- medians of {about['repetitions']} repetitions; within a row the methods took turns on a machine that"
    yield "  others used as well, so speeds are wanted frames per second of CPU time, every method on one thread"
    yield "- few: two windows of 8 in the second half of the video; all: every frame. Loops are what people write:"
    yield "  decord `get_batch` and PyAV's full decode, both resized with torch (bicubic, antialias)"
    yield ""


def goals(result: Json) -> list[tuple[str, float, float, bool]]:
    """(goal, what was measured, what was wanted, whether that is met); the worst row counts."""
    against_best = [_speed(row["cells"]["auto"]) / _best(row, _BACK_ENDS) for row in result["rows"]]
    loops = [name for name in result["rows"][0]["cells"] if name.startswith("loop")]
    against_loops = [_speed(row["cells"]["auto"]) / _best(row, loops) for row in result["rows"]]
    few = result["long"]["four windows"]["auto"]["cpu_seconds"]
    short, long = result["memory"]
    growth = [long[kind]["peak_mib"] / short[kind]["peak_mib"] - 1 for kind in ("four windows", "all in pieces")]
    handover = [row["decode_process"] / row["in_process"] - 1 for row in result["handover"]]
    return [
        _at_least("auto / best back end, worst row", min(against_best), 1.0),
        _at_least("auto / best loop, worst row", min(against_loops), 1.5),
        _at_least("4 windows of a long video / all of it", result["long"]["all"]["cpu_seconds"] / few, 10.0),
        _at_most("growth of peak memory, short to long", max(growth), 0.10),
        _at_most("hand-over / decode time, worst size", max(handover), 0.05),
    ]


def _at_least(name: str, value: float, goal: float) -> tuple[str, float, float, bool]:
    return name, value, goal, value >= goal


def _at_most(name: str, value: float, goal: float) -> tuple[str, float, float, bool]:
    return name, value, goal, value <= goal


def _speed(cell: Json) -> float:
    return float(cell["frames"] / cell["cpu_seconds"]) if "frames" in cell else 0.0


def _best(row: Json, names: tuple[str, ...] | list[str]) -> float:
    return max(_speed(row["cells"][name]) for name in names if name in row["cells"])


def _goals(result: Json) -> Iterator[str]:
    yield from ("| goal | measured | wanted | met |", "|---|---|---|---|")
    for name, value, goal, met in goals(result):
        yield f"| {name} | {value:.2f} | {goal:g} | {'yes' if met else 'no'} |"
    yield ""


def _rows(rows: list[Json]) -> Iterator[str]:
    names = list(rows[0]["cells"])
    yield f"| codec | size | wanted | {' | '.join(names)} | auto / best | auto / loops |"
    yield "|" + "---|" * (len(names) + 5)
    loops = [name for name in names if name.startswith("loop")]
    for row in rows:
        auto = _speed(row["cells"]["auto"])
        ratios = [auto / best if (best := _best(row, group)) else float("inf") for group in (_BACK_ENDS, loops)]
        cells = " | ".join(_cell(row["cells"][name]) for name in names)
        yield f"| {row['codec']} | {row['height']}p | {row['wanted']} | {cells} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
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
        here, there = row["in_process"], row["decode_process"]
        yield f"| {row['height']}p | {here:.4f} | {there:.4f} | {there / here - 1:+.1%} |"
