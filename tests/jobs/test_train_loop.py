"""The loop of one rank: resumed at any step it ends with the same bits, and what it keeps, sees and says on the way."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.train.checkpoints import Checkpoints, read_finished
from jobs.train.config import CheckpointFlags, LogFlags, ModelFlags, Train
from jobs.train.history import failed_clips, read_history
from jobs.train.loop import TrainJob, train_rank
from models.train_settings import TrainSettings
from pipeline.buckets import BucketConfig
from pipeline.curriculum import Stage
from pipeline.decode.records import DecodeOutcome, DecodeRequest
from pipeline.epoch import DrawConfig
from pipeline.index import list_fragments
from pipeline.storage import LocalStorage, open_storage
from tests.fakes import FakeDecoders, planned_store
from tests.object_server import object_server

VIDEOS = ({"a": 30, "b": 9, "c": 50, "d": 31}, {"e": 12, "f": 25, "g": 9, "h": 9})
STEPS = 8
DRAW = DrawConfig(frames=(1, 5), batch_size=2)
GAN = ModelFlags(
    kind="vq_gan",
    kind_options=("adversary.start_step=3", "adversary.channels=8", "adversary.depth=1", "bottleneck.codebook_size=32"),
)
QUIET = LogFlags(log_every=1000, strip_every=1000, progress_seconds=1000)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_job(directory: Path, **changes: Any) -> TrainJob:
    """A job on an index of videos that FakeDecoders decode; `changes` are of the job or of its command."""
    directory.mkdir(exist_ok=True)
    storage, _ = planned_store(directory, VIDEOS)
    shard_ids = tuple(list_fragments(storage))
    of_job = {key: changes.pop(key) for key in ("stages", "steps", "seconds") if key in changes}
    command = Train(
        **{
            "output": directory / "model",
            "draw": DRAW,
            "settings": TrainSettings(warmup_steps=2),
            "checkpoints": CheckpointFlags(checkpoint_every=3),
            "log": QUIET,
            "normaliser_batches": 2,
            **changes,
        }
    )
    stages = (
        Stage(3, command.draw, BucketConfig(sizes=("16x16",))),
        Stage(None, dataclasses.replace(command.draw, frames=(5,)), BucketConfig(sizes=("16x24", "16x16"))),
    )
    fields = {
        "command": command,
        "run_url": storage.url,
        "log_directory": directory / "log",
        "stages": stages,
        "steps": STEPS,
        "seconds": None,
        "shard_ids": shard_ids,
        "held_out_ids": (),
        "device": "cpu",
    }
    return TrainJob(**{**fields, **of_job})


class Killed(BaseException):
    """Nothing handles it."""


class Breaking(FakeDecoders):
    """Ends the training at its request number `last`."""

    def __init__(self, last: int, **fields: Any) -> None:
        super().__init__(**fields)
        self.last = last

    def submit(self, request: DecodeRequest) -> Future[tuple[DecodeOutcome, ...]]:
        if len(self.requests) >= self.last:
            raise Killed
        return super().submit(request)


def outcome(job: TrainJob) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The last tensors, and how the training ended but for its seconds."""
    storage = LocalStorage(job.run_url)
    finished = read_finished(storage)
    assert finished is not None
    _, tensors = Checkpoints(storage).load(STEPS)
    return tensors, {key: value for key, value in finished.items() if key != "seconds"}


def history(job: TrainJob) -> list[tuple[int, list[Any]]]:
    return sorted((line["step"], line["draws"]) for line in read_history(LocalStorage(job.run_url)))


@pytest.mark.parametrize("model", [ModelFlags(), GAN], ids=["vae", "vq_gan"])
def test_broken_off_anywhere_it_ends_with_the_bits_of_an_undisturbed_one(model: ModelFlags, tmp_path: Path) -> None:
    undisturbed = make_job(tmp_path / "undisturbed", model=model)
    train_rank(undisturbed, FakeDecoders(bad=("c",)))
    tensors, finished = outcome(undisturbed)
    assert finished["failed"]["bad_media"] > 0
    parts = {name.split(".")[0] for name in tensors}
    assert parts >= {"model", "average", "optimiser", "noise", "step"}
    assert ("adversary_optimiser" in parts) == (model is GAN)
    resumed = make_job(tmp_path / "resumed", model=model)
    last_steps = []
    for last in (11, 5, 14, 16):  # decodes a few batches ahead, so the first three break off in the stages' midst
        with pytest.raises(Killed):
            train_rank(resumed, Breaking(last, bad=("c",)))
        last_steps.append(Checkpoints(LocalStorage(resumed.run_url)).last_step)
    assert last_steps[0] is None
    assert last_steps[-1] in (3, 6)
    # A second rank's, which was lost before its checkpoint counted.
    LocalStorage(resumed.run_url).put("history/00000007/rank-1.jsonl", b'{"step": 7, "draws": [], "failed": []}')
    train_rank(resumed, FakeDecoders(bad=("c",)))
    again, finished_again = outcome(resumed)
    assert finished_again == finished
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []
    assert history(resumed) == history(undisturbed)
    assert [step for step, _ in history(resumed)] == list(range(1, STEPS + 1))


def test_a_training_that_has_ended_is_not_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    train_rank(job, FakeDecoders())
    decoders = FakeDecoders()
    train_rank(job, decoders)
    assert decoders.requests == []


def test_the_clock_goes_on_where_it_stood(tmp_path: Path) -> None:
    job = make_job(tmp_path, steps=None, seconds=1000.0)
    with pytest.raises(Killed):
        train_rank(job, Breaking(20))
    storage = LocalStorage(job.run_url)
    last = Checkpoints(storage).last_step
    assert last is not None
    document = tmp_path / "store" / f"checkpoints/{last:08d}/checkpoint.json"
    fields = json.loads(document.read_text())
    assert 0 < fields["seconds"] < 1000
    document.write_text(json.dumps({**fields, "seconds": 999.0}))
    train_rank(job, FakeDecoders())
    finished = read_finished(storage)
    assert finished is not None
    assert finished["step"] > last
    assert 1000 <= finished["seconds"] < 1100


def test_every_sample_is_drawn_once_in_an_epoch(tmp_path: Path) -> None:
    job = make_job(
        tmp_path, stages=(Stage(None, DrawConfig(frames=(5,), batch_size=4), BucketConfig(sizes=("16x16",))),)
    )
    train_rank(job, FakeDecoders())
    epochs: dict[int, Counter[str]] = {}
    for _, draws in history(job):
        for _, epoch, _, key in draws:
            epochs.setdefault(epoch, Counter())[key] += 1
    assert set(epochs) == set(range(4))
    assert all(counts == Counter("abcdefgh") for counts in epochs.values())


def test_the_best_is_that_of_the_held_out_shards(tmp_path: Path) -> None:
    job = make_job(tmp_path, checkpoints=CheckpointFlags(checkpoint_every=3, held_out=("x",), evaluate_every=4))
    job = dataclasses.replace(job, shard_ids=job.shard_ids[:1], held_out_ids=job.shard_ids[1:])
    decoders = FakeDecoders()
    train_rank(job, decoders)
    checkpoints = Checkpoints(LocalStorage(job.run_url))
    assert checkpoints.scores.keys() == {8}
    assert checkpoints.best_step == 8
    assert {key for _, draws in history(job) for *_, key in draws} <= set("abcd")
    assert {request.source.key for request in decoders.requests} == set("abcdefgh")


def test_the_normaliser_of_a_whole_epoch(tmp_path: Path) -> None:
    decoders = FakeDecoders()
    job = make_job(tmp_path, steps=1, normaliser_batches=0)
    train_rank(job, decoders)
    finished = read_finished(LocalStorage(job.run_url))
    assert finished is not None
    assert len(finished["normaliser"]["mean"]) == 16
    assert {request.source.key for request in decoders.requests[-16:]} == set("abcdefgh")


class RecordingLog:
    """In the place of a TrainLog."""

    made: list[RecordingLog] = []  # noqa: RUF012

    def __init__(self, directory: Path, *, resumed_step: int, **fields: Any) -> None:
        self.resumed_step, self.values, self.strips, self.closed = resumed_step, dict[int, Any](), list[Any](), False
        RecordingLog.made.append(self)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.values.setdefault(step, {}).update(values)

    def strip(self, step: int, name: str, image: np.ndarray) -> None:
        self.strips.append((step, image.shape))

    def close(self) -> None:
        self.closed = True


def test_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("jobs.train.watch.TrainLog", RecordingLog)
    RecordingLog.made.clear()
    job = make_job(tmp_path, model=GAN, log=LogFlags(log_every=2, strip_every=4, progress_seconds=1e-9))
    train_rank(job, FakeDecoders(bad=("c",)))
    (log,) = RecordingLog.made
    assert log.closed
    assert sorted(log.values) == [2, 4, 6, 8]
    assert [step for step, _ in log.strips] == [4, 8]
    assert {
        "loss/l1",
        "loss/discriminator",
        "code/usage",
        "latent/std_median",
        "train/learning_rate",
        "train/samples_per_second",
        "train/waiting_share",
    } <= log.values[8].keys()
    assert 0 <= log.values[8]["train/waiting_share"] <= 1
    assert log.values[8]["train/learning_rate"] < log.values[4]["train/learning_rate"]
    assert (log.values[2]["train/stage"], log.values[8]["train/stage"]) == (0, 1)
    assert "train: step 8, 100% done" in capsys.readouterr().err
    assert failed_clips(LocalStorage(job.run_url)).keys() == {"bad_media"}


def test_the_best_can_be_taken_and_the_last_after_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, checkpoints=CheckpointFlags(checkpoint_every=3))
    storage = LocalStorage(job.run_url)
    with pytest.raises(Killed):
        train_rank(job, Breaking(16))
    step = Checkpoints(storage).last_step
    assert step is not None
    document = tmp_path / "store" / f"checkpoints/{step:08d}/checkpoint.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "score": -1.0}))
    taken = []
    for take in ("last", "best", "last"):
        flags = CheckpointFlags(checkpoint_every=3, take=take)  # type: ignore[arg-type]
        train_rank(
            dataclasses.replace(job, command=dataclasses.replace(job.command, checkpoints=flags)), FakeDecoders()
        )
        finished = read_finished(storage)
        assert finished is not None
        taken.append((finished["step"], finished["taken_step"], finished["normaliser"]["mean"]))
    assert [steps for *steps, _ in taken] == [[STEPS, STEPS], [STEPS, step], [STEPS, STEPS]]
    assert taken[0] == taken[2]
    assert taken[0][2] != taken[1][2]


def test_a_run_in_an_object_store(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    local = make_job(tmp_path)
    train_rank(local, FakeDecoders())
    with object_server():
        storage = open_storage("s3://latents/training")
        for name in LocalStorage(local.run_url).list("index/"):
            storage.put(name, LocalStorage(local.run_url).read(name))
        remote = dataclasses.replace(local, run_url=storage.url)
        with pytest.raises(Killed):
            train_rank(remote, Breaking(16))
        train_rank(remote, FakeDecoders())
        there, here = read_finished(storage), read_finished(LocalStorage(local.run_url))
        assert there is not None
        assert here is not None
        assert {**there, "seconds": 0} == {**here, "seconds": 0}
