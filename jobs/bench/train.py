"""`latentmill bench train`: does training wait for clips, and how fast do they come, beside what people use.

In:   shards whose videos are whole (or none: generated ones), a clip's shape, workers; a directory for the result.
Out:  train_<hardware>_<date>.md and .json: clips per second, and the share of time that a trainer waits, of our loader,
      of webdataset with PyAV in its workers, and of torch's DataLoader over loose files.
Cost: minutes: 9 processes per repetition. The clips are copied once, as loose files, into a directory for temporary
      files.
Errors: UsageError when webdataset is not installed, the output is no directory, or there are fewer shards than workers;
        LatentmillError when a loader fails.

Every measurement has a process of its own. The loaders take turns in an order that rotates; ratios are taken within a
round, medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from jobs.bench.about import about, rotated
from jobs.bench.config import BenchTrain
from jobs.bench.train_child import LOADERS, Measurement, StepName, count_products, make_curriculum
from jobs.bench.train_report import to_markdown
from jobs.bench.videos import texture_video
from jobs.flags import ClusterFlags
from jobs.index import index_shards
from pipeline.epoch import Draw
from pipeline.errors import LatentmillError, UsageError
from pipeline.storage import LocalStorage

Json = dict[str, Any]
STEPS: tuple[StepName, ...] = ("none", "sleeping", "busy")
_LEAST_WARM_UP = 8  # batches; ours holds four ready
_SHARDS_PER_WORKER = 2


def run_bench_train(command: BenchTrain) -> int:
    """Measure, write, print. Returns the exit code."""
    if importlib.util.find_spec("webdataset") is None:
        raise UsageError("bench train compares with webdataset, which is not installed: `pip install webdataset`")
    if not command.output.is_dir():
        raise UsageError(f"--output {command.output} is no directory: make it first")
    result: Json = {"about": _about(command)}
    with tempfile.TemporaryDirectory(prefix="latentmill-bench-") as scratch:
        asked = _prepare(command, Path(scratch))
        result["rounds"] = [_round(asked, number) for number in range(command.repetitions)]
    text = to_markdown(result)
    name = f"train_{command.hardware}_{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    (command.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (command.output / f"{name}.md").write_text(text)
    print(text)
    return 0


def _prepare(command: BenchTrain, scratch: Path) -> Measurement:
    """Index, loose files, the list of all clips, and how much work a busy step is."""
    shards = command.shards or _generate_shards(command, scratch / "shards")
    index, clips = scratch / "index", scratch / "clips.json"
    flags = ClusterFlags(decode_workers=command.decode_workers, local=True)
    found = index_shards(LocalStorage(index), shards, flags)
    if len(found) < command.decode_workers:
        raise UsageError(
            f"{len(found)} shards for --decode-workers {command.decode_workers}: webdataset shares shards out, so give "
            "at least one for each"
        )
    asked = Measurement(
        index=str(index),
        clips=str(clips),
        frames=command.frames,
        size=command.size,
        batch_size=command.batch_size,
        workers=command.decode_workers,
        threads=command.threads,
        steps=command.steps,
        warm_up=max(_LEAST_WARM_UP, 3 * command.decode_workers),  # a DataLoader holds two ready for each worker
        step_seconds=command.step_seconds,
        products=count_products(command.step_seconds, command.threads),
    )
    clips.write_text(json.dumps(_list_clips(asked, scratch / "loose")))
    return asked


def _generate_shards(command: BenchTrain, directory: Path) -> tuple[str, ...]:
    """Tars of one H.264 video under many keys: content makes no difference to time."""
    directory.mkdir()
    video = texture_video(directory, "h264", command.video_height, command.video_frames).read_bytes()
    paths = [directory / f"shard-{number:05d}.tar" for number in range(_SHARDS_PER_WORKER * command.decode_workers)]
    for path in paths:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(-(-command.videos // len(paths))):
                info = tarfile.TarInfo(f"{number:06d}.mp4")
                info.size = len(video)
                tar.addfile(info, io.BytesIO(video))
    return tuple(map(str, paths))


def _list_clips(asked: Measurement, loose: Path) -> list[Json]:
    """The draws of as many epochs as a measurement takes; writes each video of theirs as a loose file."""
    loose.mkdir()
    order, paths = make_curriculum(asked).order(0), dict[tuple[str, int], Path]()
    clips: list[Json] = []
    num_batches = asked.warm_up + asked.steps + 2 * asked.workers
    for epoch in itertools.count():
        for draw in order.draws(epoch):
            source = draw.source
            path = paths.setdefault((source.path, source.offset), loose / f"{len(paths):06d}")
            if not path.exists():
                path.write_bytes(_read_video(draw))
            clip = {"epoch": epoch, "url": source.path, "key": source.key, "path": str(path)}
            clips.append(clip | {"start": draw.window.start})
        if len(clips) >= num_batches * asked.batch_size:
            break
    return clips


def _read_video(draw: Draw) -> bytes:
    with Path(draw.source.path).open("rb") as shard:
        shard.seek(draw.source.offset)
        return shard.read(draw.source.size_bytes)


def _round(asked: Measurement, number: int) -> Json:
    """{step: {loader: cell}}."""
    loaders = rotated(tuple(LOADERS), number)
    return {
        step: {loader: _measured(dataclasses.replace(asked, loader=loader, step=step)) for loader in loaders}
        for step in STEPS
    }


def _measured(asked: Measurement) -> Json:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench.train_child"],
        input=json.dumps(dataclasses.asdict(asked)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LatentmillError(f"loader {asked.loader!r} under step {asked.step!r} ended with {done.returncode}")
    cell: Json = json.loads(done.stdout)
    print(
        f"{asked.loader}, step {asked.step}: {cell['clips_per_second']:.1f} clips/s, "
        f"waiting {cell['waiting_share']:.1%}",
        file=sys.stderr,
        flush=True,
    )
    return cell


def _about(command: BenchTrain) -> Json:
    videos = "given" if command.shards else f"generated H.264 of {command.video_height}p, {command.video_frames} frames"
    return about(
        "train",
        ("av", "torch", "webdataset"),
        repetitions=command.repetitions,
        steps=command.steps,
        step_seconds=command.step_seconds,
        threads=command.threads,
        workers=command.decode_workers,
        clips=f"{command.frames}x{command.size}x{command.size}, {command.batch_size} a batch, of videos {videos}",
    )
