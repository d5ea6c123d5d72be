"""train through the command line: killed and started again, from weights that there are, by stages; what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.__main__ import main
from jobs.cli import parse
from jobs.train.config import ModelFlags, Train
from jobs.train.model import make_kind, make_objective
from models.blocks import BlockStack
from models.bottlenecks.config import Fsq, Kl
from models.checkpoint import load_checkpoint, read_document
from models.kinds.vq_gan import VqGan
from models.kinds.vq_vae_2 import VqVae2
from pipeline.buckets import BucketConfig
from pipeline.errors import UsageError
from tests.fakes import write_numbered_shards

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--local", "--threads", "1", "--decode-workers", "1", "--frames", "5", "--sizes", "16x16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("shards")
    write_numbered_shards(directory, 2, 4, broken={"broken": b"no video at all"})
    return str(directory / "*.tar")


def train(shards: str, output: Path, *flags: str) -> int:
    return main(["train", shards, "--output", str(output), *FLAGS, *flags])


def text_of(output: Path) -> str:
    """Everything that the model directory says: settings, normaliser, fingerprint of the weights."""
    return (output / "config.json").read_text()


def test_killed_in_mid_epoch_it_goes_on_to_the_same_model(shards: str, tmp_path: Path) -> None:
    flags = ["--steps", "10", "--checkpoint-every", "2", "--progress-seconds", "1e-9", "--draws-per-video", "1"]
    assert train(shards, tmp_path / "undisturbed", *flags) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "jobs", "train", shards, "--output", str(output), *FLAGS, *flags]
    number = random.Random().randint(3, 8)  # an epoch has 4 steps
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert any(f"train: step {number}," in line for line in process.stderr), number
        os.killpg(process.pid, signal.SIGKILL)
    assert not output.exists()
    assert 2 <= max(int(path.parent.name) for path in tmp_path.glob("killed.run/checkpoints/*/checkpoint.json")) < 10
    assert train(shards, output, *flags) == 0
    assert text_of(output) == text_of(tmp_path / "undisturbed"), number


@pytest.mark.parametrize("kind", ["vq_gan", "vq_vae"])
def test_training_that_ends_before_the_adversary_starts_says_so(
    kind: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert train(shards, output, "--kind", kind, "--seconds", "0.2") == 0
    assert read_document(output).config.kind == kind
    captured = capsys.readouterr()
    steps = captured.out.split(" steps ")[0].split()[-1]
    said = f"train: the adversary starts at step 10000; this training made {steps}\n"
    assert (said in captured.err) == (kind == "vq_gan")
    assert ("adversary" in captured.err) == (kind == "vq_gan")


def test_a_frozen_encoder_must_be_one_that_was_trained(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path / "model", "--freeze-encoder", "--steps", "1") == 2
    assert "--freeze-encoder needs --initial" in capsys.readouterr().err


def test_a_refused_flag_binds_nobody(shards: str, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "model", "--frames", "1001", "--steps", "1") == 2
    assert not (tmp_path / "model.run/train.json").exists()


def test_stages_then_a_frozen_encoder_from_the_weights_there_are(shards: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(shards, first, "--stages", "2 sizes=16x16 batch_size=4", "2 sizes=32x32 frames=1,5") == 0
    assert json.loads((tmp_path / "first.run/finished.json").read_text())["step"] == 4
    taught = ["--kind", "vq_gan", "--kind-options", "bottleneck.name=kl", "adversary.start_step=1"]
    small = ["adversary.channels=8", "adversary.depth=1"]
    assert train(shards, second, *taught, *small, "--initial", str(first), "--freeze-encoder", "--steps", "3") == 0
    (before, was), (after, found) = load_checkpoint(first), load_checkpoint(second)
    assert found.normaliser == was.normaliser
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latent = before.encode(clip).mean
    assert torch.equal(after.encode(clip).mean, latent)
    assert not torch.equal(after.decode(latent), before.decode(latent))
    adversary = load_file(tmp_path / "second.run/checkpoints/00000003/adversary_optimiser.safetensors")
    assert {int(value) for name, value in adversary.items() if name.endswith(".step")} == {2}


def test_gradient_checkpointing_makes_the_same_model(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched = []
    plain = BlockStack.forward
    monkeypatch.setattr(
        BlockStack,
        "forward",
        lambda self, x, state: (switched.append(self.gradient_checkpointing), plain(self, x, state))[1],
    )
    for name, flags in (("plain", ()), ("checkpointed", ("--gradient-checkpointing",))):
        switched.clear()
        assert train(shards, tmp_path / name, "--steps", "2", *flags) == 0
        assert any(switched) == bool(flags)
    assert text_of(tmp_path / "plain") == text_of(tmp_path / "checkpointed")


def test_flags_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        """
shards: [a.tar, b.tar]
output: model
kind: vq_vae
kind_options: [bottleneck.codebook_size=64, weights.l2=0.5]
stages: [2000 sizes=64x64 batch_size=8, 1000 sizes=128x128]
freeze_encoder: true
"""
    )
    command = parse(["train", "--config", str(file), "--pixel-budget", "4096", "--seed", "3"])
    assert isinstance(command, Train)
    assert command.shards == ("a.tar", "b.tar")
    assert command.model == ModelFlags("vq_vae", kind_options=("bottleneck.codebook_size=64", "weights.l2=0.5"))
    assert command.stages == ("2000 sizes=64x64 batch_size=8", "1000 sizes=128x128")
    assert command.buckets == BucketConfig(pixel_budget=4096)
    assert (command.settings.freeze_encoder, command.draw.seed, command.run_url) == (True, 3, "model.run")


class TestRefused:
    def err(self, capsys: pytest.CaptureFixture[str]) -> str:
        return capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--frames", "6"], "--frames 6 --sizes 16x16: 6 frames are not 1+4k: use 5 or 9"),
            (["--frames", "401"], "no sample of the shards has 401 frames: use fewer --frames"),
            (["--stages", "3 sizes=16x16", "frames=401"], "no sample of the shards has 401 frames"),
            (["--sizes", "20x16"], "size 20x16 is not on the encoder's grid"),
            (["--kind", "nose"], "no model kind 'nose': use one of ae"),
            (["--preset", "nose"], "no model preset 'nose'"),
            (["--kind-options", "nose=1"], "Vae has no nose; it has weights, bottleneck"),
            (["--batch-size", "3", "--micro-batches", "2"], "--batch-size 3 must be a multiple of --workers 1 times"),
            (["--stages", "3 sizes=16x16", "--steps", "4"], "--steps 4, but the --stages have 3 together"),
            (["--stages", "3 sizes=16x16", "sizes=32x32", "--steps", "3"], "--steps 3 end before the last"),
            (["--initial", "/none"], "--initial /none"),
            (["--evaluate-every", "3"], "--evaluate-every needs --held-out"),
            (["--checkpoint-every", "3", "--keep-every", "4"], "--keep-every 4 is no multiple of --checkpoint-every 3"),
            (["--seconds", "0"], "--seconds must be positive"),
            (["--workers", "2"], "--local runs one worker in this process: leave out --workers"),
            (["--normaliser-batches", "-1"], "--normaliser-batches must not be negative"),
        ],
    )
    def test_flags(
        self, flags: list[str], words: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(shards, tmp_path / "model", *flags) == 2
        assert words in self.err(capsys)
        assert not (tmp_path / "model.run" / "checkpoints").exists()

    def test_an_output_that_is_there(self, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert train(shards, tmp_path) == 2
        assert f"--output {tmp_path} exists already: name a new directory, or remove it" in self.err(capsys)
        assert main(["train", "--output", str(tmp_path / "model")]) == 2
        assert "train needs SHARDS" in self.err(capsys)

    def test_a_run_of_other_flags_or_shards(
        self, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = ["--run", str(tmp_path / "run")]
        assert train(shards, tmp_path / "one", "--steps", "1", *run) == 0
        assert train(shards, tmp_path / "two", "--steps", "1", *run, "--kind", "ae", "--log-every", "7") == 1
        err = self.err(capsys)
        assert '--kind: it began with "vae", this command asks for "ae"' in err
        assert "another --run" in err
        assert "log-every" not in err
        fewer = str(Path(shards).with_name("shard-000.tar"))
        assert train(fewer, tmp_path / "two", "--steps", "1", *run) == 1
        assert 'SHARDS: it began with "2 with hash' in self.err(capsys)
        assert train(shards, tmp_path / "two", "--steps", "1", *run, "--held-out", fewer) == 1
        assert '--held-out: it began with "0 with hash' in self.err(capsys)

    def test_initial_weights_of_another_model(
        self, shards: str, vae_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(shards, tmp_path / "model", "--steps", "1", "--initial", str(vae_directory), "--kind", "ae") == 2
        assert "is another model than --kind ae --preset tiny-4x8x8x16: it differs at" in self.err(capsys)


class TestKindOptions:
    def test_reach_records_within_the_kind(self) -> None:
        options = ["bottleneck.name=kl", "bottleneck.beta=1e-3", "weights.l2=1", "adversary.discriminator=2d"]
        kind = make_kind("vq_gan", options)
        assert isinstance(kind, VqGan)
        assert kind.bottleneck == Kl(beta=1e-3)
        assert (kind.weights.l2, kind.weights.l1, kind.adversary.discriminator) == (1, 1.0, "2d")

    def test_lists_are_json(self) -> None:
        assert make_kind("fsq", ["bottleneck.levels=[8, 5]"]).bottleneck == Fsq((8, 5))  # type: ignore[attr-defined]
        kind = make_kind("vq_vae_2", ["downs=[[1, 2], [2, 2]]", "top_latent_channels=null"])
        assert isinstance(kind, VqVae2)
        assert (kind.downs, kind.top_latent_channels) == (((1, 2), (2, 2)), None)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["bottleneck.codebook_size=1.5"], "codebook_size=1.5: it takes int"),
            (["bottleneck.codebook_size=1"], "codebook_size must be at least 2, got 1"),
            (["bottleneck.update=fast"], r"update=fast: it takes Literal\['ema', 'gradient'\]"),
            (["bottleneck.cosine=1"], "cosine=1: it takes bool"),
            (["bottleneck.name=kl"], "cannot be 'kl'; it can be vq"),
            (["bottleneck=vq"], "bottleneck=vq: it takes Vq"),
            (["weights.l1.x=2"], "l1 is no record, but a value"),
            (["weights"], "write name=value, each name once"),
            (["weights.l1=1", "weights.l1=2"], "each name once"),
            (["weights.lpips=1"], "lpips and lpips_weights go together"),
        ],
    )
    def test_that_cannot_be_are_refused(self, options: list[str], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            make_kind("vq_vae", options)


def test_initial_weights_are_taken(vae_directory: Path) -> None:
    model = make_objective(ModelFlags(initial=vae_directory), seed=3).model
    wanted, _ = load_checkpoint(vae_directory)
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
