"""Two ranks on Ray, one of them killed: they go on by themselves, see every clip once, and end where one rank ends."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs.__main__ import main
from jobs.train.history import read_history
from pipeline.storage import LocalStorage
from tests.fakes import write_numbered_shards

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,  # a minute: Ray Train starts its ranks twice
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:ray.data.context"
    ),  # Ray Train imports it, and it warns itself
]

STEPS, BATCH_SIZE, NUM_VIDEOS = 10, 4, 20  # five steps an epoch
# What adding up gradients in another order may come to after STEPS steps at this rate; the weights move by 1e-2.
TOLERANCE = 2e-4
FLAGS = [
    *("--kind", "ae", "--frames", "5", "--sizes", "16x16", "--batch-size", str(BATCH_SIZE), "--draws-per-video", "1"),
    *("--steps", str(STEPS), "--warmup-steps", "0", "--checkpoint-every", "2", "--keep-every", "2"),
    *("--threads", "1", "--decode-workers", "2", "--normaliser-batches", "1"),
]


def kill_a_rank(run: Path, ranks: list[psutil.Process], decoding: list[psutil.Process]) -> None:
    """Once there is a checkpoint, kill -9 a rank that is not the first; gives all ranks and their decode processes."""
    while not list(run.glob("checkpoints/*/checkpoint.json")):
        time.sleep(0.02)
    ranks += [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in name_of(process)]
    children = [child for rank in ranks for child in rank.children()]
    decoding += [child for child in children if "pipeline.decode.child" in name_of(child)]
    max(ranks, key=lambda process: process.pid).kill()


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def draws(run: Path) -> dict[int, list[list[Any]]]:
    """The draws of every step, those of rank 0 first."""
    steps: dict[int, list[list[Any]]] = {}
    for line in sorted(read_history(LocalStorage(run)), key=lambda line: line["step"]):
        steps.setdefault(line["step"], []).extend(line["draws"])
    return steps


@pytest.mark.parametrize(("placement", "decode_processes"), [("worker", 2), ("cluster", 0)])
def test_a_killed_rank_costs_nothing_but_time(
    ray_cluster: None, tmp_path: Path, placement: str, decode_processes: int
) -> None:
    write_numbered_shards(tmp_path, 2, NUM_VIDEOS // 2)
    shards = str(tmp_path / "*.tar")
    ranks: list[psutil.Process] = []
    decoding: list[psutil.Process] = []
    killer = threading.Thread(target=kill_a_rank, args=(tmp_path / "two.run", ranks, decoding), daemon=True)
    killer.start()
    threads = torch.get_num_threads()
    more = ["--workers", "2", "--decode-placement", placement]
    assert main(["train", shards, "--output", str(tmp_path / "two"), *FLAGS, *more]) == 0
    killer.join(timeout=0)
    assert len(ranks) == 2
    assert len(decoding) == decode_processes  # --decode-workers of this machine, shared by its ranks
    assert not [process for process in decoding if process.is_running()]
    assert len(list((tmp_path / "two.run/log").glob("events*"))) == 2, "the ranks did not start again"
    assert main(["train", shards, "--output", str(tmp_path / "one"), *FLAGS, "--local"]) == 0
    torch.set_num_threads(threads)

    steps = draws(tmp_path / "two.run")
    assert steps == draws(tmp_path / "one.run")
    assert list(steps) == list(range(1, STEPS + 1))
    for epoch in range(STEPS * BATCH_SIZE // NUM_VIDEOS):
        keys = Counter(key for batch in steps.values() for _, of_epoch, _, key in batch if of_epoch == epoch)
        assert len(keys) == NUM_VIDEOS
        assert set(keys.values()) == {1}

    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    differences = [(two[name] - one[name]).abs().max().item() for name in one]
    assert max(differences) < TOLERANCE
    means = [json.loads((tmp_path / name / "config.json").read_text())["normaliser"]["mean"] for name in ("two", "one")]
    torch.testing.assert_close(torch.tensor(means[0]), torch.tensor(means[1]), atol=1e-3, rtol=0)
