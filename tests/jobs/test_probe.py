"""`plan --probe` encodes as a worker will, and its estimate says what it is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.flags import TrialFlags
from jobs.probe import Trial, _encode, total_line
from pipeline.buckets import Bucket
from pipeline.decode_requests import to_requests
from pipeline.recipe import Recipe
from pipeline.verify import unit_clips
from tests.clips import numbered_video
from tests.fakes import FakeDecoders, planned_store, sample_members, write_tar
from tests.pipeline.test_encode_stage import MeetingEncoder, SlowEncoder

pytestmark = pytest.mark.timeout(30)

SHORT, LONG = Bucket(9, 32, 32), Bucket(25, 32, 32)
CLIPS = {SHORT: 1000, LONG: 10}


def slice_of(directory: Path) -> tuple[Recipe, list[Any]]:
    storage, plan = planned_store(directory)
    clips = list(unit_clips(storage, plan, next(plan.units())))[:2]
    outcomes = FakeDecoders().submit(*to_requests(clips, plan.recipe, 1 << 20)).result()
    return plan.recipe, [clips, outcomes]


def test_as_many_calls_at_a_time_and_threads_as_a_worker_has(tmp_path: Path) -> None:
    recipe, slice_ = slice_of(tmp_path)
    encoder = MeetingEncoder()
    _encode(encoder, recipe, slice_, threads=6)
    assert encoder.batches == 4  # two that warm up, two that count
    assert encoder.threads == {3}


def test_seconds_are_of_one_slice(tmp_path: Path) -> None:
    recipe, slice_ = slice_of(tmp_path)
    assert 0.05 <= _encode(SlowEncoder(0.05), recipe, slice_, threads=1) < 0.1
    assert 0.05 <= 2 * _encode(SlowEncoder(0.05), recipe, slice_, threads=2) < 0.1


def test_the_total_is_of_all_clips_and_the_slower_of_the_two() -> None:
    line = total_line(CLIPS, {SHORT: Trial(0.03, 0.01), LONG: Trial(3.0, 0.8)}, TrialFlags(decode_workers=2))
    assert line == (
        "estimate: 30.0 s, with 1 encode workers and 2 decode processes, decode-bound (encode 0.005 worker hours, "
        "decode 0.017 core hours; each worker on a device of its own)"
    )


def test_what_was_not_tried_is_named_and_not_counted_as_nothing() -> None:
    line = total_line(CLIPS, {SHORT: Trial(0.03, 0.01)}, TrialFlags(decode_workers=2))
    assert line.startswith("estimate: 15.0 s, without 10 clips of 25x32x32, with 1 encode workers")
    assert total_line(CLIPS, {}, TrialFlags()) == "estimate: none, since no clip was tried"


def with_damage(video: bytes) -> bytes:
    """From the middle of its frames on."""
    broken = bytearray(video)
    media, table = broken.index(b"mdat"), broken.index(b"moov")
    start = (media + table) // 2
    broken[start : table - 8] = b"\xff" * (table - 8 - start)
    return bytes(broken)


def run_probe(directory: Path, videos: dict[str, bytes], *more: str) -> int:
    members = [member for key, video in videos.items() for member in sample_members(key, video)]
    tar, store = str(write_tar(directory / "a.tar", members)), str(directory / "store")
    assert main(["index", tar, "--store", store, "--local", "--decode-workers", "1"]) == 0
    recipe = ["--encoder", "rehearsal:4x8x8x4@100", "--frames", "9", "25", "--short", "smaller", "--sizes", "32x32"]
    return main(["plan", "--store", store, *recipe, "--batch-size", "2", "--probe", "--decode-workers", "1", *more])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = {"short": numbered_video(12), "long": numbered_video(30)}
    assert run_probe(tmp_path, videos) == 0
    *_, first, second, total = capsys.readouterr().out.splitlines()
    for line, bucket in ((first, SHORT), (second, LONG)):
        assert re.fullmatch(
            rf"probe {bucket.name}: decode [\d.]+ ms per clip and process, encode [\d.]+ ms per clip on cpu", line
        )
    assert re.match(r"estimate: [\d.]+ s, with 1 encode workers and 1 decode processes, (en|de)code-bound ", total)


def test_from_the_command_line_with_a_bucket_that_cannot_be_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = {"short": numbered_video(12), "long": with_damage(numbered_video(30))}
    assert run_probe(tmp_path, videos) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "probe 25x32x32: none of the first clips can be decoded; no estimate for this bucket" in lines
    assert re.match(r"estimate: [\d.]+ s, without 1 clips of 25x32x32, with 1 encode workers", lines[-1])


def test_a_device_that_is_not_there_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_probe(tmp_path, {"short": numbered_video(12)}, "--device", "cuda") == 2
    assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err
