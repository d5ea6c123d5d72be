"""Rules of the whole code base that no single module's test can hold. (Import directions: import-linter.)"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "pipeline", "jobs")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in MODULES]
every_module = pytest.mark.parametrize("path", MODULES, ids=IDS)


def loaded_after(program: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a program."""
    code = f"{program}\nimport sys; print('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("LOADED")[2].split())


def imports(tree: ast.AST) -> set[str]:
    """The top-level names that a module imports anywhere, those for type checkers included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


@every_module
def test_a_module_says_what_goes_in_and_out_what_it_costs_and_how_it_fails(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    if path.name not in ("__init__.py", "errors.py"):  # packages and names, which do nothing
        positions = [docstring.find(f"\n{word}:") for word in ("In", "Out", "Cost", "Errors")]
        assert min(positions) > 0
        assert positions == sorted(positions)


@every_module
def test_imports(path: Path) -> None:
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    assert "." not in names, "relative import"
    assert "tests" not in names
    assert "ray" not in names or path.is_relative_to(ROOT / "jobs")
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@every_module
def test_nothing_unpickles_and_nothing_runs_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("torch.load", "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load")
        for keyword in node.keywords:
            told = f"{keyword.arg}={ast.unparse(keyword.value)}"
            assert told not in ("shell=True", "allow_pickle=True", "weights_only=False"), f"{called}({told})"


@every_module
def test_a_file_is_named_for_what_it_does(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert set(settings["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / folder.replace(".", "/") / "__init__.py").is_file() for folder in folders)


def test_no_package_hides_a_library() -> None:
    """A top-level name of ours is on sys.path: it must be neither the standard library's nor a dependency's."""
    ours = {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES) | {"tests"}
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) - {"latentmill"}
    }
    assert not ours & set(sys.stdlib_module_names)
    assert not ours & (installed - {"tests"})
    assert (ROOT / "tests" / "__init__.py").is_file()


def test_a_module_of_ours_is_not_taken_for_a_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = {name.replace("-", "_") for name in re.findall(r'^    "([A-Za-z0-9-]+)', text, flags=re.MULTILINE)}
    assert {"numpy", "ray", "torch", "zarr"} <= dependencies, "pyproject.toml reads otherwise than this test thinks"
    assert not {path.stem for path in MODULES} & (dependencies | set(sys.stdlib_module_names) - {"__main__"})


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_light(package: str) -> None:
    heavy = {"torch", "numpy", "av", "zarr", "pyarrow", "ray", "PIL", "diffusers", "tyro"}
    assert not heavy & loaded_after(f"import {package}")


def test_what_a_plan_needs_of_models_is_light() -> None:
    assert "torch" not in loaded_after("import pipeline.plan, pipeline.recipe, models.spec, models.config")


def test_a_local_run_imports_no_ray(tmp_path: Path) -> None:
    """All the modules that `--local` commands run, and one such run, without Ray in the process."""
    program = f"""
import jobs.encode, jobs.index, jobs.inspect_store, jobs.prepare, jobs.probe, jobs.synthesize, jobs.train.command
import pipeline.local
from jobs.__main__ import main
assert main(["synthesize", "--output", {str(tmp_path / "in")!r}, "--num-shards", "1", "--samples-per-shard", "2"]) == 0
tars = {str(tmp_path / "in" / "*.tar")!r}
assert main(["index", tars, "--store", {str(tmp_path / "store")!r}, "--local", "--decode-workers", "1"]) == 0
"""
    loaded = loaded_after(program)
    assert {"jobs", "pipeline"} <= loaded
    assert "ray" not in loaded


def test_nothing_names_a_place_on_one_machine() -> None:
    for path in MODULES:
        assert not re.search(r"/work/|/home/\w+|/root/|/tmp/", path.read_text(encoding="utf-8")), path
