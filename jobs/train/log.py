"""What a training run writes down as it goes: TensorBoard event files always, Weights & Biases and MLflow by flag.

In:   scalars by name ("loss/l1", "train/learning_rate") and film strips, with the optimiser step they belong to.
Out:  event files in a directory, for `tensorboard --logdir`; the same under one run of each tracker that was asked for,
      whose id is kept in the directory, so that a resumed training goes on in it.
Cost: 1 ms for scalars, up to 1 s and some MB for a strip, stored as PNG; the trackers send from threads of their own
      (W&B) or in the call (MLflow).
Errors: UsageError when a tracker's package is not installed, or it does not take the run; OSError when the directory
      cannot be written.

A training that resumes from a checkpoint makes the steps after it again. Each is seen once all the same: TensorBoard
is told to hide what was written after the checkpoint, and a tracker is not sent what it has.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import UsageError

PROJECT = "latentmill"  # W&B's project and MLflow's experiment, where their own settings name no other


class _Sink(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self) -> None: ...


class TrainLog:
    """The log of one training run. Only rank 0 has one."""

    def __init__(
        self,
        directory: Path,
        *,
        wandb: bool = False,
        mlflow: bool = False,
        run_name: str,
        settings: Mapping[str, Any],
        resumed_step: int = 0,
    ) -> None:
        """Open the log, or go on with the one in the directory.

        Args:
            directory: of the event files and the trackers' ids; a resumed training needs the same one.
            wandb: send to Weights & Biases, too, as its own settings (WANDB_...) say where.
            mlflow: send to MLflow, too, as its own settings (MLFLOW_...) say where.
            run_name: what the trackers call the run.
            settings: of the training, for people to compare runs by; may hold mappings of settings.
            resumed_step: optimiser steps of the checkpoint that the training goes on from; 0 for a new one.

        Raises:
            UsageError: the package of `wandb` or `mlflow` is not installed, or the tracker does not take the run.
            OSError: the directory cannot be made, or not be written to.
        """
        packages = [
            require_package(name) if wanted else None for name, wanted in (("wandb", wandb), ("mlflow", mlflow))
        ]
        directory.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_Sink] = [_TensorBoard(directory, settings, resumed_step)]
        if packages[0] is not None:
            self._sinks.append(_Wandb(packages[0], directory, run_name, settings))
        if packages[1] is not None:
            self._sinks.append(_Mlflow(packages[1], directory, run_name, settings))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers down under their names, of which a slash makes groups."""
        for sink in self._sinks:
            sink.scalars(step, values)

    def strip(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image down, uint8 H W 3, as pipeline.filmstrip draws them.

        Raises:
            ValueError: the image has another shape or dtype.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"a film strip is uint8 H W 3, got {image.dtype} {image.shape}")
        for sink in self._sinks:
            sink.image(step, name, image)

    def close(self) -> None:
        """Send what is waiting, and end the trackers' runs."""
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, directory: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first_step = resumed_step + 1 if resumed_step else 0  # the checkpoint's own step was logged before it
        self._writer: Any = SummaryWriter(str(directory), purge_step=first_step)
        text = json.dumps(settings, indent=4, default=str)
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()), first_step)
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run that exists ignores steps before its last one of its own accord."""

    def __init__(self, wandb: Any, directory: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        self._wandb = wandb
        known = directory / "wandb_run_id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex, encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_name,
                id=known.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(directory),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise UsageError(f"--wandb: the run cannot be started: {error}; is `wandb login` done?") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run keeps a second value of a step beside the first, so that "step", sent each time, tells what it has."""

    def __init__(self, mlflow: Any, directory: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        known = directory / "mlflow_run_id"
        try:
            self._sent_step = self._resume(known) if known.exists() else self._start(known, run_name, settings)
        except mlflow.exceptions.MlflowException as error:
            raise UsageError(f"--mlflow: the run cannot be started: {error}; is MLFLOW_TRACKING_URI right?") from error

    def _resume(self, known: Path) -> int:
        run = self._mlflow.start_run(run_id=known.read_text(encoding="utf-8"))
        return int(run.data.metrics.get("step", -1))

    def _start(self, known: Path, run_name: str, settings: Mapping[str, Any]) -> int:
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self._mlflow.set_experiment(PROJECT)
        run = self._mlflow.start_run(run_name=run_name)
        self._mlflow.log_params(_flat(settings))
        known.write_text(run.info.run_id, encoding="utf-8")
        return -1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._sent_step:
            self._mlflow.log_metrics({**values, "step": float(step)}, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        if step > self._sent_step:
            self._mlflow.log_image(image, key=name, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def require_package(package: str) -> Any:
    """A tracker's module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--{package} needs the package {error.name}, which is not installed: `pip install {error.name}`, or leave "
            f"--{package} out"
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
