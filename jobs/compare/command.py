"""`compare`: recipes trained on the same tars, one after the other, and judged on the same held-out ones, in one table.

In:   recipes, which are files for `train --config`; tars to train on; held-out tars.
Out:  OUTPUT/<recipe>/: the model, its run and log; OUTPUT/comparison.md and .json.
Cost: the trainings, each in a process of its own, so that none leaves threads or memory to the next; then `evaluate`'s.
Errors: UsageError for flags that cannot be. A recipe that fails is a line of the table, and makes the exit code 1.

The same command goes on: models that are there stay, a training that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from jobs.compare.config import Compare
from jobs.compare.report import Compared, write_comparison
from jobs.evaluate.clips import IndexedShards
from jobs.evaluate.command import evaluate_encoder
from jobs.train.checkpoints import read_finished
from models.checkpoint import read_document
from pipeline.decode.pool import ProcessPool
from pipeline.errors import LatentmillError, UsageError
from pipeline.storage import LocalStorage


def run_compare(command: Compare) -> int:
    """`latentmill compare SHARDS... --recipes FILES... --held-out SHARDS... --output DIR`."""
    _check(command)
    torch.set_num_threads(command.threads)
    with tempfile.TemporaryDirectory() as scratch:
        storage = LocalStorage(scratch)
        shards = IndexedShards.index(storage, command.shards, command.engine)
        held_out = IndexedShards.index(storage, command.held_out, command.engine)
        _refuse_shared(shards, held_out)
        homes = [_Home(recipe, command.output / recipe.stem) for recipe in command.recipes]
        failures = {}
        for number, home in enumerate(homes, start=1):
            _say(f"{home.name} ({number} of {len(homes)})")
            if reason := _train(home, command, shards):
                failures[home.name] = reason
                _say(f"{home.name} failed: {reason}")
        results = _judge(homes, failures, command, shards, held_out)
    paths = write_comparison(command, shards.urls, held_out.urls, results)
    print(paths[0].read_text(encoding="utf-8"))
    print(f"compare: {', '.join(map(str, paths))}")
    return int(any(result.failure for result in results))


@dataclasses.dataclass(frozen=True)
class _Home:
    """Where all of one recipe lies."""

    recipe: Path
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def run(self) -> Path:
        return self.directory / "run"


def _check(command: Compare) -> None:
    if not command.shards or not command.recipes or not command.held_out:
        raise UsageError("compare needs SHARDS to train on, --recipes, and --held-out tars")
    for recipe in command.recipes:
        if not recipe.is_file():
            raise UsageError(f"--recipes {recipe}: there is no such file")
    twice = [name for name, count in Counter(recipe.stem for recipe in command.recipes).items() if count > 1]
    if twice:
        raise UsageError(f"--recipes: {', '.join(twice)} would share a directory in --output: rename the files")


def _refuse_shared(shards: IndexedShards, held_out: IndexedShards) -> None:
    shared = sorted(set(shards.urls) & set(held_out.urls))
    if shared:
        raise UsageError(f"--held-out {shared[0]} is trained on as well ({len(shared)} tars): hold out others")


def _train(home: _Home, command: Compare, shards: IndexedShards) -> str | None:
    """Train a recipe's model, unless it is there; returns why there is none, or None."""
    if not _same_origin(home, shards):
        return (
            f"{home.directory} holds another recipe's training, or one on other tars: remove it, or name a new --output"
        )
    if home.model.exists():
        return None
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(command.engine).items()]
    places = [f"--config={home.recipe}", f"--output={home.model}", f"--run={home.run}", "--local"]
    log = home.directory / "train.log"
    with log.open("ab") as out:
        ended = subprocess.run(
            [sys.executable, "-m", "jobs", "train", *command.shards, *places, *flags],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode == 0:
        return None
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"train ended with exit code {ended.returncode}: {said[-1] if said else 'it said nothing'}"


def _same_origin(home: _Home, shards: IndexedShards) -> bool:
    """Whether what lies there was made by this recipe, comments aside, from these tars; notes it where nothing does."""
    lines = home.recipe.read_text(encoding="utf-8").splitlines()
    recipe = [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    fields = {"recipe": recipe, "shards": [shard.shard_id for shard in shards.shards]}
    origin, path = json.dumps(fields, indent=1) + "\n", home.directory / "origin.json"
    if home.model.exists() or home.run.exists():
        return path.is_file() and path.read_text(encoding="utf-8") == origin
    try:
        home.directory.mkdir(parents=True, exist_ok=True)
        path.write_text(origin, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {home.directory} cannot be written: {error}") from error
    return True


def _judge(
    homes: Sequence[_Home],
    failures: dict[str, str],
    command: Compare,
    shards: IndexedShards,
    held_out: IndexedShards,
) -> list[Compared]:
    """Every recipe with its evaluation, or with why there is none."""
    results = []
    with ProcessPool(command.engine.decode_processes, command.engine.decode_limits) as pool:
        for home in homes:
            if home.name in failures:
                results.append(Compared(home.name, failures[home.name]))
                continue
            _say(f"judging {home.name}")
            try:
                evaluation = evaluate_encoder(str(home.model), held_out, pool, command.settings, shards)
            except LatentmillError as error:
                results.append(Compared(home.name, f"{type(error).__name__}: {error}"))
                continue
            finished = read_finished(LocalStorage(home.run)) or {}
            results.append(
                Compared(
                    home.name,
                    config=read_document(home.model).config,
                    steps=finished.get("step"),
                    seconds=finished.get("seconds"),
                    evaluation=evaluation,
                )
            )
    return results


def _say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)
