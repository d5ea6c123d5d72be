"""The codebook by itself: searches, sums, its first placing, the window of use, and ranks that learn as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.bottlenecks import codebook as codebook_module
from models.bottlenecks.codebook import Codebook, match_float16, nearest, sum_by_code
from models.bottlenecks.config import Vq
from models.bottlenecks.registry import build_bottleneck
from models.bottlenecks.usage import WINDOW_STEPS, UsageWindow, perplexity

CHANNELS = 8


def test_kmeans_brings_the_codes_to_the_centres():
    torch.manual_seed(0)
    book = Codebook(Vq(codebook_size=2, revive_below=0.0, ema_decay=1.0), 1).train()
    rows = torch.cat([torch.linspace(-11, -9, 50), torch.linspace(9, 11, 30)]).unsqueeze(1)
    book(rows)
    assert torch.allclose(book.weight.flatten().sort().values, torch.tensor([-10.0, 10.0]), atol=1e-4)
    assert sorted(book.counts.tolist()) == [30, 50]


def test_memory_of_a_search_is_bounded_by_rows_in_pieces(monkeypatch):
    rows, codes = torch.randn(100, 4), torch.randn(32, 4)
    ids, matched, sums = nearest(rows, codes), match_float16(rows, codes), sum_by_code(rows, torch.arange(100) % 32, 32)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sizes.append((out := addmm(*a, **k)).numel()) or out)
    monkeypatch.setattr(codebook_module, "MAX_DISTANCES", 300)
    assert torch.equal(nearest(rows, codes), ids)
    assert torch.equal(match_float16(rows, codes), matched)
    assert torch.allclose(sum_by_code(rows, torch.arange(100) % 32, 32), sums)
    assert max(sizes) <= 300
    assert sum(sizes) == 3200


def test_a_search_far_from_the_origin_loses_nothing_to_rounding():
    codes = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(codes + 1000, codes + 1000), torch.arange(64))


def test_codes_as_close_as_float16_allows_are_told_apart():
    codes = torch.full((CHANNELS, CHANNELS), 100.0, dtype=torch.float16)
    one_step_more = torch.nextafter(codes, codes + 1)
    codes = torch.where(torch.eye(CHANNELS) > 0, one_step_more, codes).float()
    assert torch.equal(match_float16(codes, codes), torch.arange(CHANNELS))
    assert torch.equal(match_float16(codes, torch.cat([codes, codes])), torch.arange(CHANNELS))
    codes = torch.tensor([[100.03, 100.03], [100.0, 100.04]])  # rounded, the first lies nearer to the second
    assert match_float16(codes.half(), codes).tolist() == [0, 1]


def test_the_window_counts_steps_and_perplexity_is_of_shares():
    window = UsageWindow(4)
    both, one = torch.tensor([2.0, 2.0, 0.0, 0.0]), torch.tensor([3.0, 0.0, 0.0, 0.0])
    first = window(both)
    assert {name: value.item() for name, value in first.items()} == pytest.approx(
        {"usage": 0.5, "perplexity": 2.0, "window_usage": 0.5, "window_perplexity": 2.0}
    )
    later = [window(one) for _ in range(WINDOW_STEPS)]
    assert later[-2]["window_usage"] == 0.5
    assert later[-1]["window_usage"] == 0.25
    assert (later[0]["usage"], later[0]["perplexity"]) == (0.25, 1.0)
    shares = torch.tensor([0.5, 0.5]) / WINDOW_STEPS * (1 - 1 / WINDOW_STEPS) ** WINDOW_STEPS
    shares[0] += 1 - (1 - 1 / WINDOW_STEPS) ** WINDOW_STEPS
    assert later[-1]["window_perplexity"].item() == pytest.approx(perplexity(shares).item(), rel=1e-4)
    assert perplexity(torch.zeros(4)) == 1


RANK_PROGRAM = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from models.bottlenecks.config import ResidualVq, Vq
from models.bottlenecks.registry import build_bottleneck
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
data = torch.Generator().manual_seed(7)
batches = [torch.randn(3, 8, 1, 4, 4, generator=data) for _ in range(6)]  # rank 0 takes two clips of each, rank 1 one
configs = {
    "plain": Vq(codebook_size=16, ema_decay=0.5, revive_below=0.0),
    "revived": Vq(codebook_size=64, ema_decay=0.5, revive_below=0.9),
    "learned": Vq(codebook_size=16, update="gradient", revive_below=0.9, ema_decay=0.5),
    "residual": ResidualVq(codebook_size=32, num_quantisers=2, revive_below=0.5, quantiser_dropout=0.5),
}
for name, config in configs.items():
    torch.manual_seed(0)
    bottleneck = build_bottleneck(config, 8).train()
    if name == "plain":
        bottleneck.codebook.initialised.fill_(True)
    torch.manual_seed(rank)  # ranks draw differently from here on
    for batch in batches:
        bottleneck(batch[:2] if rank == 0 else batch[2:])
    save_file(bottleneck.state_dict(), f"{folder}/{name}-{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_learn_one_codebook(tmp_path):
    root = Path(codebook_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=100) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for name in ("plain", "revived", "learned", "residual"):
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(value.isfinite().all() for value in first.values()), name
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    torch.manual_seed(0)
    alone = build_bottleneck(Vq(codebook_size=16, ema_decay=0.5, revive_below=0.0), CHANNELS).train()
    alone.codebook.initialised.fill_(value=True)
    data = torch.Generator().manual_seed(7)
    for _ in range(6):
        alone(torch.randn(3, CHANNELS, 1, 4, 4, generator=data))
    together = load_file(tmp_path / "plain-0.safetensors")
    assert torch.equal(together["codebook.usage.steps_unused"], alone.codebook.usage.steps_unused)
    for name, value in alone.state_dict().items():
        assert torch.allclose(value.float(), together[name].float(), atol=1e-5), name
