"""Which back end decodes which video, when the user leaves it to us: `--decoder auto`.

In:   conformance.json beside this file: what each back end was seen to make of each kind of input, and how fast.
Out:  the names of the back ends to ask, in order, by container and codec.
Cost: the table is read once per process.
Errors: KeyError for a table that this code did not write; the tests hold it up to date.

A back end is proven for a container and codec when it gave exact frames for some input of that kind and wrong frames,
a crash or a hang for none, damaged inputs included: what cannot be told from outside (open GOPs, edit lists, damage)
must not matter. Only back ends that every installation has are ranked, by the speed in the checked-in table, so that
the choice, and with it the store, is the same everywhere. With nothing proven, PyAV is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.decode.animation import is_webp
from pipeline.decode.container import open_video
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import MediaSource
from pipeline.errors import DecodeError

Verdict = Literal["exact", "unsupported", "error", "crash", "wrong"]
TABLE_PATH = Path(__file__).with_name("conformance.json")
RANKED = ("pyav", "decord")
FALLBACK = "pyav"
FOR_WEBP = "pillow"  # FFmpeg cannot even open an animated one


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a back end made of one input.

    exact: the right frames, times and colours. unsupported: it declined by itself. error: another clear error. crash:
    it died or hung. wrong: it gave wrong frames as right. question: the first one that got this verdict, if not exact.
    """

    verdict: Verdict
    question: str = ""
    frames_per_second: int = 0
    peak_mib: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of input; `broken` when the right answer to it may be an error. `answers` by back end."""

    container: str
    codec: str
    feature: str
    broken: bool
    answers: Mapping[str, Answer]

    @property
    def name(self) -> str:
        """Unique in a table."""
        return f"{self.container} {self.codec} {self.feature}"


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows, and the versions of the libraries that were asked."""

    versions: Mapping[str, str]
    rows: Sequence[Row]

    def to_json(self) -> str:
        """One line per row, for readable diffs."""
        rows = ",\n".join(json.dumps(_plain(row)) for row in self.rows)
        return f'{{"versions": {json.dumps(dict(self.versions))},\n"rows": [\n{rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Undo `to_json`."""
        fields = json.loads(text)
        return cls(fields["versions"], tuple(_row(row) for row in fields["rows"]))

    def proven(self, container: str, codec: str) -> tuple[str, ...]:
        """The ranked back ends that are proven for this kind of video, the fastest first."""
        rows = [row for row in self.rows if (row.container, row.codec) == (container, codec)]
        speeds = {name: _proven_speed([row.answers[name] for row in rows if name in row.answers]) for name in RANKED}
        return tuple(sorted((name for name in RANKED if speeds[name]), key=lambda name: (-speeds[name], name)))

    @functools.cached_property
    def leader(self) -> str | None:
        """The back end that is asked first whatever the video is, if there is one: then nobody needs to look."""
        kinds = {(row.container, row.codec) for row in self.rows}
        first = {self.order(*kind)[0] for kind in kinds} | {FALLBACK}
        return first.pop() if len(first) == 1 else None

    def order(self, container: str, codec: str) -> tuple[str, ...]:
        """`proven`, or PyAV alone."""
        return self.proven(container, codec) or (FALLBACK,)


def backend_names(source: MediaSource, decoder: str, limits: DecodeLimits) -> Iterator[str]:
    """Whom to ask for a video, and whom after an error: `decoder`, or for "auto" what the table says."""
    if decoder != "auto" or source.kind == "image":
        yield decoder
        return
    leader = checked_in_table().leader
    if leader is not None:
        yield leader
    yield from (name for name in _order_for(source, limits) if name != leader)


def _order_for(source: MediaSource, limits: DecodeLimits) -> tuple[str, ...]:
    """By the container's header; nothing is decoded."""
    try:
        with open_video(source, limits) as video:
            return checked_in_table().order(video.container_name, video.stream.codec_context.codec.canonical_name)
    except DecodeError:
        return (FOR_WEBP,) if is_webp(source) else (FALLBACK,)


@functools.cache
def checked_in_table() -> Table:
    """The table of this version of the code."""
    return Table.from_json(TABLE_PATH.read_text())


def _proven_speed(answers: Sequence[Answer]) -> float:
    """Frames per second, the median over exact inputs; 0 for what is not proven."""
    exact = [answer.frames_per_second for answer in answers if answer.frames_per_second]
    return statistics.median(exact) if exact and all(a.verdict not in ("wrong", "crash") for a in answers) else 0.0


def _plain(row: Row) -> dict[str, Any]:
    answers = {
        name: {key: value for key, value in dataclasses.asdict(answer).items() if value}
        for name, answer in row.answers.items()
    }
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)} | {"answers": answers}


def _row(fields: dict[str, Any]) -> Row:
    answers = {name: Answer(**answer) for name, answer in fields["answers"].items()}
    return Row(**(fields | {"answers": answers}))
