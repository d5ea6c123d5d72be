"""The training benchmark's result as Markdown, with what it shows against the goals.

In:   the result that is also written as JSON.
Out:  Markdown.
Cost: none.
Errors: KeyError for another result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.bench.decode_report import Goal, Spread

Json = dict[str, Any]
_OURS = "latentmill"


def to_markdown(result: Json) -> str:
    """The whole page."""
    return "\n".join([*_head(result["about"]), *_goals(result), *_speeds(result), *_waiting(result)]) + "\n"


def goals(result: Json) -> list[Goal]:
    """The worst of the other loaders' ratios counts."""
    others = [loader for loader in _loaders(result) if loader != _OURS]
    return [
        Goal.at_most("waiting, sleeping step", 0.02, [_spread(result, "sleeping", _OURS, "waiting_share")]),
        Goal.at_most("waiting, busy step", 0.05, [_spread(result, "busy", _OURS, "waiting_share")]),
        *(Goal.at_least(f"clips/s, ours / {loader}", 1.0, [ratio(result, loader)]) for loader in others),
    ]


def ratio(result: Json, loader: str) -> Spread:
    """Our clips per second over another loader's, round by round."""
    cells = [turn["none"] for turn in result["rounds"]]
    return Spread.of([cell[_OURS]["clips_per_second"] / cell[loader]["clips_per_second"] for cell in cells])


def _head(about: Json) -> Iterator[str]:
    yield from ("# Training benchmark", "", f"- command: `{about['command']}`")
    yield f"- date: {about['date']}, commit {about['commit']}"
    yield f"- hardware: {about['hardware']}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
    yield f"- clips: {about['clips']}; {about['workers']} decode workers"
    yield f"- medians of {about['repetitions']} rounds of {about['steps']} steps, in which the loaders took turns in"
    yield "  rotating order; in brackets the least and the most of all rounds; ratios are taken within each round"
    yield "- webdataset and loose files (torch's DataLoader) decode with PyAV in their workers, from a video's start"
    yield f"- sleeping step: {about['step_seconds']:g} s, as a GPU leaves the cores free; busy step: as much work as"
    yield f"  {about['threads']} threads do in {about['step_seconds']:g} s with nothing beside them"
    yield ""


def _goals(result: Json) -> Iterator[str]:
    yield from ("| goal | measured | wanted | met |", "|---|---|---|---|")
    for goal in goals(result):
        yield f"| {goal.name} | {goal.measured} | {goal.wanted:g} | {goal.verdict} |"
    yield ""


def _speeds(result: Json) -> Iterator[str]:
    yield from ("| loader | clips/s, no step | CPU seconds a batch, all processes | ours / it |", "|---|---|---|---|")
    for loader in _loaders(result):
        speed, cpu = (_spread(result, "none", loader, key) for key in ("clips_per_second", "cpu_seconds"))
        yield f"| {loader} | {speed} | {cpu} | {ratio(result, loader)} |"
    yield ""


def _waiting(result: Json) -> Iterator[str]:
    yield from ("| loader | step | share of time waiting | seconds of a step | clips/s |", "|---|---|---|---|---|")
    for step in ("sleeping", "busy"):
        for loader in _loaders(result):
            share, seconds, speed = (
                _spread(result, step, loader, key) for key in ("waiting_share", "step_seconds", "clips_per_second")
            )
            percent = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})"
            yield f"| {loader} | {step} | {percent} | {seconds} | {speed} |"


def _spread(result: Json, step: str, loader: str, key: str) -> Spread:
    return Spread.of([turn[step][loader][key] for turn in result["rounds"]])


def _loaders(result: Json) -> list[str]:
    return sorted(result["rounds"][0]["none"])
