"""The command line: every flag, files, a store's recipe as default, typos, help that answers at once, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import __main__ as entry
from jobs.__main__ import main
from jobs.cli import flag_types, parse, recipe_values, to_flags
from jobs.commands import COMMANDS
from jobs.store_config import Encode, PlanCommand, Reconstruct
from pipeline.buckets import BucketConfig
from pipeline.errors import JobError, UsageError
from pipeline.filters import FilterConfig
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.sampling import SamplingConfig
from pipeline.storage import LocalStorage
from pipeline.store import Header, write_header
from tests.fakes import FAKE_CARD, fake_recipe

DECODE = {"decode-workers", "decode-timeout-seconds", "decode-memory-mb"}
CLUSTER = DECODE | {"local", "no-local", "ray-address"}
PLACEMENT = CLUSTER | {"workers", "window-mb", "decode-placement"}
TRIAL = DECODE | {"workers", "device", "encode-threads"}
ENGINE = PLACEMENT | TRIAL | {"units-in-flight", "unit-timeout-seconds", "progress-seconds"}
RECIPE = {
    "encoder", "decoder", "caption-field",
    "frames", "fps", "frame-step", "windows", "num-windows", "stride", "short", "seed",
    "sizes", "pixel-budget", "aspect-ratios", "fit", "filter",
    "min-width", "min-height", "min-fps", "max-fps", "min-duration-seconds", "max-duration-seconds", "keep",
    "posterior", "dtype", "compute-dtype", "batch-size", "chunk-frames", "stream-mb", "sample-seed",
    "unit-rows",
}  # fmt: skip
# Flags are an API: one that is added needs a reason, one that goes breaks somebody's script.
FLAGS = {
    "index": {"config", "store"} | CLUSTER,
    "plan": {"config", "store", "probe", "no-probe", "max-failed-share"} | RECIPE | TRIAL,
    "encode": {"config", "store", "max-failed-share"} | RECIPE | ENGINE,
    "status": {"config", "store", "failures"},
    "verify": {"config", "store", "encoder", "device", "share", "min-psnr", "worst"} | DECODE,
    "reconstruct": {"config", "store", "output", "window", "encoder", "device"} | DECODE,
    "sample": {
        "config", "encoder", "output", "prior", "num", "frames", "size", "temperature", "top-k", "fps", "seed",
    },
    "interpolate": {"config", "store", "output", "steps", "path", "window", "encoder", "device"},
    "train prior": {
        "config", "store", "output", "encoder", "seconds", "steps", "batch-size", "width", "depth", "heads",
        "learning-rate", "seed", "threads",
    },
    "train": {
        "config", "output", "run", "steps", "seconds", "stages", "normaliser-batches",
        "gradient-checkpointing", "no-gradient-checkpointing",
        "frames", "frames-weights", "fps", "frame-step", "batch-size", "draws-per-video", "draws-per-image",
        "shuffle-shards", "seed", "sizes", "pixel-budget", "aspect-ratios", "fit", "filter",
        "kind", "preset", "kind-options", "initial",
        "learning-rate", "final-learning-rate-ratio", "warmup-steps", "weight-decay", "clip-norm", "ema-decay",
        "precision", "micro-batches", "freeze-encoder", "no-freeze-encoder",
        "checkpoint-every", "keep-every", "held-out", "evaluate-every", "take",
        "log-every", "strip-every", "wandb", "no-wandb", "mlflow", "no-mlflow", "progress-seconds",
        "threads", "device", "max-restarts",
    } | PLACEMENT,
    "evaluate": {
        "config", "encoder", "output", "baseline-shards", "decoder", "dtype", "compute-dtype", "device",
        "baseline-clips", "elbo-samples", "lpips-weights", "fvd-weights", "threads",
        "frames", "fps", "frame-step", "windows", "num-windows", "stride", "short", "seed",
        "sizes", "pixel-budget", "aspect-ratios", "fit", "filter",
        "min-width", "min-height", "min-fps", "max-fps", "min-duration-seconds", "max-duration-seconds", "keep",
    } | DECODE,
    "compare": {
        "config", "recipes", "held-out", "output", "decoder", "dtype", "compute-dtype", "device",
        "baseline-clips", "elbo-samples", "lpips-weights", "fvd-weights", "threads",
        "frames", "fps", "frame-step", "windows", "num-windows", "stride", "short", "seed",
        "sizes", "pixel-budget", "aspect-ratios", "fit", "filter",
        "min-width", "min-height", "min-fps", "max-fps", "min-duration-seconds", "max-duration-seconds", "keep",
    } | DECODE,
    "synthesize": {"config", "output", "num-shards", "samples-per-shard", "seed"},
    "bench decode": {
        "config", "output", "hardware", "codecs", "heights", "frames", "side", "repetitions", "long-minutes",
        "long-height", "memory-minutes",
    },
    "bench encode": {
        "config", "output", "hardware", "cases", "contenders", "seconds-per-set", "repetitions", "cores",
        "decode-workers", "encode-threads", "device", "compute-dtype",
    },
    "bench model": {
        "config", "output", "hardware", "models", "device", "dtypes", "compile", "no-compile", "layouts", "frames",
        "size", "repetitions", "threads",
    },
    "bench scale": {
        "config", "output", "hardware", "parts", "engines", "encoders", "units", "workers", "worker-units",
        "books-units", "video-seconds", "video-height", "videos", "clips", "start-clips", "size", "repetitions",
    },
    "bench train": {
        "config", "output", "hardware", "frames", "size", "batch-size", "decode-workers", "threads", "step-seconds",
        "steps", "repetitions", "videos", "video-height", "video-frames",
    },
}  # fmt: skip


def test_the_flags_of_every_command() -> None:
    assert {name: set(flag_types(command.flags)) for name, command in COMMANDS.items()} == FLAGS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_at_once_and_explains_every_flag(command: str) -> None:
    program = (
        "import sys; from jobs.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('HEAVY', sorted({'torch', 'ray', 'zarr', 'pyarrow', 'av'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", program, *command.split(), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(arguments, capture_output=True, text=True, env={"COLUMNS": "100"}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of CPU time: a machine shared with others gives less of it per second.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "HEAVY []" in result.stdout
    if not command:
        assert all(f"  {name} " in result.stdout for name in COMMANDS)
        return
    text = " ".join(line.strip(" │") for line in result.stdout.splitlines())
    for flag in FLAGS[command]:
        if not flag.startswith("no-"):
            shown = re.findall(rf"--{flag}(?:,| )(.*?)\((?:default|required)", text)
            assert any(len(words.split()) > 2 for words in shown), f"--{flag} is not explained"


class TestTypos:
    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("enocde", "unknown command 'enocde' (did you mean encode?)"),
            ("encode --stroe x", "encode has no flag --stroe (did you mean --store?)"),
            ("plan --store x --frame 9", "plan has no flag --frame (did you mean --frames?)"),
            ("verify --store x --min_psnrs=3", "(did you mean --min-psnr?)"),
        ],
    )
    def test_the_nearest_is_named(self, line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(line.split()) == 2
        assert told in capsys.readouterr().err

    def test_a_value_of_the_wrong_type(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["encode", "--store", "x", "--workers", "two"])
        assert "--workers" in capsys.readouterr().err

    def test_a_missing_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["status"])
        assert "--store" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "line",
        [
            "encode --store x --local --workers 2",
            "encode --store x --workers 0",
            "encode --store x --decode-workers -1",
            "encode --store x --local --decode-placement cluster",
            "encode --store x --ray-address auto --decode-placement cluster --decode-workers 2",
            "train x.tar --output y --local --workers 2",
            "train x.tar --output y --local --decode-placement cluster",
            "train x.tar --output y --ray-address auto --decode-placement cluster --decode-workers 2",
            "encode --store x --frames 0",
            "encode --store x --windows slide",
            "encode --store x --batch-size 3 --unit-rows 4",
            "encode --store x --sizes 1x",
            "encode --store x --min-width 0",
            "plan --store x --max-failed-share 2",
            "verify --store x --share 2",
        ],
    )
    def test_a_record_that_cannot_be_is_one_line(self, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(line.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("latentmill: UsageError: ")
        assert err.count("\n") == 1

    def test_a_cluster_that_the_environment_names(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its CPUs decode, too, and there --decode-workers would mean nothing."""
        line = "encode --store x --decode-placement cluster --decode-workers 2"
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert isinstance(parse(line.split()), Encode)
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        assert main(line.split()) == 2
        assert "the CPUs of the cluster head:6379 decode: leave out --decode-workers" in capsys.readouterr().err
        assert isinstance(parse(["encode", "--store", "x", "--decode-workers", "2"]), Encode)


class TestValues:
    def test_a_value_that_begins_with_a_dash(self) -> None:
        for arguments in (["--keep", "-1 < width"], ["--keep=-1 < width"], ["--keep=-width < 3"]):
            command = parse(["plan", "--store", "x", *arguments])
            assert isinstance(command, PlanCommand)
            assert command.recipe.filters.keep == arguments[-1].removeprefix("--keep=")

    def test_none_and_both_bools(self) -> None:
        command = parse(["encode", "a.tar", "--store", "x", "--fps", "None", "--local"])
        assert isinstance(command, Encode)
        assert (command.recipe.sampling.fps, command.engine.local, command.shards) == (None, True, ("a.tar",))
        command = parse(["encode", "--store", "x", "--local", "--no-local"])
        assert isinstance(command, Encode)
        assert not command.engine.local

    def test_a_pixel_budget_takes_the_place_of_the_default_sizes(self) -> None:
        command = parse(["plan", "--pixel-budget", "65536", "--store", "x"])
        assert isinstance(command, PlanCommand)
        assert command.recipe.buckets == BucketConfig(pixel_budget=65536)

    def test_sizes_and_a_pixel_budget_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "--pixel-budget", "65536", "--sizes", "64x64", "--store", "x"]) == 2
        assert "sizes or pixel_budget" in capsys.readouterr().err


class TestConfigFile:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Any:
        def write(text: str) -> str:
            path = tmp_path / "job.yaml"
            path.write_text(text)
            return str(path)

        return write

    def test_every_kind_of_value(self, write: Any) -> None:
        text = """
            store: s
            shards: [a.tar, "b{0..2}.tar"]
            encoder: e
            frames: [9, 17]
            short: smaller
            fps: 12.5
            stride: null
            keep: -1 < width
            pixel-budget: 65536
            aspect_ratios: [16:9, 1:1]
            local: true
            decode_workers: 3
        """
        command = parse(["encode", "--config", write(text)])
        assert isinstance(command, Encode)
        assert command.shards == ("a.tar", "b{0..2}.tar")
        assert command.recipe.sampling == SamplingConfig((9, 17), fps=12.5, short="smaller")
        assert command.recipe.filters.keep == "-1 < width"
        assert command.recipe.buckets == BucketConfig(pixel_budget=65536, aspect_ratios=("16:9", "1:1"))
        assert (command.engine.local, command.engine.decode_workers) == (True, 3)

    def test_the_command_line_wins(self, write: Any) -> None:
        path = write("store: s\nfps: 8\nframes: [9, 17]\nshort: smaller\nlocal: yes\nshards: [a.tar]\nencoder: e")
        line = ["c.tar", "d.tar", "--config", path, "--fps", "4", "--no-local", "--frames", "5", "--store=t"]
        command = parse(["encode", *line])
        assert isinstance(command, Encode)
        assert command.shards == ("c.tar", "d.tar")
        assert command.recipe.sampling == SamplingConfig((5,), fps=4.0, short="smaller")
        assert (command.engine.local, command.store, command.recipe.encoder) == (False, "t", "e")

    def test_a_list_in_the_file_does_not_swallow_shards_on_the_line(self, write: Any) -> None:
        command = parse(["encode", f"--config={write('frames: [9]')}", "a.tar", "--store", "s"])
        assert isinstance(command, Encode)
        assert (command.shards, command.recipe.sampling.frames) == (("a.tar",), (9,))

    def test_keys_in_a_file(self, write: Any) -> None:
        command = parse(["reconstruct", "--config", write("keys: one\nstore: s")])
        assert isinstance(command, Reconstruct)
        assert command.keys == ("one",)

    def test_an_empty_file(self, write: Any) -> None:
        assert parse(["status", "--store", "s", "--config", write("# nothing")])

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("frame: [9]", "job.yaml: encode has no flag --frame (did you mean --frames?)"),
            ("keys: [a]", "encode has no flag --keys"),
            ("sampling: {frames: [9]}", "has no flag --sampling"),
            ("- 1\n- 2", "must be a mapping of flags to values, it is a list"),
            ("a: [", "cannot be read"),
            ("shards: [[1]]", "shards takes texts, got [['1']]"),
            ("workers: [1, 2]", "workers takes one value, got ['1', '2']"),
            ("frames: {a: 1}", "frames takes texts"),
            ("config: other.yaml", "a file cannot name another config"),
        ],
    )
    def test_wrong_files(self, write: Any, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["encode", "--store", "s", "--config", write(text)]) == 2
        assert told in capsys.readouterr().err

    @pytest.mark.parametrize(("text", "flag"), [("workers: two", "--workers"), ("device: tpu", "--device")])
    def test_wrong_types_are_answered_as_on_the_line(
        self, write: Any, text: str, flag: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["encode", "--store", "s", "--config", write(text)])
        assert flag in capsys.readouterr().err

    def test_a_missing_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["status", "--store", "s", "--config", "/none.yaml"]) == 2
        assert "--config /none.yaml cannot be read" in capsys.readouterr().err


class TestStoredRecipe:
    @pytest.fixture
    def store(self, tmp_path: Path) -> str:
        write_header(LocalStorage(tmp_path), Header(fake_recipe(caption_field="text"), "/models/fake"))
        return str(tmp_path)

    @pytest.mark.parametrize("command", ["plan", "encode"])
    def test_is_the_default(self, command: str, store: str) -> None:
        parsed = parse([command, "--store", store])
        assert isinstance(parsed, PlanCommand | Encode)
        assert parsed.recipe.encoder == "/models/fake"
        assert _recipe_of(parsed) == fake_recipe(caption_field="text")

    def test_below_the_file_and_the_flags(self, store: str, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("num_windows: 5\nbatch_size: 1")
        parsed = parse(["plan", "--store", store, "--config", str(tmp_path / "job.yaml"), "--batch-size", "4"])
        assert isinstance(parsed, PlanCommand)
        assert (parsed.recipe.sampling.num_windows, parsed.recipe.encode.batch_size) == (5, 4)

    def test_a_budget_replaces_its_sizes_and_the_reverse(self, store: str) -> None:
        parsed = parse(["plan", "--store", store, "--pixel-budget", "4096"])
        assert isinstance(parsed, PlanCommand)
        assert parsed.recipe.buckets == BucketConfig(pixel_budget=4096)
        write_header(LocalStorage(store), Header(fake_recipe(buckets=BucketConfig(pixel_budget=4096)), "/models/fake"))
        parsed = parse(["plan", "--store", store, "--sizes", "64x64"])
        assert isinstance(parsed, PlanCommand)
        assert parsed.recipe.buckets == BucketConfig(("64x64",))

    def test_other_commands_do_not_take_it(self, store: str) -> None:
        assert parse(["status", "--store", store]) == parse(["status", "--store", store, "--failures", "10"])

    def test_a_damaged_header(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        (Path(store) / "latents.zarr/zarr.json").write_text(json.dumps({"attributes": {}}))
        assert main(["encode", "--store", store]) == 1
        assert "is not a header of latentmill" in capsys.readouterr().err


positive = st.floats(0.01, 1e6)
samplings = st.one_of(
    st.builds(
        SamplingConfig,
        frames=st.lists(st.sampled_from((1, 5, 9, 17)), min_size=1, unique=True).map(tuple),
        fps=st.none() | positive,
        short=st.just("smaller"),
    ),
    st.builds(
        SamplingConfig,
        frames=st.just((9,)),
        windows=st.just("random"),
        num_windows=st.integers(1, 9),
        frame_step=st.integers(1, 4),
        seed=st.integers(-5, 10**12),
    ),
    st.builds(SamplingConfig, frames=st.just((5,)), windows=st.just("slide"), stride=st.integers(1, 99)),
)
buckets = st.one_of(
    st.builds(
        BucketConfig, sizes=st.sampled_from([("32x32",), ("64x32", "32x64")]), fit=st.sampled_from(["crop", "stretch"])
    ),
    st.builds(
        BucketConfig,
        pixel_budget=st.integers(10**4, 10**6),
        aspect_ratios=st.sampled_from([("1:1",), ("16:9", "9:16")]),
    ),
)
filters = st.builds(
    FilterConfig,
    min_width=st.none() | st.integers(1, 5000),
    min_fps=st.none() | st.floats(0.01, 1),
    max_fps=st.none() | st.floats(1, 1e5),
    keep=st.none()
    | st.sampled_from(["-1 < width", "-width < 0", 'meta["a b"] == "x=y"', "'--local' in caption", "key < 'é'"]),
)
encodes = st.one_of(
    st.builds(
        EncodeConfig,
        posterior=st.just("sample"),
        sample_seed=st.integers(0, 10**9),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    ),
    st.builds(
        EncodeConfig,
        batch_size=st.integers(1, 64),
        chunk_frames=st.none() | st.integers(1, 9).map(lambda n: 4 * n),
        stream_mb=st.floats(0.01, 1e6),
    ),
    st.builds(EncodeConfig, batch_size=st.just(2), unit_rows=st.integers(1, 50).map(lambda n: 2 * n)),
)
captions = st.none() | st.sampled_from(["text", "-text", "a b", "true"])


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Recipe, st.just(FAKE_CARD), samplings, buckets, filters, encodes, st.sampled_from(["auto", "pyav"]), captions
    )
)
def test_a_recipe_survives_the_way_through_its_flags(recipe: Recipe) -> None:
    parsed = parse(["plan", "--store=/nowhere", *to_flags(recipe_values(recipe))])
    assert isinstance(parsed, PlanCommand)
    assert _recipe_of(parsed) == recipe


def _recipe_of(command: PlanCommand | Encode) -> Recipe:
    flags = command.recipe
    return Recipe(
        FAKE_CARD, flags.sampling, flags.buckets, flags.filters, flags.encode, flags.decoder, flags.caption_field
    )


class TestExitCodes:
    @pytest.mark.parametrize(
        ("outcome", "code"),
        [(0, 0), (1, 1), (JobError("stop"), 1), (UsageError("no"), 2), (KeyboardInterrupt(), 130)],
        ids=["done", "found problems", "job error", "usage error", "interrupt"],
    )
    def test_of_a_command(
        self,
        outcome: int | BaseException,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def run(_: object) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(entry, "run", run)
        assert main(["status", "--store", "s"]) == code
        assert ("latentmill: " in capsys.readouterr().err) == isinstance(outcome, BaseException)

    def test_an_error_that_nobody_foresaw_keeps_its_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(_: object) -> int:
            raise ZeroDivisionError

        monkeypatch.setattr(entry, "run", run)
        with pytest.raises(ZeroDivisionError):
            main(["status", "--store", "s"])

    def test_every_command_has_a_runner(self) -> None:
        for command in COMMANDS.values():
            module, function = command.runner.split(":")
            assert callable(getattr(importlib.import_module(module), function))
            assert dataclasses.is_dataclass(command.flags)

    def test_nothing_at_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main([])
        assert "usage: latentmill COMMAND" in capsys.readouterr().out
