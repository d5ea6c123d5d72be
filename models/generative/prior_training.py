"""Train a prior over codes, and measure it in bits per code.

In:   a PriorConfig, batches of grids (models.generative.codes), and a limit.
Out:  TrainedPrior: the prior in eval mode, the steps made, the bits per code of the last of them.
Cost: one forward and one backward pass of the transformer per step.
Errors: ValueError for settings that cannot be, batches that run out, grids that do not fit, a loss that is not finite.

With `steps` alone the result is a pure function of config, settings and batches on one machine and thread count.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.generative.prior import CodePrior
from models.generative.prior_config import PriorConfig
from models.optimiser import ClippedAdamW

Grids = Sequence[Tensor]
Progress = Callable[[int, float], None]

BETAS = (0.9, 0.95)
LAST_STEPS = 20


@dataclasses.dataclass(frozen=True)
class PriorSettings:
    """How to train a prior: linear warm-up, then a cosine down to a tenth of the learning rate."""

    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def rate(self, step: int, done: float) -> float:
        """The learning rate of a step, with that share of the training behind. Loshchilov and Hutter, 1608.03983."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * warmup * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclasses.dataclass(frozen=True)
class TrainedPrior:
    """What training leaves. bits_per_code: the mean of the last steps, each on codes it had not learned from yet."""

    prior: CodePrior
    steps: int
    bits_per_code: float


def train_prior(
    config: PriorConfig,
    batches: Iterator[Grids],
    *,
    steps: int | None = None,
    time_limit_seconds: float | None = None,
    settings: PriorSettings | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TrainedPrior:
    """Train from random weights until `steps` or `time_limit_seconds`, whichever comes first.

    `progress(step, bits_per_code)` is called after every step with the step's number, from 1.

    Raises:
        ValueError: see the module.
    """
    if not any(limit is not None and limit > 0 for limit in (steps, time_limit_seconds)):
        raise ValueError(f"training needs a positive limit, got {steps=} {time_limit_seconds=}")
    settings = settings or PriorSettings()
    prior = _random_prior(config, settings.seed).to(device).train()
    optimiser = ClippedAdamW(prior, BETAS, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)
    started, step, done, history = time.monotonic(), 0, 0.0, list[float]()
    while done < 1.0:
        bits = _learn(prior, optimiser, _next_grids(batches, device), settings.rate(step, done))
        step, history = step + 1, [*history[1 - LAST_STEPS :], bits]
        by_time = (time.monotonic() - started) / time_limit_seconds if time_limit_seconds else 0.0
        done = min(1.0, max(step / steps if steps else 0.0, by_time))
        if progress is not None:
            progress(step, bits)
    prior.eval().requires_grad_(requires_grad=False)
    return TrainedPrior(prior, step, sum(history) / len(history))


@torch.inference_mode()
def measure_bits_per_code(prior: CodePrior, batches: Iterable[Grids]) -> float:
    """-log2 p per code, averaged over all codes of the batches: what coding them with this prior would take.

    Raises:
        ValueError: there is no batch.
    """
    device = str(prior.start.device)
    nats, count = 0.0, 0
    for grids in batches:
        each = prior.nats([grid.to(device) for grid in grids])
        nats, count = nats + each.double().sum().item(), count + each.numel()
    if not count:
        raise ValueError("bits per code need at least one batch of codes, got none")
    return nats / count / math.log(2)


def _random_prior(config: PriorConfig, seed: int) -> CodePrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CodePrior(config)


def _learn(prior: CodePrior, optimiser: ClippedAdamW, grids: Grids, learning_rate: float) -> float:
    loss = prior.nats(grids).mean()
    bits = loss.item() / math.log(2)
    if not math.isfinite(bits):
        raise ValueError(f"the loss is not finite at learning rate {learning_rate:.2g}: lower it")
    torch.autograd.backward(loss)
    optimiser.step(learning_rate)
    return bits


def _next_grids(batches: Iterator[Grids], device: str) -> list[Tensor]:
    try:
        return [grid.to(device) for grid in next(batches)]
    except StopIteration as error:
        raise ValueError("the batches of codes ran out: training needs one per step") from error
