"""The training loop of one rank: batches, steps, checkpoints, and what the ranks leave behind. No Ray in it.

In:   a TrainJob and some decoders; torch.distributed, where several ranks train together.
Out:  checkpoints, history and log in RUN; at the end `finished.json`, with the normaliser.
Cost: models.trainer's per step; a checkpoint every --checkpoint-every steps.
Errors: those of jobs.train.checkpoints, jobs.train.model and pipeline.training_clips; ValueError for a loss that is not
      finite.

A loop that is killed goes on from the last checkpoint that rank 0 committed. Everything that the next step depends on
is in there or follows from flags and shards, so that on one rank (and one machine and thread count) a resumed training
ends with the bits of an undisturbed one. The order of clips is the same on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.train.checkpoints import Checkpoints, Position, read_finished, write_finished
from jobs.train.config import Train
from jobs.train.history import History, drop_after, failed_clips
from jobs.train.model import make_objective, model_config
from jobs.train.watch import Watch
from models.bottlenecks.ranks import from_first_rank, rank, sum_over_ranks, wait_for_ranks, world_size
from models.checkpoint import read_document
from models.pixels import to_pixels
from models.trainer import Trainer
from models.training import measure_normaliser
from pipeline.curriculum import Curriculum, Stage
from pipeline.decode_requests import Decoders
from pipeline.index import read_fragment
from pipeline.storage import Storage, open_storage
from pipeline.training_clips import ClipBatch, TrainingClips

if TYPE_CHECKING:
    from models.autoencoder import CausalAutoencoder
    from models.kinds.kind import Objective
    from models.spec import Normaliser

OnCheckpoint = Callable[[int, Mapping[str, float]], None]
"""Called by every rank after each checkpoint, with its step and the last losses."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """All that a rank needs to know; plain values, which travel to other machines.

    stages: the last one is without end: `steps` and `seconds` say when to stop.
    shard_ids, held_out_ids: of index fragments in RUN.
    """

    command: Train
    run_url: str
    log_directory: Path
    stages: tuple[Stage, ...]
    steps: int | None
    seconds: float | None
    shard_ids: tuple[str, ...]
    held_out_ids: tuple[str, ...]
    device: str

    def curriculum(self, storage: Storage) -> Curriculum:
        """The order of the clips that are trained on."""
        return self._curriculum(storage, self.stages, self.shard_ids)

    def last_stage(self, storage: Storage, shard_ids: tuple[str, ...]) -> Curriculum:
        """The last stage on its own, of some shards, from its first epoch on."""
        return self._curriculum(storage, self.stages[-1:], shard_ids)

    def _curriculum(self, storage: Storage, stages: tuple[Stage, ...], shard_ids: tuple[str, ...]) -> Curriculum:
        stride = model_config(self.command.model).geometry.spatial_stride
        return Curriculum(stages, stride, len(shard_ids), lambda number: read_fragment(storage, shard_ids[number]))

    def done(self, step: int, seconds: float) -> float:
        """The share of the training that is behind, 0 to 1: by steps or by the clock, whichever is further."""
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_time = seconds / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))


def train_rank(job: TrainJob, decoders: Decoders, on_checkpoint: OnCheckpoint | None = None) -> None:
    """Train until the job is done, from the last checkpoint on."""
    storage = open_storage(job.run_url)
    finished = read_finished(storage)
    if finished is None or finished["take"] != job.command.checkpoints.take:
        _Loop(job, storage, decoders, on_checkpoint).run()


class _Loop:
    def __init__(self, job: TrainJob, storage: Storage, decoders: Decoders, on_checkpoint: OnCheckpoint | None) -> None:
        command = job.command
        self._job, self._storage, self._decoders, self._on_checkpoint = job, storage, decoders, on_checkpoint
        self._objective = make_objective(command.model, command.draw.seed).to(job.device)
        self._objective.model.gradient_checkpointing = command.gradient_checkpointing
        self._trainer = Trainer(
            self._objective, command.settings, seed=command.draw.seed, wrap=lambda module: _parallel(module, job.device)
        )
        self._checkpoints = Checkpoints(storage, command.checkpoints.keep_every)
        self._position = self._resume()
        self._resumed_seconds = self._position.seconds
        self._started: float | None = None  # the clock runs from the first batch on: until then decoders start
        self._losses = self._position.losses
        self._running: list[float] = []
        self._history = History(storage, rank())
        self._clips = self._clips_of(job.curriculum(storage), state=self._position.loader)

    def _resume(self) -> Position:
        step = int(from_first_rank(self._checkpoints.last_step or 0, self._job.device))
        if rank() == 0:
            drop_after(self._storage, step)
        if not step:
            return Position()
        position, tensors = self._checkpoints.load(step)
        self._trainer.load_state_dict(tensors)
        return position

    def run(self) -> None:
        """Train to the end, measure the normaliser, and say how it ended."""
        watch = self._open_watch() if rank() == 0 else None
        batches = iter(self._clips)
        done = self._done()
        while done < 1.0:
            asked = time.monotonic()
            batch = next(batches)
            if self._started is None:
                self._started = asked = time.monotonic()
            waited_seconds = time.monotonic() - asked
            done = self._step(batch, done, waited_seconds, watch)
            self._checkpoint_if_due(batch, done, watch)
        if rank() == 0:
            self._finish()
        if watch is not None:
            watch.close()

    def _step(self, batch: ClipBatch, done: float, waited_seconds: float, watch: Watch | None) -> float:
        """Learn from a batch; returns how far the training is then."""
        pixels = _pixels(batch, self._job.device)
        learning_rate = self._trainer.learning_rate(done)
        self._losses = self._trainer.train_step(pixels, done)
        self._running.append(self._losses["loss"])
        self._history.add(batch)
        done = self._done()
        if watch is not None:
            watch.step(
                self._trainer,
                batch,
                pixels,
                self._losses,
                num_clips=len(batch.draws) * world_size(),
                waited_seconds=waited_seconds,
                learning_rate=learning_rate,
                done=done,
            )
        return done

    def _done(self) -> float:
        """By rank 0's clock, so that all ranks stop together."""
        done = self._job.done(self._trainer.step, self._seconds())
        return from_first_rank(done, self._job.device)

    def _seconds(self) -> float:
        """Trained so far, over all attempts."""
        here = 0.0 if self._started is None else time.monotonic() - self._started
        return self._resumed_seconds + here

    def _checkpoint_if_due(self, batch: ClipBatch, done: float, watch: Watch | None) -> None:
        flags, step, is_last = self._job.command.checkpoints, self._trainer.step, done >= 1.0
        evaluates = bool(self._job.held_out_ids) and (
            is_last or step % (flags.evaluate_every or flags.checkpoint_every) == 0
        )
        if not (is_last or evaluates or step % flags.checkpoint_every == 0):
            return
        score = None if self._job.held_out_ids else math.fsum(self._running) / len(self._running)
        if evaluates:
            score = self._held_out_loss()
            if watch is not None:
                watch.evaluated(step, score)
        self._running.clear()
        self._history.write(step)
        wait_for_ranks()  # the document counts for what all ranks have written
        self._position = Position(step, batch.state, self._seconds(), score, self._losses)
        if rank() == 0:
            self._checkpoints.commit(self._position, self._trainer.state_dict())
        if self._on_checkpoint is not None:
            self._on_checkpoint(step, self._losses)

    def _held_out_loss(self) -> float:
        """The reconstruction's loss of the averaged model on one epoch of the held-out shards, over all ranks."""
        clips = self._clips_of(self._job.last_stage(self._storage, self._job.held_out_ids))
        total = torch.zeros(2, dtype=torch.float64, device=self._job.device)
        for batch in _one_epoch(clips):
            loss = _reconstruction_loss(self._objective, self._trainer.average, _pixels(batch, self._job.device))
            total += torch.stack([loss.double() * len(batch.draws), loss.new_tensor(len(batch.draws)).double()])
        loss_sum, num_clips = sum_over_ranks(total).tolist()
        return float(loss_sum / num_clips)

    def _clips_of(self, order: Curriculum, **changes: Any) -> TrainingClips:
        ahead_bytes = self._job.command.engine.usual_window_mb << 20
        where = {"rank": rank(), "num_ranks": world_size(), **changes}
        return TrainingClips(order, self._decoders, ahead_bytes=ahead_bytes, **where)

    def _finish(self) -> None:
        take, best = self._job.command.checkpoints.take, self._checkpoints.best_step
        fields = {"step": self._trainer.step, "seconds": self._position.seconds, "losses": self._losses}
        if take == "best" and best is not None:
            self._position, tensors = self._checkpoints.load(best)
            self._trainer.load_state_dict(tensors)
        fields |= {
            "take": take,
            "taken_step": self._trainer.step,
            "failed": dict(failed_clips(self._storage).most_common()),
            "normaliser": dataclasses.asdict(self._normaliser()),
        }
        write_finished(self._storage, fields)

    def _normaliser(self) -> Normaliser:
        command = self._job.command
        if command.settings.freeze_encoder and command.model.initial is not None:
            return read_document(command.model.initial).normaliser  # the latents are the same
        num_batches = command.normaliser_batches
        alone: dict[str, Any] = {"rank": 0, "num_ranks": 1}
        if num_batches:
            order = self._job.curriculum(self._storage)
            following = self._clips_of(order, state=self._position.loader, **alone)
            batches: Iterator[ClipBatch] = itertools.islice(following, num_batches)
        else:
            order = self._job.last_stage(self._storage, self._job.shard_ids)
            batches = _one_epoch(self._clips_of(order, **alone))
        # Clip by clip: a whole global batch need not fit one device.
        clips = (batch.frames[place : place + 1] for batch in batches for place in range(len(batch.frames)))
        return measure_normaliser(self._trainer.average, clips)

    def _open_watch(self) -> Watch:
        command, job = self._job.command, self._job
        settings = dataclasses.asdict(command)
        return Watch(command.log, job.log_directory, command.output.name, settings, self._trainer.step)


def _one_epoch(clips: TrainingClips) -> Iterator[ClipBatch]:
    """The batches that one epoch fills, but at least one."""
    for batch in clips:
        if batch.step > 1 and batch.state.epoch:
            return
        yield batch


def _pixels(batch: ClipBatch, device: str) -> Tensor:
    return to_pixels(torch.from_numpy(batch.frames), device)


def _reconstruction_loss(objective: Objective, model: CausalAutoencoder, pixels: Tensor) -> Tensor:
    """What the objective says of the model's reconstruction of clips, B 3 T H W; no noise, no penalties."""
    with torch.no_grad():
        loss, _ = objective.compare(model.decode(model.encode(pixels).mean), pixels)
    return loss


def _parallel(module: nn.Module, device: str) -> nn.Module:
    """The module, its gradients averaged over the ranks."""
    from torch.nn.parallel import DistributedDataParallel

    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=None if device == "cpu" else [device])
