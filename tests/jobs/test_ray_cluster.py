"""What an encode worker gets of its node."""

import pytest

from jobs import flags as flags_module
from jobs.flags import EngineFlags
from jobs.ray_cluster import Node, NodeShare, node_share
from pipeline.errors import JobError

GPU_NODE, CPU_NODE = Node(cpus=128, gpus=8), Node(cpus=64, gpus=0)


@pytest.mark.parametrize(
    ("nodes", "flags", "expected"),
    [
        # Eight workers on each GPU node; nodes without a GPU decode nothing.
        ([GPU_NODE, GPU_NODE, CPU_NODE], EngineFlags(workers=16), NodeShare(16, 15)),
        ([GPU_NODE, Node(cpus=64, gpus=8)], EngineFlags(workers=16), NodeShare(8, 7)),
        ([GPU_NODE], EngineFlags(workers=2), NodeShare(64, 63)),
        ([GPU_NODE], EngineFlags(workers=2, decode_workers=24), NodeShare(13, 12)),
        ([Node(cpus=8, gpus=8)], EngineFlags(workers=8), NodeShare(1, 1)),  # never none, though all CPUs are taken
        ([GPU_NODE], EngineFlags(workers=8, decode_placement="cluster"), NodeShare(1, None)),
    ],
)
def test_gpu_workers_share_their_node(nodes: list[Node], flags: EngineFlags, expected: NodeShare) -> None:
    assert node_share(nodes, flags, on_gpu=True) == expected


def test_cpu_workers_spread_over_the_nodes_that_can_hold_one() -> None:
    nodes = [Node(cpus=0, gpus=0), CPU_NODE, CPU_NODE]
    assert node_share(nodes, EngineFlags(workers=3, encode_threads=8), on_gpu=False) == NodeShare(32, 24)
    assert node_share([Node(cpus=2, gpus=0), CPU_NODE], EngineFlags(), on_gpu=False) == NodeShare(64, 63)


def test_workers_for_whom_there_is_no_room_take_nothing_from_the_others() -> None:
    assert node_share([GPU_NODE], EngineFlags(workers=20), on_gpu=True) == NodeShare(16, 15)


@pytest.mark.parametrize(("workers", "expected"), [(1, NodeShare(4, 2)), (2, NodeShare(3, 1)), (4, NodeShare(2, 1))])
def test_a_cluster_of_this_machine_is_shared_out_whole(workers: int, expected: NodeShare) -> None:
    flags = EngineFlags(workers=workers, encode_threads=2, decode_workers=2)
    node = Node(cpus=flags.cluster_cpus, gpus=0)
    assert node_share([node], flags, on_gpu=False) == expected


@pytest.mark.parametrize(
    ("nodes", "workers", "on_gpu", "numbers"),
    [
        ([Node(cpus=8, gpus=8)], 8, True, "8 CPUs, and 8 workers with 1 each"),
        ([Node(cpus=8, gpus=8), Node(cpus=0, gpus=0)], 9, True, "8 CPUs, and 8 workers with 1 each"),
        ([Node(cpus=4, gpus=0), Node(cpus=4, gpus=0)], 4, False, "8 CPUs, and 4 workers with 2 each"),
    ],
)
def test_workers_that_leave_no_cpu_for_decode_tasks_are_refused(
    nodes: list[Node], workers: int, on_gpu: bool, numbers: str
) -> None:
    flags = EngineFlags(workers=workers, encode_threads=2, decode_placement="cluster")
    with pytest.raises(JobError, match=f"the cluster has {numbers} leave none for --decode-placement cluster"):
        node_share(nodes, flags, on_gpu=on_gpu)
    fewer = EngineFlags(workers=3, encode_threads=2, decode_placement="cluster")
    assert node_share(nodes, fewer, on_gpu=on_gpu).decode_processes is None
    more = [*nodes, Node(cpus=1, gpus=0)]
    assert node_share(more, flags, on_gpu=on_gpu).decode_processes is None


def test_a_cluster_that_still_has_to_grow_may_decode_in_tasks() -> None:
    flags = EngineFlags(workers=4, decode_placement="cluster")
    assert node_share([], flags, on_gpu=True) == NodeShare(1, None)
    assert node_share([Node(cpus=0, gpus=0)], flags, on_gpu=False) == NodeShare(1, None)


def test_by_default_a_machine_decodes_with_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags_module, "usable_cores", lambda: 7)
    assert EngineFlags().decode_processes == 7


def test_a_cluster_that_has_no_such_node_yet_decodes_in_tasks() -> None:
    assert node_share([CPU_NODE], EngineFlags(), on_gpu=True) == NodeShare(1, None)
    assert node_share([CPU_NODE], EngineFlags(encode_threads=65), on_gpu=False) == NodeShare(65, None)
    assert node_share([], EngineFlags(), on_gpu=True) == NodeShare(1, None)
