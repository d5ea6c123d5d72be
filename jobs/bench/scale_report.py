"""The scale benchmark's result as Markdown, with what it shows against the goals.

In:   the result that is also written as JSON; parts that were not measured are left out.
Out:  Markdown.
Cost: none.
Errors: KeyError for another result.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from jobs.bench.decode_report import Goal, Spread

Json = dict[str, Any]
_MILLISECONDS_PER_UNIT = 3.0
_FLAT_MIB = 5.0  # what an allocator may keep without anything growing
_FLAT_SHARE = 0.10
_START_SECONDS = 15.0


def to_markdown(result: Json) -> str:
    """The whole page."""
    tables = {"controller": _controller, "books": _books, "memory": _memory, "start": _starts}
    lines = [*_head(result["about"]), *_goals(result)]
    for part, table in tables.items():
        lines += table(result[part]) if part in result else ()
    return "\n".join(lines) + "\n"


def _head(about: Json) -> Iterator[str]:
    yield from ("# Scale benchmark", "", f"- command: `{about['command']}`")
    yield f"- date: {about['date']}, commit {about['commit']}"
    yield f"- hardware: {about['hardware']}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
    yield ""


def goals(result: Json) -> list[Goal]:
    """The worst row counts."""
    found = []
    if rows := result.get("controller"):
        cost = [Spread.of([row["seconds_per_unit"] * 1e3]) for row in rows]
        found.append(Goal.at_most("controller, CPU ms per unit", _MILLISECONDS_PER_UNIT, cost))
        alone = sorted((row["units"], row["loop_mib"]) for row in rows if row["workers"] == 1)
        if len(alone) > 1:
            more = Spread.of([alone[-1][1] - alone[0][1]])
            found.append(Goal.at_most("controller, MiB more for the most units", _FLAT_MIB, [more]))
    if rows := result.get("books"):
        cost = [Spread.of([sum(row["seconds_per_unit"].values()) * 1e3]) for row in rows]
        found.append(Goal.at_most("books, CPU ms per unit, all passes", _MILLISECONDS_PER_UNIT, cost))
    if rows := result.get("memory"):
        growth = [Spread.of([share]) for row in rows for share in growth_of(row).values()]
        found.append(Goal.at_most("growth of peak memory, any process seen with both", _FLAT_SHARE, growth))
        on_ray = [cell["spilled_files"] for row in rows for cell in row["cells"] if row["engine"] == "ray"]
        if on_ray:
            found.append(Goal.at_most("objects that Ray spilled", 0, [Spread.of([files]) for files in on_ray]))
    if local := [row for row in result.get("start", ()) if row["engine"] == "local"]:
        walls = [Spread.of([row["seconds"] for row in group]) for _, group in _by_case(local)]
        found.append(Goal.at_most("job of one tar, --local, seconds", _START_SECONDS, walls))
    return found


def growth_of(row: Json) -> dict[str, float]:
    """By role, how much larger its largest process is with the larger amount, as a share."""
    small, large = (cell["peak_mib"] for cell in row["cells"])
    return {role: large[role] / small[role] - 1 for role in small if role in large}


def _by_case(rows: Sequence[Json]) -> list[tuple[str, list[Json]]]:
    named = [(f"{row['engine']}, {row['encoder']}", row) for row in rows]
    return [(name, [row for _, row in group]) for name, group in groupby(named, key=lambda pair: pair[0])]


def _goals(result: Json) -> Iterator[str]:
    yield from ("| goal | worst row | wanted at most | met |", "|---|---|---|---|")
    for goal in goals(result):
        yield f"| {goal.name} | {goal.measured} | {goal.wanted:g} | {goal.verdict} |"
    yield ""


def _controller(rows: list[Json]) -> Iterator[str]:
    yield from ("## Controller: leasing every unit of a plan to fake workers", "")
    yield "Grown: the process's peak above what it had before: by loading the plan (a line for each shard and bucket,"
    yield "here 15.6 units), then by the job's loop. One event a turn, the loop's worst case."
    yield ""
    yield "| units | plan lines | workers | load, CPU s | by loading, MiB | loop, CPU us per unit | by the loop, MiB |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['units']} | {row['lines']} | {row['workers']} | {row['load_seconds']:.2f} | "
            f"{row['plan_mib']:.1f} | {row['seconds_per_unit'] * 1e6:.1f} | {row['loop_mib']:.1f} |"
        )
    yield ""


def _books(rows: list[Json]) -> Iterator[str]:
    steps = list(rows[0]["seconds_per_unit"])
    yield from ("## Books: the ledger of a finished store on a local disk, 64 clips a unit", "")
    yield "Compaction holds a part of 32 MiB of rows and writes it, and so grows up to some multiple of that."
    yield ""
    yield f"| units | {' | '.join(f'{step}, CPU ms per unit' for step in steps)} | grown MiB |"
    yield "|" + "---|" * (len(steps) + 2)
    for row in rows:
        cells = " | ".join(f"{row['seconds_per_unit'][step] * 1e3:.3f}" for step in steps)
        yield f"| {row['units']} | {cells} | {row['books_mib']:.1f} |"
    yield ""


def _memory(rows: list[Json]) -> Iterator[str]:
    yield from ("## Peak memory of a job's processes", "")
    yield "MiB of the largest process of each role (VmHWM, so shared memory counts), for the smaller and the larger"
    yield "amount; 2 decode processes, a window of 8 MiB, units of 16 rows."
    yield ""
    yield from ("| engine | encoder | amount | role: MiB | spilled |", "|---|---|---|---|---|")
    for row in rows:
        small, large = row["cells"]
        roles = "; ".join(
            f"{role}: {small['peak_mib'][role]:.0f} to {large['peak_mib'][role]:.0f} ({growth:+.1%})"
            for role, growth in growth_of(row).items()
        )
        amount = f"{small['amount']} to {large['amount']} {row['what']}"
        spilled = sum(row["cells"][k]["spilled_files"] for k in (0, 1)) if row["engine"] == "ray" else ""
        yield f"| {row['engine']} | {row['encoder']} | {amount} | {roles} | {spilled} |"
    yield ""


def _starts(rows: list[Json]) -> Iterator[str]:
    yield from ("## Start-up: a job of one tar, seconds", "", "| job | part by part | CPU, all processes | wall |")
    yield "|---|---|---|---|"
    for name, group in _by_case(rows):
        medians = {part: statistics.median(row["parts"][part] for row in group) for part in group[0]["parts"]}
        parts = "; ".join(f"{part} {seconds:.2f}" for part, seconds in medians.items())
        cpu, wall = (Spread.of([row[name] for row in group]) for name in ("cpu_seconds", "seconds"))
        yield f"| {name} | {parts} | {cpu} | {wall} |"
    yield ""
