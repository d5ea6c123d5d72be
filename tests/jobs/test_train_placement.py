"""Where a rank on Ray decodes: its share of a node, and what becomes of its decode processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.flags import EngineFlags, PlacementFlags
from jobs.ray_cluster import Node, NodeShare, node_share
from jobs.train.config import RankFlags
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from tests.clips import numbered_video, read_number, stored

# Ray Train imports it, and it warns itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

GPU_NODE, SMALL_NODE = Node(cpus=128, gpus=8), Node(cpus=8, gpus=0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (RankFlags(workers=8, threads=4), NodeShare(16, 12)),
        (RankFlags(workers=2, threads=4), NodeShare(64, 60)),
        (RankFlags(workers=2, threads=4, decode_workers=24), NodeShare(16, 12)),
        (RankFlags(workers=8, threads=16), NodeShare(16, 1)),  # never none, though all CPUs are taken
        (RankFlags(workers=8, threads=4, decode_placement="cluster"), NodeShare(4, None)),
    ],
)
def test_ranks_share_their_node(flags: RankFlags, expected: NodeShare) -> None:
    assert node_share([GPU_NODE], flags, on_gpu=True) == expected


@pytest.mark.parametrize(("workers", "expected"), [(1, NodeShare(4, 2)), (2, NodeShare(3, 1)), (4, NodeShare(2, 1))])
def test_a_cluster_of_this_machine_is_shared_out_whole(workers: int, expected: NodeShare) -> None:
    flags = RankFlags(workers=workers, threads=2, decode_workers=2)
    assert node_share([Node(cpus=flags.cluster_cpus, gpus=0)], flags, on_gpu=False) == expected


def test_all_ranks_find_room_or_tasks_decode() -> None:
    two = [SMALL_NODE, SMALL_NODE]
    assert node_share(two, RankFlags(workers=2, threads=5), on_gpu=False) == NodeShare(8, 3)
    assert node_share(two, RankFlags(workers=3, threads=5), on_gpu=False) == NodeShare(5, None)
    assert node_share(two, EngineFlags(workers=3, encode_threads=5), on_gpu=False) == NodeShare(8, 3)
    assert node_share(two, RankFlags(threads=9), on_gpu=False) == NodeShare(9, None)


@pytest.mark.parametrize(
    ("share", "flags", "expected"),
    [
        (NodeShare(4, 2), RankFlags(), "decoding beside each worker, processes: 2"),
        (NodeShare(4, None), RankFlags(decode_placement="cluster"), "decoding in tasks on any node"),
        (
            NodeShare(4, None),
            EngineFlags(),
            "decoding in tasks on any node: too few nodes can hold a worker now (`ray status`)",
        ),
    ],
)
def test_the_user_is_told(share: NodeShare, flags: PlacementFlags, expected: str) -> None:
    assert share.told(flags) == expected


def test_ranks_that_decode_beside_them_need_no_frames_in_rays_memory() -> None:
    flags = {"workers": 3, "threads": 2, "decode_workers": 4, "window_mb": 100}
    assert (RankFlags(**flags).cluster_cpus, RankFlags(**flags).object_store_mb) == (10, 128)
    assert RankFlags(**flags, decode_placement="cluster").object_store_mb == 450


def request(source: MediaSource, window: Window) -> DecodeRequest:
    return DecodeRequest(source, Grid(), (window,), ClipShape(96, 96))


def has_ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_rank_that_fails_closes_its_decode_processes(tmp_path: Path) -> None:
    from jobs.train.on_ray import open_decoders

    pids: list[int] = []

    def fail() -> None:
        with open_decoders(2, DecodeLimits()) as decoders:
            assert isinstance(decoders, ProcessPool)
            pids.extend(decoders.pids)
            raise ValueError("the loss is not finite")

    with pytest.raises(ValueError, match="loss"):
        fail()
    assert len(pids) == 2  # they had started before the first request
    assert all(map(has_ended, pids))


class Rank:
    """A Ray actor that decodes as a rank does."""

    def __init__(self) -> None:
        from jobs.train.on_ray import open_decoders

        self._open = open_decoders(2, DecodeLimits())
        self._pool = self._open.__enter__()

    def decode(self, request: DecodeRequest) -> Any:
        return self._pool.submit(request).result()

    def die_while_decoding(self, request: DecodeRequest) -> None:
        for _ in range(20):
            self._pool.submit(request)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    def pids(self) -> list[int]:
        return self._pool.pids  # type: ignore[attr-defined,no-any-return]


@pytest.mark.ray
def test_no_decode_process_outlives_a_rank_that_is_killed(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    rank: Any = ray.remote(num_cpus=3)(Rank).remote()
    video = stored(tmp_path, numbered_video(num_frames=60))
    (clip,) = ray.get(rank.decode.remote(request(video, Window(7, 2))))
    assert isinstance(clip, DecodedClip)
    assert [read_number(frame) for frame in clip.frames] == [7, 8]
    pids = ray.get(rank.pids.remote())
    assert len(pids) == 2
    assert not any(map(has_ended, pids))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(rank.die_while_decoding.remote(request(video, Window(0, 60))))
    deadline = time.monotonic() + 10
    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(has_ended, pids))
