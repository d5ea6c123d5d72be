"""The model benchmark: whole and streamed, a way that a model cannot run, and names that are not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.__main__ import main
from jobs.bench import model as bench_model
from jobs.bench import model_child
from jobs.bench.model import to_markdown
from jobs.bench.model_child import Built, build, measure
from models.config import preset
from models.cost import kmacs_per_pixel, parameters
from tests.pretrained_models import COSMOS, LTX_2, WAN_21

SPEC = {
    "model": "tiny-4x8x8x16",
    "how": "streamed",
    "compiled": False,
    "dtype": "float32",
    "layout": "contiguous",
    "device": "cpu",
    "frames": 10,
    "size": 30,
    "repetitions": 1,
    "threads": 1,
}


def test_a_small_run_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--models",
        "tiny-4x8x8x16",
        "--layouts",
        "channels_last_3d",
        "--frames",
        "9",
        "--size",
        "32",
        "--repetitions",
        "1",
        "--threads",
        "1",
    ]
    assert main(["bench", "model", "--output", str(tmp_path), "--hardware", "here", "--no-compile", *flags]) == 0
    (path,) = tmp_path.glob("model_here_*.json")
    result = json.loads(path.read_text())
    assert [(row["how"], row["dtype"]) for row in result["rows"]] == [
        ("plain", "float32"),
        ("streamed", "float32"),
        ("plain", "bfloat16"),
        ("streamed", "bfloat16"),
    ]
    assert all(row["frames_per_second"] > 0 and row["peak_mib"] > 50 for row in result["rows"])
    assert "| streamed, channels last |" in path.with_suffix(".md").read_text()
    short, long = result["lengths"]
    assert long["frames"] == 1025
    assert long["peak_mib"] <= 1.15 * short["peak_mib"]
    assert path.with_suffix(".md").read_text().strip() in capsys.readouterr().out


def test_what_is_measured_is_the_model() -> None:
    row = measure(SPEC)
    config = preset("tiny-4x8x8x16")
    assert row["shape"] == [9, 32, 32]
    assert (row["encoder"], row["decoder"]) == (parameters(config, "encoder"), parameters(config, "decoder"))
    assert row["kmacs_per_pixel"] == pytest.approx(kmacs_per_pixel(config, "encoder"), rel=0.15)  # the leading frame


@pytest.mark.parametrize("how", ["plain", "streamed"])
def test_what_dtype_and_layout_change_in_the_latent(how: str) -> None:
    rows = [
        measure({**SPEC, "how": how, "dtype": dtype, "layout": layout})
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last_3d")
    ]
    exact, last, rounded, rounded_last = (row["latent_error_std"] for row in rows)
    assert exact == 0
    assert 0 <= last < 1e-4  # the clip's layout decides on a CPU
    assert 1e-4 < rounded < 0.2
    assert 1e-4 < rounded_last < 0.2


@pytest.mark.parametrize("how", ["plain", "streamed"])
@pytest.mark.parametrize(("name", "config"), [("AutoencoderKLLTX2Video", LTX_2), ("AutoencoderKLWan", WAN_21)])
def test_a_model_that_is_measured_plain_is_left_untouched(
    name: str, config: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.bench.model_child.real_configs", lambda: {"tiny": (name, config)})
    row = measure({**SPEC, "model": "tiny", "how": how, "size": 64})
    assert row["frames_per_second"] > 0
    if how == "plain":
        vae = build("tiny", how).module
        assert not any(type(module).__module__.startswith("models.") for module in vae.modules())


def test_a_model_that_takes_whole_clips_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.bench.model_child.real_configs", lambda: {"tiny": ("AutoencoderKLCosmos", COSMOS)})
    assert measure({**SPEC, "model": "tiny"}) == {"error": "takes whole clips only"}


def test_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "--output", str(tmp_path), "--models", "wan-9"]) == 2
    assert "--models wan-9: use some of tiny-4x8x8x16" in capsys.readouterr().err
    assert main(["bench", "model", "--output", str(tmp_path / "none"), "--models", "wan-2.1"]) == 2
    assert "is no directory" in capsys.readouterr().err


def watch_plain(monkeypatch: pytest.MonkeyPatch, look: Callable[[Built, torch.Tensor], None]) -> None:
    """Look at a model and its clip whenever it is called."""

    def watched(name: str, how: str) -> Built:
        built = build(name, how)

        def plain(clip: torch.Tensor) -> torch.Tensor:
            look(built, clip)
            return built.plain(clip)

        return dataclasses.replace(built, plain=plain)

    monkeypatch.setattr(model_child, "build", watched)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_peak_is_that_of_the_timed_encodes(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(name: str) -> None:
        work = getattr(model_child, name)
        monkeypatch.setattr(model_child, name, lambda *given: (events.append(name), work(*given))[1])

    for name in ("_count_macs", "_error_std", "_forget_peak", "_peak_mib", "_matrix_rate"):
        note(name)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: events.append("compile"))
    watch_plain(monkeypatch, lambda built, _: events.append(str(next(built.module.parameters()).dtype)))
    row = measure({**SPEC, "how": "plain", "dtype": "bfloat16", "compiled": compiled, "repetitions": 2})
    rounded = "torch.bfloat16"
    assert events == [
        "torch.float32", "_count_macs", rounded, *(["compile"] if compiled else []), rounded, "_error_std",
        "_forget_peak", rounded, rounded, "_peak_mib", "_matrix_rate",
    ]  # fmt: skip
    assert row["matrix_share"] > 0


def test_clips_have_the_strides_of_the_pipelines_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    watch_plain(monkeypatch, lambda _, clip: seen.append(clip))
    whole = model_child.stream

    def stream(backend: Any, chunks: Any) -> torch.Tensor:
        seen.extend(pieces := list(chunks))
        return whole(backend, pieces)

    monkeypatch.setattr(model_child, "stream", stream)
    for how in ("plain", "streamed", "length"):
        seen.clear()
        measure({**SPEC, "how": how, "dtype": "float32" if how == "length" else "bfloat16"})
        assert seen
        assert all(clip.is_contiguous(memory_format=torch.channels_last_3d) for clip in seen), how
        assert not any(clip.is_contiguous() for clip in seen), how


@pytest.mark.parametrize(("layout", "last"), [("contiguous", [False] * 4), ("channels_last_3d", [False] + [True] * 3)])
def test_the_layout_is_that_of_the_weights(layout: str, last: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the reference: in counting, warming up and the timed encode."""
    found: list[bool] = []

    def look(built: Built, _: torch.Tensor) -> None:
        weights = [one.weight for one in built.module.modules() if isinstance(one, torch.nn.Conv3d)]
        found.append(all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights))

    watch_plain(monkeypatch, look)
    measure({**SPEC, "how": "plain", "layout": layout})
    assert found == last


class TestTF32:
    """On CUDA float32 convolutions take it by default, matrix products do not; a CPU has the switches, too."""

    def test_the_reference_goes_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        switches: list[tuple[bool, bool]] = []
        cudnn = torch.backends.cudnn
        watch_plain(monkeypatch, lambda *_: switches.append((cudnn.enabled, cudnn.allow_tf32)))
        measure({**SPEC, "how": "plain"})
        assert switches[0] == (True, False)
        assert set(switches[1:]) == {(True, True)}
        assert cudnn.allow_tf32

    @pytest.mark.parametrize("allowed", [False, True])
    def test_the_matrix_product_goes_as_convolutions_go(self, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        switches: list[bool] = []

        def seconds(*_: Any) -> float:
            switches.append(torch.backends.cuda.matmul.allow_tf32)
            return 1.0

        monkeypatch.setattr(torch, "randn", lambda *_, device: torch.ones(1, 1))
        monkeypatch.setattr(model_child, "_seconds", seconds)
        with model_child._tf32(torch.backends.cudnn, allowed=allowed):
            model_child._matrix_rate(torch.device("cuda"), torch.float32)
        assert set(switches) == {allowed}
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32


def page(device: str, **row: Any) -> str:
    cell = {
        "encoder": 1e6, "decoder": 1e6, "kmacs_per_pixel": 9.0, "frames_per_second": 5.0, "peak_mib": 70.0,
        "matrix_share": 0.5, "latent_error_std": 0.0, "tf32": False, **row,
    }  # fmt: skip
    about = {
        "command": "c",
        "date": "d",
        "commit": "abc",
        "hardware": "h",
        "threads": 1,
        "versions": {},
        "clip": "9x32x32",
    }
    lengths = [{"frames": 33, "peak_mib": 64.0}, {"frames": 1025, "error": "timed out after 9 s"}]
    return "\n".join(
        to_markdown(
            {"about": {**about, "repetitions": 1, "device": device}, "rows": [{**SPEC, **cell}], "lengths": lengths}
        )
    )


def test_the_report_says_whose_memory_it_is_and_what_float32_means() -> None:
    assert "| frames | peak MiB of the process |\n|---|---|\n| 33 | 64.0 |\n| 1025 | timed out after 9 s |" in page(
        "cpu"
    )
    assert "TF32" not in page("cpu")
    assert "| frames | peak MiB that torch allocated on the GPU |" in page("cuda")
    assert "100 %, without TF32; the reference latent without" in page("cuda")
    assert "100 %, with TF32; the reference latent without" in page("cuda", tf32=True)


def test_a_row_that_takes_too_long_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "_LIMIT_SECONDS", 0.01)
    flags = ["--hardware", "here", "--models", "tiny-4x8x8x16", "--dtypes", "float32", "--no-compile"]
    assert main(["bench", "model", "--output", str(tmp_path), *flags]) == 1
    (path,) = tmp_path.glob("model_here_*.json")
    result = json.loads(path.read_text())
    assert [row["error"] for row in (*result["rows"], *result["lengths"])] == ["timed out after 0.01 s"] * 4
    assert path.with_suffix(".md").exists()
