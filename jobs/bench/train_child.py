"""One loader under one kind of training step, in a process of its own.

In:   a Measurement as JSON on stdin.
Out:  JSON on stdout: {"clips_per_second", "waiting_share", "step_seconds", "cpu_seconds"}; the last is of one step and
      of all processes.
Cost: what is measured; `warm_up` batches before it.
Errors: whatever a loader raises ends the process. `webdataset` for the loader of that name.

Every loader gives uint8 B T H W 3 of the same windows of the same videos, stretched to the same size, from as many
worker processes. The other loaders decode as people write it: PyAV from the video's start, one thread per worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset

from pipeline.buckets import BucketConfig
from pipeline.curriculum import Curriculum, Stage
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.epoch import DrawConfig
from pipeline.index import list_fragments, read_fragment
from pipeline.samples import media_kind
from pipeline.storage import LocalStorage
from pipeline.training_clips import TrainingClips

StepName = Literal["none", "sleeping", "busy"]
_MATRIX_SIDE = 384


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What to measure. Videos lie in tars (`index` has their index) and loose; `clips` lists the draws of all epochs.

    loader: one of LOADERS. step_seconds: of a sleeping step. products: matrix products of a busy step.
    """

    index: str
    clips: str
    frames: int
    size: int
    batch_size: int
    workers: int
    threads: int
    steps: int
    warm_up: int
    step_seconds: float
    loader: str = "latentmill"
    step: StepName = "none"
    products: int = 1


def make_curriculum(asked: Measurement) -> Curriculum:
    """One stage of one shape."""
    storage = LocalStorage(asked.index)
    shards = list_fragments(storage)
    draw = DrawConfig(frames=(asked.frames,), batch_size=asked.batch_size)
    sizes = BucketConfig(sizes=(f"{asked.size}x{asked.size}",), fit="stretch")
    return Curriculum([Stage(None, draw, sizes)], 1, len(shards), lambda n: read_fragment(storage, shards[n]))


@contextlib.contextmanager
def _latentmill(asked: Measurement) -> Iterator[Iterator[torch.Tensor]]:
    with ProcessPool(asked.workers, DecodeLimits()) as pool:
        yield (torch.from_numpy(batch.frames) for batch in TrainingClips(make_curriculum(asked), pool))


@contextlib.contextmanager
def _webdataset(asked: Measurement) -> Iterator[Iterator[torch.Tensor]]:
    import webdataset

    clips = _read_clips(asked)
    starts: dict[tuple[str, str], list[int]] = {}
    for clip in clips:
        starts.setdefault((clip["url"], clip["key"]), []).append(clip["start"])
    uses: Counter[tuple[str, str]] = Counter()  # a worker's own: each worker reads shards of its own

    def decode(sample: dict[str, Any]) -> np.ndarray:
        name = sample["__url__"], sample["__key__"]
        uses[name] += 1
        video = next(payload for field, payload in sample.items() if media_kind(f"x.{field}") == "video")
        return decode_window(io.BytesIO(video), starts[name][uses[name] - 1], asked)

    urls = sorted({clip["url"] for clip in clips})
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(100)
    chosen = samples.select(lambda sample: (sample["__url__"], sample["__key__"]) in starts)
    batches = chosen.map(decode).repeat(clips[-1]["epoch"] + 1).batched(asked.batch_size, collation_fn=_stack)
    yield iter(DataLoader(batches, batch_size=None, num_workers=asked.workers))


@contextlib.contextmanager
def _loose_files(asked: Measurement) -> Iterator[Iterator[torch.Tensor]]:
    clips = _LooseClips(asked)
    yield iter(DataLoader(clips, asked.batch_size, num_workers=asked.workers, collate_fn=_stack))


class _LooseClips(Dataset[np.ndarray]):
    """Map-style: a clip per draw, in the order in which our loader draws."""

    def __init__(self, asked: Measurement) -> None:
        self._asked, self._clips = asked, _read_clips(asked)

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, number: int) -> np.ndarray:
        clip = self._clips[number]
        return decode_window(clip["path"], clip["start"], self._asked)


def decode_window(video: str | io.BytesIO, start: int, asked: Measurement) -> np.ndarray:
    """T H W 3: frames from `start` on, by decoding everything before them."""
    with av.open(video, "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = itertools.islice(container.decode(video=0), start, start + asked.frames)
        scaler, size = VideoReformatter(), (asked.size, asked.size)
        sized = (scaler.reformat(frame, *size, "rgb24", interpolation="AREA", threads=1) for frame in frames)
        return np.stack([frame.to_ndarray() for frame in sized])


def _read_clips(asked: Measurement) -> list[dict[str, Any]]:
    clips: list[dict[str, Any]] = json.loads(Path(asked.clips).read_text())
    return clips


def _stack(clips: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(clips))


LOADERS: Mapping[str, Callable[[Measurement], AbstractContextManager[Iterator[torch.Tensor]]]] = {
    "latentmill": _latentmill,
    "webdataset": _webdataset,
    "loose files": _loose_files,
}


def measure(asked: Measurement) -> dict[str, float]:
    """Let the trainer take `steps` batches, waiting for each one and then taking its step."""
    shape = (asked.batch_size, asked.frames, asked.size, asked.size, 3)
    step = _make_step(asked)
    waiting = 0.0
    with LOADERS[asked.loader](asked) as batches:
        for _ in range(asked.warm_up):
            next(batches)
            step()
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        for _ in range(asked.steps):
            asked_at = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - asked_at
            assert batch.shape == shape, f"{asked.loader} gave {batch.shape}, not {shape}"
            step()
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
    return {
        "clips_per_second": asked.steps * asked.batch_size / seconds,
        "waiting_share": waiting / seconds,
        "step_seconds": (seconds - waiting) / asked.steps,
        "cpu_seconds": cpu_seconds / asked.steps,
    }


def _cpu_seconds() -> float:
    """Of this process and its children so far."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    ticks = 0
    for pid in ("self", *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))  # its own and of children that ended, user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _make_step(asked: Measurement) -> Callable[[], None]:
    match asked.step:
        case "none":
            return lambda: None
        case "sleeping":
            return lambda: time.sleep(asked.step_seconds)
        case "busy":
            return lambda: _multiply(asked.products)


def _multiply(products: int) -> None:
    matrix = torch.ones(_MATRIX_SIDE, _MATRIX_SIDE)
    for _ in range(products):
        torch.mm(matrix, matrix)


def count_products(seconds: float, threads: int) -> int:
    """How many matrix products so many threads do in that time with nothing beside them: at the best speed seen."""
    torch.set_num_threads(threads)
    fastest, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < max(seconds, 0.5):
        turn = time.perf_counter()
        _multiply(10)
        fastest = min(fastest, time.perf_counter() - turn)
    return max(1, round(10 * seconds / fastest))


def main() -> None:
    """Measure once."""
    asked = Measurement(**json.load(sys.stdin))
    torch.set_num_threads(asked.threads)
    print(json.dumps(measure(asked)))


if __name__ == "__main__":
    main()
