"""Train our autoencoder from batches of frames, and measure its normaliser.

In:   an iterator of uint8 clips, B T H W 3 (numpy or torch, any mix of sizes on the model's grid), and a limit.
Out:  TrainedVae: the averaged (EMA) model in eval mode, its normaliser, the steps made, the last losses.
Cost: one forward and one backward pass per step; memory is that of one batch, and two copies of the weights.
Errors: ValueError for settings that cannot be, too few batches, or a loss that is no longer finite.

With `steps` alone, the result is a pure function of config, settings and batches on one machine and thread count.
With `time_limit_seconds` the number of steps depends on the machine.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.losses import haar_pyramid_loss, l1_loss
from models.normaliser import NormaliserMeter
from models.pixels import to_pixels
from models.vae import CausalVae

if TYPE_CHECKING:
    import numpy as np

    from models.config import VaeConfig
    from models.spec import Normaliser

Progress = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults bring the tiny presets to a recognisable picture in about a minute of two CPU threads.

    ema_decay: upper bound; early in training the average is as short as (1 + step) / (10 + step).
    normaliser_batches: drawn from the same iterator after the last step.
    """

    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.05
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.98
    haar_weight: float = 0.5
    kl_weight: float = 1e-6
    normaliser_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "normaliser_batches"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "haar_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("ema_decay", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class TrainedVae:
    """What training leaves: everything that a checkpoint holds, and how it went."""

    model: CausalVae
    normaliser: Normaliser
    steps: int
    losses: Mapping[str, float]


@dataclasses.dataclass
class _Limit:
    """How much of the training is done, 0 to 1, by steps or by the clock, whichever is further."""

    steps: int | None
    seconds: float | None
    started: float = dataclasses.field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_time = (time.monotonic() - self.started) / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))


def train_vae(
    config: VaeConfig,
    batches: Iterator[np.ndarray | Tensor],
    *,
    steps: int | None = None,
    time_limit_seconds: float | None = None,
    settings: TrainSettings | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TrainedVae:
    """Train from random weights until `steps` or `time_limit_seconds`, whichever comes first.

    `progress(step, losses)` is called after every step with the step's number, from 1, and its losses by name.

    Raises:
        ValueError: no limit is given, the batches run out, or the loss is not finite.
        GeometryError: a batch is not on the model's grid.
    """
    if not any(limit is not None and limit > 0 for limit in (steps, time_limit_seconds)):
        raise ValueError(f"training needs a positive limit, got {steps=} {time_limit_seconds=}")
    settings = settings or TrainSettings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = CausalVae(config).to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    noise = torch.Generator(device).manual_seed(settings.seed)
    limit = _Limit(steps, time_limit_seconds)
    step, done, losses = 0, 0.0, dict[str, float]()
    while done < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(settings, step, done)
        losses = _step(model, optimiser, _next_pixels(batches, device), settings, noise)
        step += 1
        _update_average(average, model, min(settings.ema_decay, (1 + step) / (10 + step)))
        done = limit.progress(step)
        if progress is not None:
            progress(step, losses)
    normaliser = measure_normaliser(average, batches, settings.normaliser_batches)
    return TrainedVae(average, normaliser, step, losses)


@torch.inference_mode()
def measure_normaliser(model: CausalVae, batches: Iterator[np.ndarray | Tensor], num_batches: int) -> Normaliser:
    """Per-channel mean and standard deviation of the posterior means of that many batches."""
    device = next(model.parameters()).device
    meter = NormaliserMeter()
    for _ in range(num_batches):
        meter.update(model.encode(_next_pixels(batches, str(device))).mean)
    return meter.result()


def _step(
    model: CausalVae, optimiser: torch.optim.Optimizer, pixels: Tensor, settings: TrainSettings, noise: torch.Generator
) -> dict[str, float]:
    output = model(pixels, noise)
    l1 = l1_loss(output.pixels, pixels)
    haar = haar_pyramid_loss(output.pixels, pixels)
    loss = l1 + settings.haar_weight * haar + settings.kl_weight * output.penalty
    losses = {"loss": loss.item(), "l1": l1.item(), "haar": haar.item(), "kl": output.penalty.item()}
    if not math.isfinite(losses["loss"]):
        raise ValueError(f"the loss is not finite: {losses}; lower learning_rate ({settings.learning_rate})")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimiser.step()
    return losses


def _schedule(settings: TrainSettings, step: int, done: float) -> float:
    """Linear warm-up times a cosine from 1 to the final ratio (Loshchilov and Hutter, arXiv:1608.03983)."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (settings.final_learning_rate_ratio + (1 - settings.final_learning_rate_ratio) * cosine)


@torch.no_grad()
def _update_average(average: CausalVae, model: CausalVae, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def _next_pixels(batches: Iterator[np.ndarray | Tensor], device: str) -> Tensor:
    try:
        frames = torch.as_tensor(next(batches))
    except StopIteration as error:
        raise ValueError("the batches ran out: training needs one per step, and more for the normaliser") from error
    return to_pixels(frames, device)
