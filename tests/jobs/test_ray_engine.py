"""What the Ray engine adds to the engine that every other test uses. (Whole jobs on Ray: tests/end_to_end.)"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jobs.__main__ import main
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.errors import DecodeError, ShardError
from tests.clips import numbered_video, read_number, stored
from tests.fakes import write_numbered_shards

pytestmark = pytest.mark.ray


def request(source: MediaSource, *windows: Window) -> DecodeRequest:
    return DecodeRequest(source, Grid(), windows, ClipShape(96, 96))


def test_a_decode_task_gives_frames_and_errors_as_a_process_does(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    decoders = RayDecoders(DecodeLimits())
    video = stored(tmp_path, numbered_video(num_frames=20))
    pending = decoders.submit(request(video, Window(11, 2), Window(3, 1), Window(19, 4)))
    late, early, beyond = pending.result()
    assert isinstance(late, DecodedClip)
    assert isinstance(early, DecodedClip)
    assert [read_number(frame) for frame in (*late.frames, *early.frames)] == [11, 12, 3]
    assert isinstance(beyond, DecodeError)
    assert (beyond.reason, beyond.detail) == ("past_end", "clip: positions 19 to 22 reach past the video's end")


def test_errors_of_the_input_cross_the_cluster_as_themselves(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    missing = MediaSource(str(tmp_path / "gone.tar"), 0, 100, "video", "key")
    with pytest.raises(ShardError, match=r"cannot read shard .*gone\.tar") as caught:
        RayDecoders(DecodeLimits()).submit(request(missing, Window(0, 1))).result()
    assert type(caught.value) is ShardError


def test_a_long_clip_comes_in_pieces_as_from_a_process(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_decode import RayDecoders

    decoders = RayDecoders(DecodeLimits())
    video = stored(tmp_path, numbered_video(num_frames=60))
    pieces = list(decoders.stream(request(video, Window(3, 50)), 8))
    assert [read_number(frame) for piece in pieces for frame in piece.frames] == list(range(3, 53))
    assert [len(piece.frames) for piece in pieces] == [8] * 6 + [2]
    numbers, left = [], decoders.stream(request(video, Window(52, 10)), 4)
    numbers += [read_number(frame) for _ in range(2) for frame in next(left).frames]
    with pytest.raises(DecodeError, match="past_end: clip: positions 52 to 61 reach past the video's end"):
        next(left)
    assert numbers == [52, 53, 54, 55, 56, 57, 58, 59]


def test_a_stream_that_is_dropped_gives_its_cpu_back(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    from jobs.ray_decode import RayDecoders

    def free_cpus() -> float:
        return float(ray.available_resources()["CPU"])  # type: ignore[no-untyped-call]

    pieces = RayDecoders(DecodeLimits()).stream(request(stored(tmp_path, numbered_video(60)), Window(0, 60)), 4)
    assert read_number(next(pieces).frames[0]) == 0
    deadline = time.monotonic() + 20
    while free_cpus() > 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_cpus() == 5  # it waits for its pieces to be taken
    pieces.close()
    while free_cpus() < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_cpus() == 6


@pytest.mark.parametrize("deaths", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_whose_worker_dies_goes_on_from_the_piece_that_is_wanted(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    import ray

    from jobs import ray_decode

    def stream(request: DecodeRequest, piece_frames: int, limits: DecodeLimits):  # type: ignore[no-untyped-def]
        for piece in ray_decode._stream(request, piece_frames, limits):
            marks = [Path(request.source.path).parent / f"death-{number}" for number in range(deaths)]
            left = [mark for mark in marks if not mark.exists()]
            if left and isinstance(piece, DecodedClip) and read_number(piece.frames[0]) == 24:
                left[0].touch()
                os._exit(1)
            yield piece

    monkeypatch.setattr(ray_decode, "_stream_task", ray.remote(num_cpus=1, max_retries=0)(stream))
    video = stored(tmp_path, numbered_video(num_frames=60))
    pieces = ray_decode.RayDecoders(DecodeLimits()).stream(request(video, Window(0, 60)), 8)
    numbers = [read_number(frame) for _ in range(3) for frame in next(pieces).frames]
    assert numbers == list(range(24))
    if deaths == 1:
        assert [read_number(frame) for piece in pieces for frame in piece.frames] == list(range(24, 60))
    else:
        with pytest.raises(DecodeError, match="crash: the decoder's process died 2 times"):
            next(pieces)


def test_long_clips_make_the_same_store_as_without_ray(ray_cluster: None, tmp_path: Path) -> None:
    (shard,) = write_numbered_shards(tmp_path / "shards", 1, 4, broken={"broken": b"no video"})
    stores = []
    for name, more in (("local", ["--local"]), ("ray", ["--decode-placement", "cluster"])):
        store = tmp_path / name
        recipe = ["--encoder", "rehearsal:4x8x8x16@1000", "--frames", "9", "--sizes", "96x96", "--windows", "chunks"]
        engine = ["--stream-mb", "0.1", "--window-mb", "1", "--decode-workers", "2", *more]
        assert main(["encode", str(shard), "--store", str(store), *recipe, *engine]) == 0
        names = [path.relative_to(store) for path in sorted(store.rglob("*")) if path.is_file()]
        stores.append({path: (store / path).read_bytes() for path in names if path.parts[0] != "runs"})
    assert stores[0] == stores[1]
    assert len(stores[0]) > 6
