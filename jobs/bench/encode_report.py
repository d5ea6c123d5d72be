"""The encode benchmark's result as Markdown: who is ahead, how near to the bounds, and what that is against the goals.

In:   the result that is also written as JSON.
Out:  Markdown.
Cost: none.
Errors: KeyError for another result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.bench.config import OTHERS, OURS
from jobs.bench.decode_report import Goal, Spread

Json = dict[str, Any]
_ONE_ENCODER = ("local", "ray-1")
_STAGES = ("decode", "encode", "write")
_KEEPING_UP = {
    "nothing": "decode, batch and write as fast as it sleeps",
    "cuda": "decode, call it and write as fast as it encodes",
}
_NAMES = {
    "local": "**ours, --local**",
    "ray-1": "**ours, Ray, 1 encode worker**",
    "ray-2": "**ours, Ray, 2 encode workers**",
    "plain": "plain script",
    "dataloader": "DataLoader, PyAV",
    "decord": "DataLoader, decord",
    "ray-data": "Ray Data",
}


def to_markdown(result: Json) -> str:
    """The whole page."""
    cores, measured = result["about"]["cores"], [case for case in result["cases"] if "error" not in case]
    lines = [*_head(result["about"]), *(f"**FAULT** {fault}" for fault in faults(result))]
    lines += [*_goals(measured, cores), *_behind(measured)]
    for case in result["cases"]:
        lines += _failed(case) if "error" in case else _table(case, cores)
    return "\n".join(lines) + "\n"


def _head(about: Json) -> Iterator[str]:
    yield from ("# Encode benchmark", "", f"- command: `{about['command']}`")
    yield f"- date: {about['date']}, commit {about['commit']}"
    yield f"- hardware: {about['hardware']}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
    yield f"- every contender, in its turn: {about['cores']} cores, {about['decode_workers']} decode processes (the"
    threads, sleeping = about["encode_threads"], about["sleeping_threads"]
    yield f"  plain script has none, but FFmpeg's threads), {threads} threads of encoders in all, {sleeping} of"
    yield f"  those that sleep, {about['compute_dtype']}, the same batch size; encoders that compute run on"
    yield f"  {about['device']}"
    yield f"- medians of {about['repetitions']} rounds in rotating order, in brackets the least and the most; ratios"
    yield "  are taken within a round"
    yield "- seconds run from the encoder loaded and the first decode begun to the last latent written; start and end"
    yield "  are what comes before and after (imports, Ray, loading the encoder, the end of processes). Ours indexes"
    yield "  the tars before, told apart; the others are given what they need of that index, offsets and windows. Our"
    yield "  decode processes begin to start before the encoder is loaded"
    yield "- ours and the bare stages keep freed memory, as `latentmill` has glibc do; the others run with glibc's own"
    yield "  settings, as scripts do"
    yield "- encoder alone: on clips in memory, as many calls at a time as ours makes (two where it computes on two or"
    yield "  more CPU threads and can). Bound: the CPU seconds of our decode, encode and"
    yield "  write (one copy of them per core at once) over the cores or, where it is longer and the encoder sleeps or"
    yield "  has a GPU, the encoder alone per encode worker. With a GPU, encode includes the CPU seconds of the encoder"
    yield "  alone, which may wait busily for it"
    yield ""


# ratios within a round: None where a contender died


def rate(turn: Json, name: str) -> float | None:
    """Clips per second, or None."""
    cell = turn.get(name, {"error": "not run"})
    return None if "error" in cell else float(cell["clips"] / cell["seconds"])


def slower_of_ours(turn: Json) -> float | None:
    """Clips per second of the slower of ours with one encoder; None where one of them died."""
    asked = [name for name in _ONE_ENCODER if name in turn]
    found = [clips for name in asked if (clips := rate(turn, name)) is not None]
    return min(found) if found and len(found) == len(asked) else None


def bound_seconds(case: Json, turn: Json, name: str, cores: int) -> float:
    """What no engine can beat with these stages."""
    bare = turn["bare"]
    cpu = sum(bare[f"{stage}_cpu_seconds"] for stage in _STAGES) / cores
    beside = bare["encoder_seconds"] / (2 if name == "ray-2" else 1) if case["runs_on"] != "cpu" else 0.0
    return float(case["clips"] * max(cpu, beside))


def _spread(case: Json, ratio: Callable[[Json], float | None]) -> Spread | None:
    found = [value for turn in case["rounds"] if (value := ratio(turn)) is not None]
    return Spread.of(found) if found else None


def against(case: Json, other: str) -> Spread | None:
    """How many times as fast as another contender the slower of ours is."""
    return _spread(case, lambda turn: _quotient(slower_of_ours(turn), rate(turn, other)))


def over_bound(case: Json, name: str, cores: int) -> Spread | None:
    """Seconds over the bound."""
    return _spread(
        case,
        lambda turn: turn[name]["seconds"] / bound_seconds(case, turn, name, cores) if rate(turn, name) else None,
    )


def of_bare(case: Json, name: str) -> Spread | None:
    """Clips per second as a share of the encoder alone."""
    return _spread(case, lambda turn: (found := rate(turn, name)) and found * turn["bare"]["encoder_seconds"])


def _of_what_decode_leaves(case: Json, name: str) -> Spread | None:
    """The same, of the share of CPU time that decoding and writing leave a real encoder."""

    def ratio(turn: Json) -> float | None:
        bare = turn["bare"]
        share = bare["encode_cpu_seconds"] / sum(bare[f"{stage}_cpu_seconds"] for stage in _STAGES)
        return (found := rate(turn, name)) and found * bare["encoder_seconds"] / share

    return _spread(case, ratio)


def _ray_over_local(case: Json) -> Spread | None:
    return _spread(case, lambda turn: _quotient(rate(turn, "local"), rate(turn, "ray-1")))


def _busy(case: Json, name: str) -> Spread | None:
    return _spread(case, lambda turn: turn.get(name, {}).get("busy"))


def _quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


# goals


def goals(cases: Sequence[Json], cores: int) -> list[Goal]:
    """The worst row counts; a goal whose rows were not run is left out."""
    by_name = {f"{case['set']}:{case['encoder']}": case for case in cases}
    short, long = ([by_name[name]] if name in by_name else [] for name in ("short:balanced", "long:balanced"))
    real, on_gpu = ([case for case in cases if case["runs_on"] == device] for device in ("cpu", "cuda"))
    encode_bound = [case for case in cases if case["encoder"] == "encode-bound"]
    wanted = [
        (Goal.at_most, "seconds / work-conserving bound", 1.10, _rows(cases, lambda c, n: over_bound(c, n, cores))),
        (Goal.at_least, "encoder busy, sleeping, encode-bound", 0.98, _rows(encode_bound, _busy)),
        (Goal.at_most, "Ray / --local, seconds", 1.05, [_ray_over_local(case) for case in cases]),
        (Goal.at_least, "ours / Ray Data, short:balanced", 1.3, [against(case, "ray-data") for case in short]),
        (Goal.at_least, "ours / plain script, long:balanced", 1.5, [against(case, "plain") for case in long]),
        (
            Goal.at_least,
            "ours / DataLoaders, long:balanced",
            1.2,
            [against(case, name) for case in long for name in ("dataloader", "decord")],
        ),
        (
            Goal.at_least,
            "real encoders: share of the encoder alone that decode leaves",
            0.98,
            _rows(real, _of_what_decode_leaves),
        ),
        (Goal.at_least, "GPU: share of the encoder alone", 0.95, _rows(on_gpu, of_bare)),
        (Goal.at_least, "ours / any other", 1.0, [against(case, name) for case in cases for name in OTHERS]),
    ]
    found = [(make, name, goal, [row for row in rows if row is not None]) for make, name, goal, rows in wanted]
    return [make(name, goal, rows) for make, name, goal, rows in found if rows]


def _rows(cases: Sequence[Json], ratio: Callable[[Json, str], Spread | None]) -> list[Spread | None]:
    return [ratio(case, name) for case in cases for name in _ONE_ENCODER]


def _goals(cases: Sequence[Json], cores: int) -> Iterator[str]:
    yield "`ours` in a ratio is the slower of --local and Ray with one encode worker."
    yield ""
    yield from ("| goal | worst row | wanted | met |", "|---|---|---|---|")
    for goal in goals(cases, cores):
        yield f"| {goal.name} | {goal.measured} | {goal.wanted:g} | {goal.verdict} |"
    yield ""


def faults(result: Json) -> list[str]:
    """Where one of ours died or lost clips, whose rows no goal then counts."""
    return [
        f"{case['set']} with {case['encoder']}: {_NAMES[name]}: {remark}"
        for case in result["cases"]
        if "error" not in case
        for name in OURS
        for remark in dict.fromkeys(_faults(case, [turn[name] for turn in case["rounds"] if name in turn]))
    ]


def _behind(cases: Sequence[Json]) -> Iterator[str]:
    """Where a contender is ahead of ours."""
    pairs = [(case, name, found) for case in cases for name in OTHERS if (found := against(case, name)) is not None]
    ahead = [
        f"- {case['set']} with {case['encoder']}: {_NAMES[name]} is ahead, ours has {found} of its clips/s"
        for case, name, found in pairs
        if found.median < 1
    ]
    yield from ahead or (["No other contender is ahead of ours in any row."] if pairs else [])
    yield ""


def _failed(case: Json) -> Iterator[str]:
    yield from (f"## {case['set']}: {case['about']}", "")
    yield from (f"Encoder: **{case['encoder']}**. Not measured: {case['error']}", "")


def _table(case: Json, cores: int) -> Iterator[str]:
    yield from (f"## {case['set']}: {case['about']}", "")
    source = f", `{case['source']}`" if case["source"] else ""
    runs_on = case["runs_on"]
    kind = "sleeps, uses no CPU" if runs_on == "nothing" else f"computes on {runs_on}, random weights"
    yield f"Encoder: **{case['encoder']}** ({kind}){source}. {case['clips']} clips, {case['good_clips']} of them good."
    yield _bare_line(case, cores)
    yield ""
    yield (
        "| contender | clips/s | of the encoder alone | seconds / bound | encoder busy | ours is x as fast | "
        "index, s | start and end, s | total, s | CPU, s | largest process, MiB | remarks |"
    )
    yield "|" + "---|" * 12
    for name in (*OURS, *OTHERS):
        if any(name in turn for turn in case["rounds"]):
            yield _row(case, name, cores)
    yield ""


def _bare_line(case: Json, cores: int) -> str:
    bare = {key: statistics.median(turn["bare"][key] for turn in case["rounds"]) for key in case["rounds"][0]["bare"]}
    stages = ", ".join(f"{stage} {1e3 * bare[f'{stage}_cpu_seconds']:.2f}" for stage in _STAGES)
    bound = statistics.median(bound_seconds(case, turn, "local", cores) for turn in case["rounds"])
    line = (
        f"Bare stages, CPU ms per clip: {stages}; encoder alone {1 / bare['encoder_seconds']:.1f} clips/s; "
        f"bound with one encoder {bound:.1f} s."
    )
    if case["runs_on"] == "cpu":
        return line
    busy = sum(bare[f"{stage}_cpu_seconds"] for stage in _STAGES) / bare["encoder_seconds"]
    return f"{line} {busy:.1f} cores {_KEEPING_UP[case['runs_on']]}."


def _row(case: Json, name: str, cores: int) -> str:
    cells = [turn[name] for turn in case["rounds"]]
    alive = [cell for cell in cells if "error" not in cell]
    remarks = "; ".join(dict.fromkeys(_remarks(case, name, cells)))
    if not alive:
        return f"| {_NAMES[name]} |" + " |" * 10 + f" {remarks} |"
    ratios = [of_bare(case, name), over_bound(case, name, cores), _busy(case, name)]
    ratios.append(against(case, name) if name in OTHERS else None)
    rates = Spread.of([cell["clips"] / cell["seconds"] for cell in alive])
    keys = ("index_seconds", "startup_seconds", "total_seconds", "cpu_seconds", "peak_mib")
    medians = [f"{statistics.median(cell[key] for cell in alive):.{0 if key == 'peak_mib' else 1}f}" for key in keys]
    texts = [str(rates), *("" if ratio is None else str(ratio) for ratio in ratios), *medians, remarks]
    return f"| {_NAMES[name]} | {' | '.join(texts)} |"


def _remarks(case: Json, name: str, cells: Sequence[Json]) -> Iterator[str]:
    found = against(case, name) if name in OTHERS else None
    if found is not None and found.median < 1:
        yield "AHEAD of ours"
    yield from _faults(case, cells)
    for cell in cells:
        if cell.get("clips", 0) > case["good_clips"]:
            yield f"saved {cell['clips'] - case['good_clips']} clips of broken videos"
        if name == "ray-2" and cell.get("workers", 2) < 2:
            yield "had one worker at its end: no room, or no time, for a second"


def _faults(case: Json, cells: Sequence[Json]) -> Iterator[str]:
    for cell in cells:
        if "error" in cell:
            yield str(cell["error"]).replace("|", "/")[:160]
        elif cell["clips"] < case["good_clips"]:
            yield f"lost {case['good_clips'] - cell['clips']} good clips"
