"""compare: a recipe that trains, one that cannot, one table; what is there is not made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.__main__ import main
from jobs.cli import parse
from jobs.compare.config import Compare
from jobs.compare.report import Compared, markdown
from jobs.train.config import Train
from tests.fakes import write_numbered_shards

TINY = """\
# a comment
kind: {kind}
kind_options: [{options}]
frames: [5]
sizes: [16x16]
batch_size: 2
steps: {steps}
threads: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars, and two recipes of which the first cannot be."""
    folder = tmp_path_factory.mktemp("compare")
    write_numbered_shards(folder / "train", 1, 4)
    write_numbered_shards(folder / "held_out", 1, 2)
    (folder / "wrong.yaml").write_text(TINY.format(kind="ae", options="no_such=1", steps=2))
    (folder / "codes.yaml").write_text(TINY.format(kind="vq_vae", options="bottleneck.codebook_size=8", steps=3))
    return folder


def compare(folder: Path, *names: str) -> int:
    recipes = [str(folder / f"{name}.yaml") for name in names]
    flags = ["--frames", "5", "--sizes", "16x16", "--threads", "1", "--decode-workers", "1"]
    places = ["--held-out", str(folder / "held_out/*.tar"), "--output", str(folder / "out")]
    return main(["compare", str(folder / "train/*.tar"), "--recipes", *recipes, *places, *flags])


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {recipe["name"]: recipe for recipe in json.loads((folder / "out/comparison.json").read_text())["recipes"]}


def rows(table: str) -> list[dict[str, str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


@pytest.fixture(scope="module")
def first_run(folder: Path) -> int:
    before = torch.get_num_threads()
    code = compare(folder, "wrong", "codes")
    torch.set_num_threads(before)
    return code


@pytest.mark.slow
def test_one_that_fails_is_told_and_the_other_still_runs(folder: Path, first_run: int) -> None:
    assert first_run == 1
    made = results(folder)
    assert "Ae has no no_such" in made["wrong"]["failure"]
    assert made["wrong"]["evaluation"] is None
    table = (folder / "out/comparison.md").read_text()
    assert "**wrong failed**" in table
    assert [row["recipe"] for row in rows(table)] == ["codes"]


@pytest.mark.slow
def test_the_table_says_what_was_trained_and_what_came_of_it(folder: Path, first_run: int) -> None:
    (row,) = rows((folder / "out/comparison.md").read_text())
    made = results(folder)["codes"]
    assert (row["kind"], row["steps"], row["latent"]) == ("vq_vae", "3", "4x8x8, 16")
    assert float(row["seconds"]) == pytest.approx(made["seconds"], abs=0.5)
    codecs = made["evaluation"]["codecs"]
    assert [codec["name"] for codec in codecs[1:]] == ["PCA", "bicubic"]
    shown = [row[column] for column in ("PSNR dB", "PCA dB", "bicubic dB")]
    assert shown == [f"{codec['scores']['psnr']:.2f}" for codec in codecs]
    # 2x2x2 codes of 3 bits for a clip of 5x16x16 pixels.
    assert row["bits / px"] == f"{8 * 3 / (5 * 256):.3f}"
    (codes,) = made["evaluation"]["latent"]["codes"]
    assert row["codes (perplexity)"] == f"{codes['used']}/8 ({codes['perplexity']:.0f})"


@pytest.mark.slow
def test_a_model_that_is_there_is_not_trained_again(folder: Path, first_run: int) -> None:
    model, recipe = folder / "out/codes/model/config.json", folder / "codes.yaml"
    before = model.stat().st_mtime_ns, model.read_text()
    recipe.write_text("# another comment\n" + recipe.read_text())  # a recipe's header may be filled in afterwards
    assert compare(folder, "codes") == 0
    assert (model.stat().st_mtime_ns, model.read_text()) == before


@pytest.mark.slow
def test_a_recipe_that_changed_does_not_pass_for_what_was_trained(folder: Path, first_run: int) -> None:
    before = {name: (folder / f"{name}.yaml").read_text() for name in ("codes", "wrong")}
    (folder / "codes.yaml").write_text(before["codes"].replace("steps: 3", "steps: 4"))
    (folder / "wrong.yaml").write_text(before["wrong"].replace("no_such", "no_other"))
    try:
        assert compare(folder, "codes", "wrong") == 1
    finally:
        for name, text in before.items():
            (folder / f"{name}.yaml").write_text(text)
    made = results(folder)
    assert "holds another recipe's training" in made["codes"]["failure"]
    assert "no no_other" in made["wrong"]["failure"]  # of which nothing was trained, so that it may change


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "held_out", "told"),
        [
            ([], "held_out", "compare needs"),
            (["none"], "held_out", "none.yaml: there is no such file"),
            (["codes", "codes"], "held_out", "codes would share a directory"),
            (["codes"], "train", "is trained on as well"),
        ],
    )
    def test_flags(
        self,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        names: list[str],
        held_out: str,
        told: str,
    ) -> None:
        line = ["compare", str(folder / "train/*.tar"), "--held-out", str(folder / held_out / "*.tar")]
        recipes = ["--recipes", *(str(folder / f"{name}.yaml") for name in names)] if names else []
        assert main([*line, *recipes, "--output", str(tmp_path / "out"), "--decode-workers", "1"]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_table_of_failures_alone() -> None:
    assert list(markdown([Compared("a", "no luck")], 2, 1))[-1] == "- **a failed**: no luck"


def test_the_judge_looks_at_what_the_tiny_recipes_train_on() -> None:
    settings = Compare(output=Path("out")).settings
    recipe = Path(__file__).resolve().parents[2] / "jobs/recipes/tiny_vae.yaml"
    trained = parse(["train", "a.tar", "--output", "out", "--config", str(recipe)])
    assert isinstance(trained, Train)
    assert settings.buckets == trained.buckets
    assert max(settings.sampling.frames) == max(trained.draw.frames)
