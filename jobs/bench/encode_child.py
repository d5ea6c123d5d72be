"""What people run today, each in a process of its own: scripts that decode, encode and save the same clips as a plan.

In:   a JSON file: {"contender", "encoder", "device", "compute_dtype", "decode_workers", "encode_threads", "batch_size",
      "shards", "samples", "output"}; see Work.
Out:  latents in the output directory; JSON on stdout, of the monotonic clock: {"ready": when the encoder was loaded and
      the first decode began, whichever came later, "done": when the last latent was written}.
Cost: what is measured.
Errors: a clip that cannot be decoded is skipped, as these scripts do; anything else ends the process.

They get what a careful person would give them: samples are read by byte range, decoding starts at the key frame before
a window and stops after it, frames are scaled by the decoder (with PyAV by one scaler per window), clips of one shape
are encoded in batches.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.prepare import open_encoder

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """The clips of one sample: windows of `num_frames` at `starts`, cut from the middle of `cover` to height x width.

    payload: the sample's bytes, where they have been read already.
    """

    shard: str
    key: str
    offset: int
    size_bytes: int
    starts: tuple[int, ...]
    num_frames: int
    height: int
    width: int
    cover: tuple[int, int]
    payload: bytes | None = None

    def read(self) -> bytes:
        """The sample's video or image."""
        if self.payload is not None:
            return self.payload
        with open(self.shard, "rb") as file:  # noqa: PTH123 (what people write)
            file.seek(self.offset)
            return file.read(self.size_bytes)

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """The middle of frames [N, cover height, cover width, 3]."""
        top, left = (self.cover[0] - self.height) // 2, (self.cover[1] - self.width) // 2
        return frames[:, top : top + self.height, left : left + self.width]


Decode = Callable[[Work], list[np.ndarray]]


def works_of(spec: Json) -> Iterator[Work]:
    """All samples of all shards."""
    for shard in spec["shards"]:
        for sample in spec["samples"]:
            lists = {"starts": tuple(sample["starts"]), "cover": tuple(sample["cover"])}
            yield Work(shard=shard, **{**sample, **lists})


def decode_pyav(work: Work, thread_count: int = 1) -> list[np.ndarray]:
    """uint8 clips T H W 3; none of a bad video. Every thread_count but 1 lets FFmpeg decode frames side by side."""
    import av

    try:
        with av.open(io.BytesIO(work.read())) as container:
            stream = container.streams.video[0]
            stream.thread_count = thread_count
            stream.thread_type = "AUTO"
            clips = [_window(container, stream, work, start) for start in work.starts]
    except (av.FFmpegError, IndexError):
        return []
    return [work.cut(clip) for clip in clips if len(clip) == work.num_frames]


def _window(container: Any, stream: Any, work: Work, start: int) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    first = stream.start_time or 0
    if start:
        first += round(start / stream.average_rate / stream.time_base)
        container.seek(first, stream=stream)
    height, width = work.cover
    frames: list[np.ndarray] = []
    scaler = VideoReformatter()
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts >= first:
            scaled = scaler.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1)
            frames.append(scaled.to_ndarray())
        if len(frames) == work.num_frames:
            break
    return np.stack(frames) if frames else np.empty((0, height, width, 3), np.uint8)


def decode_decord(work: Work) -> list[np.ndarray]:
    """The same with decord; images go to PyAV, since decord cannot read them."""
    import decord

    if work.num_frames == 1:
        return decode_pyav(work)
    height, width = work.cover
    try:
        reader = decord.VideoReader(io.BytesIO(work.read()), height=height, width=width, num_threads=1)
        frames = reader.get_batch([start + k for start in work.starts for k in range(work.num_frames)]).asnumpy()
    except (decord.DECORDError, IndexError, RuntimeError):
        return []
    return list(work.cut(frames).reshape(len(work.starts), work.num_frames, work.height, work.width, 3))


class Batcher:
    """Encodes clips of one shape together; `save` takes each clip's name and float16 latent."""

    def __init__(self, spec: Json, save: Callable[[str, torch.Tensor], None]) -> None:
        torch.set_num_threads(spec["encode_threads"])
        self._encoder = open_encoder(spec["encoder"], spec["device"], spec["compute_dtype"])
        self._batch_size, self._save = spec["batch_size"], save
        self._waiting: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = defaultdict(list)

    def add(self, name: str, clip: np.ndarray) -> None:
        """Encode when there is a batch."""
        waiting = self._waiting[clip.shape]
        waiting.append((name, clip))
        if len(waiting) == self._batch_size:
            self._encode(waiting)

    def finish(self) -> None:
        """Encode what is left."""
        for waiting in self._waiting.values():
            if waiting:
                self._encode(waiting)

    def _encode(self, waiting: list[tuple[str, np.ndarray]]) -> None:
        latents = self._encoder.encode(torch.from_numpy(np.stack([clip for _, clip in waiting]))).mean.half()
        for (name, _), latent in zip(waiting, latents, strict=True):
            self._save(name, latent)
        waiting.clear()


def name_of(work: Work, number: int) -> str:
    """A name that no other clip has."""
    return f"{Path(work.shard).stem}_{work.key}_{number}"


def _file_saver(output: str) -> Callable[[str, torch.Tensor], None]:
    return lambda name, latent: torch.save(latent.clone(), Path(output) / f"{name}.pt")


def run_plain(spec: Json, works: Sequence[Work]) -> float:
    """A loop in one process."""
    batcher = Batcher(spec, _file_saver(spec["output"]))
    ready = time.monotonic()
    for work in works:
        for number, clip in enumerate(decode_pyav(work, thread_count=0)):
            batcher.add(name_of(work, number), clip)
    batcher.finish()
    return ready


class _Samples(torch.utils.data.Dataset[tuple[float, Work, list[np.ndarray]]]):
    def __init__(self, works: Sequence[Work], decode: Decode) -> None:
        self._works, self._decode = works, decode

    def __len__(self) -> int:
        return len(self._works)

    def __getitem__(self, number: int) -> tuple[float, Work, list[np.ndarray]]:
        began = time.monotonic()
        return began, self._works[number], self._decode(self._works[number])


def _run_loader(spec: Json, works: Sequence[Work], decode: Decode) -> float:
    batcher = Batcher(spec, _file_saver(spec["output"]))
    loader: Iterable[tuple[float, Work, list[np.ndarray]]] = torch.utils.data.DataLoader(
        _Samples(works, decode),
        batch_size=None,
        num_workers=spec["decode_workers"],
        prefetch_factor=4,
        multiprocessing_context="spawn",  # decord hangs in forked workers
    )
    ready: float | None = None
    for began, work, clips in loader:
        ready = ready or began
        for number, clip in enumerate(clips):
            batcher.add(name_of(work, number), np.asarray(clip))
    batcher.finish()
    assert ready is not None
    return ready


def run_dataloader(spec: Json, works: Sequence[Work]) -> float:
    """A torch DataLoader whose workers decode with PyAV."""
    return _run_loader(spec, works, decode_pyav)


def run_decord(spec: Json, works: Sequence[Work]) -> float:
    """A torch DataLoader whose workers decode with decord."""
    return _run_loader(spec, works, decode_decord)


def run_ray_data(spec: Json, works: Sequence[Work]) -> float:
    """Ray Data: read_webdataset, a map that decodes, an actor that encodes, a write of parquet."""
    if importlib.util.find_spec("pandas") is None:
        raise ModuleNotFoundError("read_webdataset of Ray Data needs pandas: pip install pandas")
    import ray

    by_name = {(Path(work.shard).name, work.key): work for work in works}
    marks = Path(spec["output"]).parent / "marks"
    marks.mkdir()
    ray.init(
        num_cpus=spec["decode_workers"] + spec["encode_threads"],
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=2 << 30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def mark(stage: str) -> None:
        """When one of its processes began."""
        (marks / f"{stage} {time.monotonic()}").touch()

    def first(stage: str) -> float:
        return min(float(path.name.split()[1]) for path in marks.glob(f"{stage} *"))

    def decode(row: Json) -> list[Json]:
        if not any(marks.glob("decode *")):
            mark("decode")
        work = by_name[Path(row["path"]).name, row["__key__"]]
        payload = next(row[name] for name in ("mp4", "jpg") if isinstance(row.get(name), bytes))  # absent ones are NaN
        clips = decode_pyav(dataclasses.replace(work, payload=payload))
        return [{"name": name_of(work, number), "frames": clip} for number, clip in enumerate(clips)]

    class Encode:
        """Keeps the encoder loaded."""

        def __init__(self) -> None:
            self._latents: Json = {"name": [], "latent": [], "shape": []}
            self._batcher = Batcher(spec, self._save)
            mark("encode")

        def _save(self, name: str, latent: torch.Tensor) -> None:
            for column, value in zip(
                self._latents.values(), (name, latent.numpy().tobytes(), str(tuple(latent.shape))), strict=True
            ):
                column.append(value)

        def __call__(self, batch: Json) -> Json:
            for values in self._latents.values():
                values.clear()
            for name, frames in zip(batch["name"], batch["frames"], strict=True):
                self._batcher.add(str(name), np.asarray(frames))
            self._batcher.finish()
            return {name: np.array(values, dtype=object) for name, values in self._latents.items()}

    (
        ray.data.read_webdataset(spec["shards"], decoder=None, include_paths=True)
        .flat_map(decode)
        .map_batches(
            Encode,
            batch_size=spec["batch_size"],
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=spec["encode_threads"],
            num_gpus=1 if spec["device"] == "cuda" else 0,
        )
        .write_parquet(spec["output"])
    )
    return max(first("decode"), first("encode"))


CONTENDERS: dict[str, Callable[[Json, Sequence[Work]], float]] = {
    "plain": run_plain,
    "dataloader": run_dataloader,
    "decord": run_decord,
    "ray-data": run_ray_data,
}


def main() -> None:
    """Run one contender once."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    spec = json.loads(Path(sys.argv[1]).read_text())
    ready = CONTENDERS[spec["contender"]](spec, list(works_of(spec)))
    print(json.dumps({"ready": ready, "done": time.monotonic()}), file=reply, flush=True)


if __name__ == "__main__":
    main()
