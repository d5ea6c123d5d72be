"""What rank 0 says of a training as it goes: a line now and then, and the log with its film strips.

In:   the steps of the loop.
Out:  lines on stderr; scalars and strips in a TrainLog (jobs.train.log).
Cost: every --log-every steps one encoder pass over a batch, every --strip-every steps the decoder's for one clip.
Errors: those of the log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.progress import format_seconds
from jobs.train.config import LogFlags
from jobs.train.log import TrainLog
from pipeline.filmstrip import film_strip
from pipeline.training_clips import ClipBatch

if TYPE_CHECKING:
    from torch import Tensor

    from models.trainer import Trainer


class Watch:
    """Follows one training on rank 0."""

    def __init__(
        self, flags: LogFlags, directory: Path, run_name: str, settings: Mapping[str, Any], resumed_step: int
    ) -> None:
        self._flags = flags
        self._log = TrainLog(
            directory,
            wandb=flags.wandb,
            mlflow=flags.mlflow,
            run_name=run_name,
            settings=settings,
            resumed_step=resumed_step,
        )
        self._printed = time.monotonic()
        self._forget()
        if resumed_step:
            _say(f"going on from step {resumed_step}")

    def step(
        self,
        trainer: Trainer,
        batch: ClipBatch,
        pixels: Tensor,
        losses: Mapping[str, float],
        *,
        num_clips: int,
        waited_seconds: float,
        learning_rate: float,
        done: float,
    ) -> None:
        """Take in a step; `num_clips` are those of all ranks, `pixels` and `batch` this one's."""
        self._num_clips += num_clips
        self._waited_seconds += waited_seconds
        if time.monotonic() - self._printed >= self._flags.progress_seconds:
            self._printed = time.monotonic()
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            _say(f"step {trainer.step}, {done:.0%} done, {self._rate():.1f} clips/s: {terms}")
        if trainer.step % self._flags.log_every == 0:
            self._write(trainer, pixels, losses, {"train/learning_rate": learning_rate, "train/stage": batch.stage})
        if trainer.step % self._flags.strip_every == 0:
            self._draw(trainer, batch, pixels)

    def evaluated(self, step: int, loss: float) -> None:
        """Take in a held-out loss."""
        self._log.scalars(step, {"held_out/loss": loss})
        _say(f"step {step}: held-out loss {loss:.4g}")

    def close(self) -> None:
        """End the log."""
        self._log.close()

    def _write(
        self, trainer: Trainer, pixels: Tensor, losses: Mapping[str, float], values: Mapping[str, float]
    ) -> None:
        import torch

        from models.training_statistics import code_statistics, grouped, latent_statistics

        seconds = time.monotonic() - self._started
        with torch.no_grad():
            latent = trainer.average.encode(pixels).mean
        pace = {"train/samples_per_second": self._rate(), "train/waiting_share": self._waited_seconds / seconds}
        statistics = latent_statistics(latent) | code_statistics(trainer.model)
        self._log.scalars(trainer.step, {**grouped(losses), **values, **pace, **statistics})
        self._forget()

    def _draw(self, trainer: Trainer, batch: ClipBatch, pixels: Tensor) -> None:
        import torch

        from models.pixels import to_frames

        with torch.no_grad():
            reconstruction = to_frames(trainer.average.decode(trainer.average.encode(pixels[:1]).mean))[0].numpy()
        strip = film_strip(batch.frames[0], reconstruction, batch.draws[0].source.key, f"step {trainer.step}")
        self._log.strip(trainer.step, "reconstruction", np.asarray(strip))

    def _rate(self) -> float:
        return self._num_clips / (time.monotonic() - self._started)

    def _forget(self) -> None:
        self._started = time.monotonic()
        self._num_clips, self._waited_seconds = 0, 0.0


def report_end(finished: Mapping[str, Any]) -> None:
    """What is said when a training has ended."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in finished["losses"].items())
    print(f"trained for {finished['step']} steps in {format_seconds(finished['seconds'])}: {losses}")
    if finished["taken_step"] != finished["step"]:
        print(f"the best was that of step {finished['taken_step']}")
    if finished["failed"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in finished["failed"].items())
        _say(f"clips that could not be decoded, each shown by another: {reasons}")


def _say(text: str) -> None:
    # Not by print, of which Ray Train makes two lines.
    sys.stderr.write(f"train: {text}\n")
    sys.stderr.flush()
