"""From flags to what is trained: the kind with its options, around random or given weights.

In:   ModelFlags, a seed.
Out:  a Kind; an Objective on the CPU.
Cost: the weights once, or twice with --initial.
Errors: UsageError names the flag or option, and what there is instead.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from models.bottlenecks.config import BOTTLENECK_CONFIGS, BottleneckConfig
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from jobs.train.config import ModelFlags
    from models.autoencoder import CausalAutoencoder
    from models.config import ModelConfig
    from models.kinds.kind import Kind, Objective

Record = TypeVar("Record")


def make_kind(name: str, options: Sequence[str]) -> Kind:
    """The kind with its settings, each "name=value" or "record.name=value".

    Raises:
        UsageError: there is no such kind or setting, or a value that the setting cannot have.
    """
    from models.kinds.registry import kind_class

    values: dict[str, Any] = {}
    for text in options:
        path, separator, value = text.partition("=")
        *records, setting = path.split(".")
        inner = values
        for record in records:
            inner = inner.setdefault(record, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--kind-options {text}: {record} was given a value already")
        if not separator or setting in inner:
            raise UsageError(f"--kind-options {text}: write name=value, each name once")
        inner[setting] = value
    try:
        return _with_values(kind_class(name)(), values)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--kind {name} --kind-options {' '.join(options)}: {error}") from error


def model_config(flags: ModelFlags) -> ModelConfig:
    """The model that the flags describe, without its weights.

    Raises:
        UsageError: the kind, preset or options are none, or do not go together.
    """
    from models.config import preset

    kind = make_kind(flags.kind, flags.kind_options)
    try:
        return kind.model_config(preset(flags.preset))
    except ValueError as error:
        raise UsageError(f"--kind {flags.kind} --preset {flags.preset}: {error}") from error


def make_objective(flags: ModelFlags, seed: int) -> Objective:
    """What learns: random weights that follow from the seed, or those of --initial.

    Raises:
        UsageError: --initial is no model directory, or of another model.
    """
    from models.config import preset
    from models.training import random_objective

    objective = random_objective(make_kind(flags.kind, flags.kind_options), preset(flags.preset), seed)
    if flags.initial is not None:
        _take_weights(objective.model, flags)
    return objective


def _take_weights(model: CausalAutoencoder, flags: ModelFlags) -> None:
    from models.checkpoint import load_checkpoint

    assert flags.initial is not None
    try:
        initial, _ = load_checkpoint(flags.initial)
    except ValueError as error:
        raise UsageError(f"--initial {flags.initial}: {error}") from error
    wanted, found = model.state_dict(), initial.state_dict()
    wrong = sorted(
        name
        for name in wanted.keys() | found.keys()
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    )
    if wrong:
        raise UsageError(
            f"--initial {flags.initial} is another model than --kind {flags.kind} --preset {flags.preset}: it differs "
            f"at {', '.join(wrong[:4])} ({len(wrong)} in all)"
        )
    model.load_state_dict(found)


def _with_values(record: Record, values: dict[str, Any]) -> Record:
    """The record with some fields replaced; a mapping is of a record in it."""
    kind: Any = type(record)
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"--kind-options: {kind.__name__} has no {name}; it has {', '.join(known) or 'none'}")
        current = getattr(record, name)
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(current):
                raise UsageError(f"--kind-options: {name} is no record, but a value: write {name}=VALUE")
            changes[name] = _with_values(_chosen(current, value, hints[name]), value)
        else:
            changes[name] = _read(name, value, hints[name])
    changed: Record = dataclasses.replace(typing.cast("Any", record), **changes)
    return changed


def _chosen(current: Any, values: dict[str, Any], hint: Any) -> Any:
    """The record that `values` go into: another bottleneck, where they name one."""
    name = values.pop("name", None)
    if name is None:
        return current
    kinds = BOTTLENECK_CONFIGS.items()
    choices = [key for key, config in kinds if isinstance(hint, type) and issubclass(config, hint)]
    if not isinstance(current, BottleneckConfig) or name not in choices:
        others = ", ".join(choices) or "no other"
        raise UsageError(f"--kind-options: this record cannot be {name!r}; it can be {others}")
    return BOTTLENECK_CONFIGS[name]()


def _read(name: str, text: str, hint: Any) -> Any:
    """The value that a text stands for: JSON, or else the text itself."""
    try:
        value = _as_tuples(json.loads(text))
    except ValueError:
        value = text
    if Path in (hint, *typing.get_args(hint)) and isinstance(value, str):
        return Path(value)
    if not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise UsageError(f"--kind-options {name}={text}: it takes {wanted}")
    return value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in args)
    if origin is tuple:
        inner = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(inner) == len(value) and all(map(_fits, value, inner))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)
