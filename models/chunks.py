"""Canonical chunks of whatever arrives, and the state from which a stream of them goes on elsewhere.

In:   tensors along a time axis, any number of frames at a time.
Out:  what a subclass makes of the leading frame alone, then of chunks of one length, the last one filled up.
Cost: fewer frames than a chunk wait, in a copy; a push that finds frames waiting is copied once.
Errors: GeometryError for other shapes than the clip began with, and those of the subclass.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypedDict, TypeVar

import torch
from torch import Tensor

from models.spec import GeometryError

Outcome = TypeVar("Outcome")
RunChunk = Callable[[Tensor, Any], tuple[Outcome, Any]]
"""(a chunk, the autoencoder's state before it or None) -> what it makes of the chunk, and its state after it."""


class StreamState(TypedDict):
    """All that a stream remembers: a dictionary of tensors and numbers, for `torch.save` and a load with weights_only.

    chunk_frames: length of a canonical chunk on the time axis.
    num_frames: frames that have arrived since the clip's start.
    waiting: those that do not fill a chunk yet; None before the first frame.
    backend: the autoencoder's own state; None before the first frame.
    """

    chunk_frames: int
    num_frames: int
    waiting: Tensor | None
    backend: Any


class ChunkedStream(abc.ABC, Generic[Outcome]):
    """One batch of clips, of which frames are pushed as they come. A push or flush that fails leaves it as it was."""

    time_axis: ClassVar[int]

    def __init__(self, run_chunk: RunChunk[Outcome], chunk_frames: int, state: StreamState | None) -> None:
        if state is not None and state["chunk_frames"] != chunk_frames:
            raise GeometryError(f"chunk_frames {chunk_frames}: the state is of chunks of {state['chunk_frames']}")
        self._run_chunk = run_chunk
        self._start = StreamState(chunk_frames=chunk_frames, num_frames=0, waiting=None, backend=None)
        self._state = self._start if state is None else state

    @property
    def state(self) -> StreamState:
        """What this stream remembers now; it is replaced by a push, never changed."""
        return self._state

    @torch.inference_mode()
    def push(self, arrived: Tensor) -> Outcome | None:
        """Take the next frames, one or more; gives what the chunks make that are full now, None when there are none."""
        self._check(arrived)
        state = self._state
        chunks, waiting = self._cut(arrived, state["waiting"])
        outcomes, carried = [], state["backend"]
        for chunk in chunks:
            outcome, carried = self._run_chunk(chunk, carried)
            outcomes.append(outcome)
        joined = self._join(outcomes) if outcomes else None
        num_frames = state["num_frames"] + arrived.shape[self.time_axis]
        self._state = StreamState(
            chunk_frames=state["chunk_frames"], num_frames=num_frames, waiting=waiting, backend=carried
        )
        return joined

    @torch.inference_mode()
    def flush(self) -> Outcome | None:
        """End the clip; gives what the waiting frames make, None when none wait. The next push begins another clip."""
        state = self._state
        self._check_end(state["num_frames"])
        outcome, waiting = None, state["waiting"]
        if waiting is not None and (num_waiting := waiting.shape[self.time_axis]):
            last = waiting.narrow(self.time_axis, num_waiting - 1, 1)
            filled = torch.cat([waiting, *[last] * (state["chunk_frames"] - num_waiting)], dim=self.time_axis)
            filled_outcome, _ = self._run_chunk(filled, state["backend"])
            outcome = self._shorten(self._join([filled_outcome]), num_waiting)
        self._state = self._start
        return outcome

    def run(self, clip: Tensor) -> Outcome:
        """A whole clip, pushed and flushed."""
        parts = (self.push(clip), self.flush())
        return self._join([part for part in parts if part is not None])

    def _cut(self, arrived: Tensor, waiting: Tensor | None) -> tuple[Sequence[Tensor], Tensor]:
        """The chunks that are full, and a copy of what must wait: a view would keep all that arrived alive."""
        lead = [1] if waiting is None else []
        if waiting is not None:
            self._check_alike(arrived, waiting)
            if waiting.shape[self.time_axis]:
                arrived = torch.cat([waiting, arrived], dim=self.time_axis)
        chunk_frames = self._state["chunk_frames"]
        num_full, rest = divmod(arrived.shape[self.time_axis] - len(lead), chunk_frames)
        *chunks, waiting = torch.split(arrived, [*lead, *[chunk_frames] * num_full, rest], dim=self.time_axis)
        return chunks, waiting.clone()

    def _check_alike(self, arrived: Tensor, waiting: Tensor) -> None:
        wanted = list(waiting.shape)
        wanted[self.time_axis] = arrived.shape[self.time_axis]
        if list(arrived.shape) != wanted:
            raise GeometryError(f"the clip began with frames like {tuple(wanted)}, now came {tuple(arrived.shape)}")

    @abc.abstractmethod
    def _check(self, arrived: Tensor) -> None:
        """Refuse what cannot be the next frames."""

    @abc.abstractmethod
    def _check_end(self, num_frames: int) -> None:
        """Refuse a clip of that many frames, or of none."""

    @abc.abstractmethod
    def _join(self, outcomes: Sequence[Outcome]) -> Outcome:
        """Outcomes in a row as one."""

    @abc.abstractmethod
    def _shorten(self, outcome: Outcome, num_frames: int) -> Outcome:
        """What the first `num_frames` frames of a chunk made."""
