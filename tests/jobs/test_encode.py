"""What `encode` adds to the loop: the store judged whole, its books opened again, and what the run log says."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from jobs import encode, ray_engine
from jobs.__main__ import main
from jobs.flags import EngineFlags
from pipeline.errors import JobError
from tests.clips import numbered_video
from tests.fakes import FakeEncoder, planned_store, sample_members, write_tar

RECIPE = ["--encoder", "rehearsal:4x8x8x4@1000", "--frames", "9", "--sizes", "32x32", "--batch-size", "2"]
WINDOWS = ["--windows", "uniform", "--num-windows", "3", "--unit-rows", "2"]


def shard(directory: Path, **videos: bytes) -> str:
    members = [member for key, video in videos.items() for member in sample_members(key, video)]
    return str(write_tar(directory / "shard.tar", members))


def run_encode(tar: str, store: Path, *more: str) -> int:
    local = ["--local", "--decode-workers", "1"]
    return main(["encode", tar, "--store", str(store), *RECIPE, *WINDOWS, *local, *more])


def run_logs(store: Path) -> list[dict[str, Any]]:
    logs = [json.loads(path.read_text()) for path in store.glob("runs/*.json")]
    return sorted(logs, key=lambda log: str(log["started"]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_of_which_too_much_failed_stays_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = numbered_video(num_frames=60, container_options={"movflags": "faststart"})
    tar, store = shard(tmp_path, good=video, cut=video[: len(video) * 2 // 3]), tmp_path / "store"
    for _ in range(2):
        assert run_encode(tar, store, "--max-failed-share", "0.01") == 1
        told = capsys.readouterr().err
        assert "of 6 clips failed (" in told
        assert "more than --max-failed-share 0.01 allows" in told
        assert not (store / "samples").exists()
    assert [log["outcome"] for log in run_logs(store)] == ["stopped by FailureLimitError"]
    assert run_encode(tar, store, "--max-failed-share", "0.5") == 0
    assert (store / "samples").exists()


def test_clips_of_earlier_runs_are_judged_with_those_of_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last window of a cut video alone fails; with the clips before it, it is one of six."""
    video = numbered_video(num_frames=60, container_options={"movflags": "faststart"})
    tar, store = shard(tmp_path, a_good=video, cut=video[: len(video) * 5 // 6]), tmp_path / "store"
    assert run_encode(tar, store) == 0
    (store / "ledger/9x32x32/000002.parquet").unlink()
    assert run_encode(tar, store, "--max-failed-share", "0.3") == 0  # 1 of 2 in this run
    assert capsys.readouterr().out.count("in 6 = 5 written + 0 filtered + 1 failed") == 2


def test_a_unit_that_was_deleted_opens_the_books_again(tmp_path: Path) -> None:
    tar, store = shard(tmp_path, a=numbered_video(30), b=numbered_video(40)), tmp_path / "store"
    assert run_encode(tar, store) == 0
    samples, header = contents(store / "samples"), (store / "latents.zarr/zarr.json").read_bytes()
    (store / "samples/part-000000.parquet").write_bytes(b"of latents that are no more")
    (store / "ledger/9x32x32/000001.parquet").unlink()
    (store / "latents.zarr/9x32x32/c.1.0.0.0.0").unlink()
    assert run_encode(tar, store) == 0
    assert contents(store / "samples") == samples
    assert (store / "latents.zarr/zarr.json").read_bytes() == header


@pytest.mark.parametrize(
    ("error", "outcome"), [(ZeroDivisionError, "crashed"), (KeyboardInterrupt, "stopped by KeyboardInterrupt")]
)
def test_how_a_job_ended_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], outcome: str
) -> None:
    """A second Ctrl-C is the KeyboardInterrupt."""

    def end(*_: object, **__: object) -> None:
        raise error

    tar, store = shard(tmp_path, a=numbered_video(30)), tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(encode, "run", end)
        if error is KeyboardInterrupt:
            assert run_encode(tar, store) == 130
        else:
            with pytest.raises(error):
                run_encode(tar, store)
    assert run_encode(tar, store) == 0
    assert [log["outcome"] for log in run_logs(store)] == [outcome, "done"]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("auto", "encode: the encoder runs on cpu (--device auto found no GPU; --device cuda insists on one)\n"),
        ("cpu", "encode: the encoder runs on cpu\n"),
    ],
)
def test_the_device_is_told_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str, line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_encode(shard(tmp_path, a=numbered_video(30)), tmp_path / "store", "--device", flag) == 0
    assert line in capsys.readouterr().err
    assert [log["device"] for log in run_logs(tmp_path / "store")] == ["cpu"]


def test_cuda_where_there_is_none_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_encode(shard(tmp_path, a=numbered_video(30)), tmp_path / "store", "--device", "cuda") == 2
    assert "UsageError: --device cuda: torch finds no CUDA device here; use --device cpu" in capsys.readouterr().err


def test_workers_beyond_the_units_get_no_share_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineFlags] = []

    def ray_engine(storage: object, source: str, flags: EngineFlags, device: str) -> None:
        seen.append(flags)
        raise JobError("enough was seen")

    monkeypatch.setattr(encode, "_ray_engine", ray_engine)
    monkeypatch.setattr(encode, "job_device", lambda name, flags: "cpu")
    tar, store = shard(tmp_path, a=numbered_video(30)), str(tmp_path / "store")
    assert main(["index", tar, "--store", store, "--local", "--decode-workers", "1"]) == 0
    assert main(["encode", "--store", store, *RECIPE, *WINDOWS, "--workers", "5"]) == 1
    assert [flags.workers for flags in seen] == [2]  # three clips in units of two


def test_collections_leave_out_what_was_there_before_the_job_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(encode, "run", lambda *_, **__: frozen.append(gc.get_freeze_count()))
    tar = shard(tmp_path, a=numbered_video(num_frames=9))
    before = gc.get_freeze_count()
    run_encode(tar, tmp_path / "store")
    assert frozen[0] > before + 10_000  # torch's alone are more
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize(
    ("source", "device", "lets"), [("m", "cpu", 1), ("rehearsal:4x8x8x16@10", "cpu", 0), ("m", "cuda", 0)]
)
def test_decoding_takes_what_an_encoder_on_the_same_cores_leaves(
    engine: str, source: str, device: str, lets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Mock(num_processes=1)
    if engine == "local":
        storage, plan = planned_store(tmp_path)
        monkeypatch.setattr(encode, "ready_encoder", lambda *_: FakeEncoder())
        encode._local_engine(storage, plan, source, EngineFlags(local=True), device, pool).close()
    else:
        monkeypatch.setattr(ray_engine, "ProcessPool", lambda *_: pool)
        share = SimpleNamespace(decode_processes=1)
        spec: Any = SimpleNamespace(share=share, limits=None, device=device, encoder_source=source)
        assert ray_engine.EncodeActor(spec)._decoders() is pool
    assert pool.start.call_count == 1
    assert pool.let_others_first.call_count == lets
