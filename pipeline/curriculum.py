"""Stages of training: from short and small clips to long and large ones, in one order of batches.

In:   stages, as records or as text; the index fragments of some shards; a LoaderState.
Out:  GlobalBatch after GlobalBatch, and after each the LoaderState from which the next ones follow, as ClipOrder does.
Cost: that of the stage's ClipOrder.
Errors: UsageError for a text that is no stage, for stages that cannot be, or for a state of other stages.

A stage has an order of its own: its epochs count from 0, and its number goes into the seed. It ends after its steps,
wherever its epoch stands. The rest of that epoch and the draws that wait for a batch end with it, since their shapes
are no longer wanted; the next stage begins with the whole of the shards again. "Every sample once an epoch" therefore
holds within a stage. One stage without steps is a ClipOrder, and never ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.buckets import ASPECT_RATIOS, BucketConfig
from pipeline.epoch import ClipOrder, DrawConfig, GlobalBatch, LoaderState, ReadFragment
from pipeline.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Stage:
    """How clips are drawn, and of which sizes, for so many steps; None is without end."""

    steps: int | None
    draw: DrawConfig = DrawConfig()
    sizes: BucketConfig = BucketConfig()

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"a stage lasts at least 1 step, got {self.steps}")


class Curriculum:
    """The batches of every stage, one stage after the other."""

    def __init__(self, stages: Sequence[Stage], spatial_stride: int, num_shards: int, read: ReadFragment) -> None:
        """The first arguments of `ClipOrder` come from each stage.

        Raises:
            UsageError: no stage; a stage without end before another; sizes off the model's grid.
        """
        if not stages or any(stage.steps is None for stage in stages[:-1]):
            raise UsageError("a curriculum has stages, and every one but the last has its steps")
        self.stages = tuple(stages)
        self._orders = tuple(
            ClipOrder(stage.draw, stage.sizes, spatial_stride, num_shards, read, number)
            for number, stage in enumerate(stages)
        )
        lengths = (math.inf if stage.steps is None else stage.steps for stage in stages)
        self._bounds = (0, *itertools.accumulate(lengths))  # stage n holds steps bounds[n] + 1 to bounds[n + 1]

    @property
    def steps(self) -> int | None:
        """Batches of all stages; None is without end."""
        return None if self.stages[-1].steps is None else int(self._bounds[-1])

    def order(self, stage: int) -> ClipOrder:
        """The order of one stage."""
        return self._orders[stage]

    def batches(self, state: LoaderState | None = None) -> Iterator[tuple[GlobalBatch, LoaderState]]:
        """Batches from a state on, each with the state after it: after a stage's last batch, the start of the next.

        Raises:
            UsageError: an epoch gave no draw, or the state is of other stages.
        """
        state = state or LoaderState()
        self._require_own(state)
        for stage in range(state.stage, len(self.stages)):
            for batch, after in self._orders[stage].batches(state):
                is_last = batch.step == self._bounds[stage + 1]
                state = LoaderState(batch.step, stage=stage + 1) if is_last else after
                yield batch, state
                if is_last:
                    break

    def _require_own(self, state: LoaderState) -> None:
        bounds = (*self._bounds, self._bounds[-1] + 1)  # a curriculum that has ended stands in the stage after its last
        if state.stage > len(self.stages) or not bounds[state.stage] <= state.step < bounds[state.stage + 1]:
            raise UsageError(
                f"the loader stood in stage {state.stage} at step {state.step}, but these {len(self.stages)} stages "
                f"begin and end at steps {self._bounds}: go on with the stages that it began with"
            )


def parse_stages(texts: Sequence[str], draw: DrawConfig, sizes: BucketConfig) -> tuple[Stage, ...]:
    """Stages from texts such as "2000 sizes=64x64 frames=1,9 batch_size=8"; without texts, one without end.

    A text is the stage's steps and what differs from `draw` and `sizes`: frames, frames_weights, sizes (with commas
    between several), batch_size, fps, frame_step. The last one may leave out its steps: it goes on without end.

    Raises:
        UsageError: naming the text and what is wrong with it.
    """
    if not texts:
        return (Stage(None, draw, sizes),)
    return tuple(_parse_stage(text, draw, sizes) for text in texts)


def _parse_stage(text: str, draw: DrawConfig, sizes: BucketConfig) -> Stage:
    first, *words = text.split() or [""]
    steps, words = (None, [first, *words]) if "=" in first else (first, words)
    try:
        fields = _parse_fields(words)
        if "sizes" in fields:
            sizes = dataclasses.replace(
                sizes, sizes=fields.pop("sizes"), pixel_budget=None, aspect_ratios=ASPECT_RATIOS
            )
        return Stage(None if steps is None else int(steps), dataclasses.replace(draw, **fields), sizes)
    except (UsageError, ValueError) as error:
        raise UsageError(
            f"stage {text!r}: {error}. A stage is 'STEPS KEY=VALUE ...' with KEY of {', '.join(_PARSERS)}"
        ) from error


def _parse_fields(words: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _PARSERS or name in fields or not equals:
            problem = (
                "needs a value" if not equals else "is given twice" if name in fields else "cannot differ by stage"
            )
            raise UsageError(f"{name!r} {problem}")
        fields[name] = _PARSERS[name](value)
    return fields


def _several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(parse(part) for part in text.split(","))


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "frames": _several(int),
    "frames_weights": _several(float),
    "sizes": _several(str),
    "batch_size": int,
    "fps": float,
    "frame_step": int,
}
