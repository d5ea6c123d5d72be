"""From a command line to a command: `--config` files and a store's own recipe become flags before the user's.

In:   argv.
Out:  one of the dataclasses that jobs.commands lists.
Cost: no torch, no ray.
Errors: UsageError for an unknown command or flag, with the nearest one, and for a wrong file; SystemExit(2) from tyro
      for a value of the wrong type.

One parser types, checks and reports everything: defaults < the store's recipe < --config < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from jobs.commands import COMMANDS
from jobs.flags import POSITIONALS, ConfigFile
from pipeline.errors import UsageError
from pipeline.recipe import Recipe, to_tree

_SIZED_COMMANDS = ("plan", "encode", "train", "evaluate")
_RECIPE_GROUPS = ("sampling", "buckets", "filters", "encode")
# The two ways to name sizes: a flag of one on the command line or in the file ends the other in the store's recipe.
_SIZES, _BUDGET = ("sizes",), ("pixel_budget", "aspect_ratios")


class _TextLoader(yaml.SafeLoader):
    """YAML in which all but null and booleans stays text, as on a command line: 16:9 is no sexagesimal 969."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name and type)
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":bool"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse(argv: Sequence[str]) -> ConfigFile:
    """The command that a line asks for.

    Raises:
        SystemExit: help was asked for, or a value has the wrong type. UsageError: all else that is wrong.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0 if argv else 2)
    num_words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, args = " ".join(argv[:num_words]), list(argv[num_words:])
    if name not in COMMANDS:
        hint = _nearest(name, COMMANDS)
        raise UsageError(f"unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}")
    if "-h" in args or "--help" in args:
        return _parse(name, ["--help"])
    _check_flags(name, args, "")
    tree = _read_config(name, _last_value(args, "config"))
    positionals = {key: tree.pop(key) for key in POSITIONALS if key in tree}
    args = [*to_flags(tree), *args]
    if name in _SIZED_COMMANDS:
        args = _with_recipe(args)
    command = _parse(name, args)
    # Named by the user, they replace those of the file, as any flag does.
    unset: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else (str(value),)
        for key, value in positionals.items()
        if not getattr(command, key)
    }
    return dataclasses.replace(command, **unset)


def _parse(name: str, args: Sequence[str]) -> ConfigFile:
    kind = COMMANDS[name].flags
    return tyro.cli(kind, args=args, prog=f"latentmill {name}", config=(tyro.conf.OmitArgPrefixes,))


def _overview() -> str:
    lines = [f"  {name:<12} {(command.flags.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: latentmill COMMAND [flags]        (latentmill COMMAND --help lists the flags)",
            "",
            "From WebDataset tars of video to a verified Zarr store of latents.",
            "",
            *lines,
        ]
    )


def flag_types(kind: type) -> dict[str, Any]:
    """Every flag of a command, as in `batch-size`, and the type of its value; positional arguments are none."""
    hints = typing.get_type_hints(kind)
    flags: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            flags.update(flag_types(hint))
        elif field.name not in POSITIONALS:
            flags[field.name.replace("_", "-")] = hint
            if hint is bool:
                flags[f"no-{field.name.replace('_', '-')}"] = hint
    return flags


def _check_flags(name: str, args: Sequence[str], place: str) -> None:
    """Refuse a flag that the command lacks, before a missing one can hide the typo."""
    known = [f"--{flag}" for flag in flag_types(COMMANDS[name].flags)]
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            hint = _nearest(flag, known)
            raise UsageError(f"{place}{name} has no flag {flag}{hint}; `latentmill {name} --help` lists them")


def _nearest(word: str, words: Sequence[str] | Mapping[str, object]) -> str:
    found = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _last_value(args: Sequence[str], flag: str) -> str | None:
    """What the last `--flag X` or `--flag=X` says, before the real parse."""
    value = None
    for arg, following in itertools.pairwise([*args, None]):
        if arg == f"--{flag}":
            value = following
        elif arg is not None and arg.startswith(f"--{flag}="):
            value = arg.partition("=")[2]
    return value


def _read_config(name: str, path: str | None) -> dict[str, Any]:
    """The mapping in a --config file: flags of the command, and its positional arguments."""
    if path is None:
        return {}
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _TextLoader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(tree, Mapping | None):
        raise UsageError(f"--config {path} must be a mapping of flags to values, it is a {type(tree).__name__}")
    tree = {str(key).replace("-", "_"): value for key, value in (tree or {}).items()}
    _check_config(name, tree, f"--config {path}: ")
    return tree


def _check_config(name: str, tree: Mapping[str, Any], place: str) -> None:
    """Refuse what would be no flag, or more than its flag can take and so be read as something else."""
    positionals = {field.name for field in dataclasses.fields(COMMANDS[name].flags)} & POSITIONALS
    _check_flags(name, [f"--{key}" for key in tree if key not in positionals], place)
    types = flag_types(COMMANDS[name].flags)
    if "config" in tree:
        raise UsageError(f"{place}a file cannot name another config")
    for key, value in tree.items():
        takes_list = key in positionals or typing.get_origin(types[key.replace("_", "-")]) is tuple
        texts = value if isinstance(value, list) and takes_list else [value]
        if not all(isinstance(text, str | bool | None) for text in texts):
            raise UsageError(f"{place}{key} takes {'texts' if takes_list else 'one value'}, got {value!r}")


def _with_recipe(args: list[str]) -> list[str]:
    """The flags, after those of the recipe of the store, if one is named; one way to name sizes ends the other."""
    store = _last_value(args, "store")
    values = _stored_recipe(store) if store else {}
    given = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args if arg.startswith("--")}
    if given.intersection(_SIZES):
        values = {key: value for key, value in values.items() if key not in _BUDGET}
    elif given.intersection(_BUDGET):
        values = {key: value for key, value in values.items() if key not in _SIZES}
        args = [*args, "--sizes"]  # none, not even the default; at the end, where no shard is taken for one
    return [*to_flags(values), *args]


def _stored_recipe(store: str) -> dict[str, Any]:
    from pipeline.storage import open_storage
    from pipeline.store import read_header

    header = read_header(open_storage(store))
    return {} if header is None else {"encoder": header.encoder_source, **recipe_values(header.recipe)}


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as values of flags; all but the encoder."""
    tree = to_tree(recipe)
    values: dict[str, Any] = {"decoder": tree["decoder"], "caption_field": tree["caption_field"]}
    for group in _RECIPE_GROUPS:
        values.update(tree[group])
    return values


def to_flags(values: Mapping[str, Any]) -> Iterator[str]:
    """The command line that sets these values.

    Lists come first: a scalar behind them ends the last one, before any positional that follows.
    """
    for key, value in sorted(values.items(), key=lambda item: not isinstance(item[1], list)):
        name = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, list):
            yield f"--{name}"
            yield from map(str, value)
        else:
            yield f"--{name}={value}"
