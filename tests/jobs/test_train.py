"""train through the command line: a model from a small tar, and a word when the adversary never had its turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.__main__ import main
from models.checkpoint import read_document
from tests.fakes import write_numbered_shards

FLAGS = ["--seconds", "0.2", "--frames", "5", "--size", "16", "--batch-size", "1", "--threads", "1"]


@pytest.mark.parametrize("kind", ["vq_gan", "vq_vae"])
def test_training_that_ends_before_the_adversary_starts_says_so(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = write_numbered_shards(tmp_path / "shards", 1, 2)
    output = tmp_path / "model"
    assert main(["train", str(shard), "--output", str(output), "--kind", kind, "--decode-workers", "1", *FLAGS]) == 0
    assert read_document(output).config.kind == kind
    captured = capsys.readouterr()
    steps = captured.out.split(" steps: ")[0].split()[-1]
    said = f"train: the adversary starts at step 10000; this training made {steps}\n"
    assert (said in captured.err) == (kind == "vq_gan")
    assert ("adversary" in captured.err) == (kind == "vq_gan")
