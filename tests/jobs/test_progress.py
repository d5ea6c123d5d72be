"""The line of advice at a job's end names what the encoders waited for."""

from __future__ import annotations

import re

import pytest

from jobs.progress import advice, format_seconds
from pipeline.controller import Progress


@pytest.mark.parametrize(
    ("encode", "starved", "blocked", "line"),
    [
        (98.0, 1.0, 1.0, "encode-bound: the encoders were busy 98% of the time"),
        (25.0, 70.0, 5.0, "decode-bound: the encoders waited 75% of the time.* about 4.0 times the decode cores"),
        (50.0, 10.0, 40.0, "write-bound: the encoders waited 50% of the time"),
        (0.0, 10.0, 0.0, "decode-bound: .* about 100.0 times"),
    ],
)
def test_advice_follows_the_seconds(encode: float, starved: float, blocked: float, line: str) -> None:
    progress = Progress(units=1, encode_seconds=encode, starved_seconds=starved, blocked_seconds=blocked)
    assert re.match(line, advice(progress))


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.24, "4.2 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min"), (59.6, "1 min 00 s")]
)
def test_seconds_are_told_as_people_do(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
