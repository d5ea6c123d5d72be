"""The model benchmark: whole and streamed, a way that a model cannot run, and names that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.bench.model_child import build, measure
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
    assert 0 < last < 1e-4
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
