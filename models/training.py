"""Train an autoencoder from batches of frames in one call, and measure its normaliser.

In:   a Kind, a backbone, and an iterator of uint8 clips, B T H W 3 (numpy or torch, any mix of sizes on the model's
      grid), and a limit.
Out:  TrainedModel: the averaged (EMA) model in eval mode, its normaliser, the steps made, the last losses.
Cost: models.trainer's per step.
Errors: ValueError for settings that cannot be, too few batches, or a loss that is no longer finite.

With `steps` alone, the result is a pure function of kind, settings and batches on one machine and thread count.
With `time_limit_seconds` the number of steps depends on the machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.build import build_model
from models.kinds.kind import Kind, Objective
from models.normaliser import NormaliserMeter
from models.pixels import to_pixels
from models.train_settings import TrainSettings
from models.trainer import Trainer

if TYPE_CHECKING:
    import numpy as np

    from models.config import BackboneConfig
    from models.spec import Normaliser

Progress = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What training leaves: everything that a checkpoint holds, and how it went."""

    model: CausalAutoencoder
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


def train(
    kind: Kind,
    backbone: BackboneConfig,
    batches: Iterator[np.ndarray | Tensor],
    *,
    steps: int | None = None,
    time_limit_seconds: float | None = None,
    settings: TrainSettings | None = None,
    seed: int = 0,
    normaliser_batches: int = 8,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TrainedModel:
    """Train from random weights until `steps` or `time_limit_seconds`, whichever comes first.

    The normaliser is measured on the `normaliser_batches` that follow the last step's.
    `seed` is of the weights and of the noise that kinds add.
    `progress(step, losses)` is called after every step with the step's number, from 1, and its losses by name.

    Raises:
        ValueError: no limit is given, the batches run out, or the loss is not finite.
        GeometryError: a batch is not on the model's grid.
    """
    if normaliser_batches < 1:
        raise ValueError(f"normaliser_batches must be at least 1, got {normaliser_batches}")
    if not any(limit is not None and limit > 0 for limit in (steps, time_limit_seconds)):
        raise ValueError(f"training needs a positive limit, got {steps=} {time_limit_seconds=}")
    trainer = Trainer(random_objective(kind, backbone, seed).to(device), settings or TrainSettings(), seed=seed)
    limit = _Limit(steps, time_limit_seconds)
    done, losses = 0.0, dict[str, float]()
    while done < 1.0:
        losses = trainer.train_step(_next_pixels(batches, device), done)
        done = limit.progress(trainer.step)
        if progress is not None:
            progress(trainer.step, losses)
    normaliser = measure_normaliser(trainer.average, batches, normaliser_batches)
    return TrainedModel(trainer.average, normaliser, trainer.step, losses)


def random_objective(kind: Kind, backbone: BackboneConfig, seed: int) -> Objective:
    """A kind's objective around a new model, whose weights follow from the seed; the global seed is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.objective(build_model(kind.model_config(backbone)))


@torch.inference_mode()
def measure_normaliser(
    model: CausalAutoencoder, batches: Iterator[np.ndarray | Tensor], num_batches: int | None = None
) -> Normaliser:
    """Per-channel mean and standard deviation of the posterior means of that many batches; None takes all there are."""
    device = str(next(model.parameters()).device)
    meter = NormaliserMeter()
    if num_batches is None:
        for frames in batches:
            meter.update(model.encode(to_pixels(torch.as_tensor(frames), device)).mean)
    else:
        for _ in range(num_batches):
            meter.update(model.encode(_next_pixels(batches, device)).mean)
    return meter.result()


def _next_pixels(batches: Iterator[np.ndarray | Tensor], device: str) -> Tensor:
    try:
        frames = torch.as_tensor(next(batches))
    except StopIteration as error:
        raise ValueError("the batches ran out: training needs one per step, and more for the normaliser") from error
    return to_pixels(frames, device)
