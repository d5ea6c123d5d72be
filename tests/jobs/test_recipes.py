"""The recipes that ship: each is one that the command takes, says what it costs, and every kind has a tiny one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import jobs.train.command
from jobs.__main__ import main
from jobs.cli import parse
from jobs.train.config import Train
from jobs.train.loop import TrainJob
from jobs.train.model import make_kind, model_config
from models.build import build_model
from models.kinds.registry import KINDS
from pipeline.curriculum import parse_stages
from pipeline.index import IndexFragment, read_fragment, write_fragment
from pipeline.shards import ShardRef
from pipeline.storage import LocalStorage
from tests.fakes import index, write_numbered_shards

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
TINY = [path for path in RECIPES if path.name.startswith("tiny_")]
LARGE = [path for path in RECIPES if path.name.startswith("base_")]
HEADER = re.compile(r"# Command:  (.+\n(?:#   +.+\n)*)# Hardware: (.+)\n# Time:     (.+)\n# Result:   (.+)\n")
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def command_of(path: Path) -> Train:
    command = parse(["train", "a.tar", "--output", "model", "--config", str(path)])
    assert isinstance(command, Train)
    return command


@every_recipe
def test_its_model_can_be_built_and_its_stages_end(path: Path) -> None:
    command = command_of(path)
    with torch.device("meta"):
        model = build_model(model_config(command.model))
        objective = make_kind(command.model.kind, command.model.kind_options).objective(model)
    assert sum(parameter.numel() for parameter in objective.parameters()) > 100_000
    stages = parse_stages(command.stages, command.draw, command.buckets)
    assert command.seconds is None, "a training by the clock is no pure function"
    assert (command.steps is None) == all(stage.steps for stage in stages)


@every_recipe
def test_its_first_lines_say_how_where_how_long_and_how_good(path: Path) -> None:
    header = HEADER.match(path.read_text())
    assert header
    assert f"--config jobs/recipes/{path.name}" in header[1]
    assert all(header[part].strip() for part in range(1, 5))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ShardRef], list[IndexFragment]]:
    """A tar of two videos, indexed once for all recipes."""
    folder = tmp_path_factory.mktemp("indexed")
    storage = LocalStorage(folder)
    shards = index(storage, write_numbered_shards(folder / "tars", 1, 2))
    return shards, [read_fragment(storage, shard.shard_id) for shard in shards]


@every_recipe
def test_it_passes_every_check_before_the_first_step(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    indexed: tuple[list[ShardRef], list[IndexFragment]],
) -> None:
    def index_shards(storage: LocalStorage, patterns: tuple[str, ...], _: object) -> list[ShardRef]:
        for fragment in indexed[1]:
            write_fragment(storage, fragment)
        return indexed[0] if patterns else []

    reached: list[TrainJob] = []
    monkeypatch.setattr(jobs.train.command, "index_shards", index_shards)
    monkeypatch.setattr(jobs.train.command, "_run", reached.append)
    monkeypatch.setattr(jobs.train.command, "_export", lambda *_: None)
    monkeypatch.setattr(jobs.train.command, "_fingerprint", str)
    line = ["train", "a.tar", "--output", str(tmp_path / "model"), "--config", str(path)]
    if command_of(path).settings.freeze_encoder:
        line += ["--initial", "the_model_before"]
    assert main([*line, "--local", "--workers", "1", "--device", "cpu"]) == 0
    assert len(reached) == 1
    # What only its own ranks can break is checked before the tars are looked for.
    ranks = command_of(path).engine.workers
    assert all(stage.draw.batch_size % ranks == 0 for stage in reached[0].stages)


def test_every_kind_has_a_tiny_recipe() -> None:
    assert {command_of(path).model.kind: path.stem for path in TINY} == {kind: f"tiny_{kind}" for kind in KINDS}


def test_tiny_ones_are_compared_on_equal_terms() -> None:
    terms = {(command.draw, command.buckets, command.steps, command.model.preset) for command in map(command_of, TINY)}
    assert len(terms) == 1


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_what_was_not_run_says_so(path: Path) -> None:
    assert "not run here: no GPU" in path.read_text().splitlines()[3]
    command = command_of(path)
    assert (command.engine.device, command.settings.precision) == ("cuda", "bfloat16")
    assert all(1 in stage.draw.frames for stage in parse_stages(command.stages, command.draw, command.buckets))


def test_the_decoder_of_a_second_stage_fits_the_first_ones_model() -> None:
    first, second = (command_of(ROOT / f"jobs/recipes/base_4x8x8x16_{name}.yaml") for name in ("vae", "vae_gan"))
    assert second.settings.freeze_encoder
    configs = [model_config(command.model).as_json() for command in (first, second)]
    assert configs[0]["backbone"] == configs[1]["backbone"]
    assert configs[0]["bottleneck"]["name"] == configs[1]["bottleneck"]["name"]
