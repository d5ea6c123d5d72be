"""evaluate: every number against its definition, with models of random weights, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jobs.__main__ import main
from jobs.evaluate.clips import IndexedShards, spread
from jobs.evaluate.command import evaluate_encoder
from jobs.evaluate.config import EvaluateSettings
from models.bottlenecks.config import BottleneckConfig, Fsq, Kl, NoBottleneck, ResidualVq
from models.build import build_model
from models.checkpoint import save_checkpoint
from models.config import ModelConfig
from models.encoders import load_encoder
from models.generative.codes import latent_to_grids
from models.generative.pca import PatchPcaMeter
from models.lpips import ALEXNET, Lpips
from models.native import load_native
from models.pixels import to_pixels
from models.spec import Normaliser
from pipeline.buckets import BucketConfig
from pipeline.decode.records import ClipShape, Window
from pipeline.errors import FailureLimitError, UsageError
from pipeline.evaluation import Evaluation, bicubic
from pipeline.frechet import FeatureStatistics, frechet_distance
from pipeline.quality import psnr, ssim
from pipeline.sampling import SamplingConfig
from tests.backbones import NARROW
from tests.fakes import FakeDecoders, fake_frames, planned_store, write_numbered_shards

VIDEOS = {"a": 5, "b": 12, "c": 7, "short": 3}
KEYS = ("a", "b", "c")
SHAPE = ClipShape(32, 32)
SETTINGS = EvaluateSettings(SamplingConfig((5,)), BucketConfig(("32x32",)))
# NARROW keeps 4 channels per 2 x 4 x 4 pixels: 3 x 8 x 8 positions of a clip.
POSITIONS, PIXELS = 3 * 8 * 8, 5 * 32 * 32


class Moments(torch.nn.Module):
    """Stands for I3D: a mean and a mean change per channel."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        changes = (x[:, :, 1:] - x[:, :, :-1]).abs()
        return torch.cat([x.mean(dim=(2, 3, 4)), changes.mean(dim=(2, 3, 4))], dim=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of each kind of latent."""
    folder = tmp_path_factory.mktemp("models")
    bottlenecks: dict[str, BottleneckConfig] = {
        "kl": Kl(),
        "plain": NoBottleneck(),
        "fsq": Fsq(levels=(3, 3, 3, 3)),
        "rvq": ResidualVq(codebook_size=8, num_quantisers=2),
    }
    for seed, (name, bottleneck) in enumerate(bottlenecks.items()):
        torch.manual_seed(seed)
        model = build_model(ModelConfig(NARROW, bottleneck, name))
        save_checkpoint(folder / name, model, Normaliser((0.0,) * 4, (1.0,) * 4))
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_file(Lpips(ALEXNET).parameters_by_name(), folder / "lpips.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Moments()).save(str(folder / "i3d.pt"))
    return folder / "lpips.safetensors", folder / "i3d.pt"


def indexed(folder: Path, *videos: dict[str, int]) -> IndexedShards:
    storage, plan = planned_store(folder, videos)
    return IndexedShards(storage, tuple(plan.shards.values()))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return indexed(tmp_path_factory.mktemp("held_out"), VIDEOS)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return indexed(tmp_path_factory.mktemp("training"), {f"train{number}": 5 for number in range(6)})


def frames_of(key: str) -> np.ndarray:
    return fake_frames(key, Window(0, 5), SHAPE)


def reconstruct(model: Path, frames: np.ndarray) -> np.ndarray:
    encoder = load_encoder(str(model))
    return encoder.decode(encoder.encode(torch.from_numpy(frames)[None]).mean.half().float())[0].numpy()


def moments_of(clips: list[np.ndarray]) -> FeatureStatistics:
    """What Moments says of a set, without it."""
    statistics = FeatureStatistics()
    for clip in clips:
        moves = np.abs(np.diff(clip.astype(float), axis=0))
        statistics.update(np.concatenate([clip.mean(axis=(0, 1, 2)), moves.mean(axis=(0, 1, 2))])[None])
    return statistics


@pytest.fixture(scope="module")
def kl(models: Path, held_out: IndexedShards, training: IndexedShards, networks: tuple[Path, Path]) -> Evaluation:
    settings = dataclasses.replace(SETTINGS, lpips_weights=networks[0], fvd_weights=networks[1])
    return evaluate_encoder(str(models / "kl"), held_out, FakeDecoders(), settings, training)


class TestReconstruction:
    def test_scores_are_those_of_what_a_store_gives_back(self, models: Path, kl: Evaluation) -> None:
        assert tuple(clip.key for clip in kl.clips) == KEYS
        for clip in kl.clips:
            source = frames_of(clip.key)
            made = reconstruct(models / "kl", source)
            assert clip.scores[0].psnr == pytest.approx(psnr(source, made))
            assert clip.scores[0].ssim == pytest.approx(ssim(source, made))

    def test_the_set_is_the_mean_of_its_clips(self, kl: Evaluation) -> None:
        for number, codec in enumerate(kl.codecs):
            for name in ("psnr", "ssim", "temporal_psnr", "flicker", "lpips"):
                values = [getattr(clip.scores[number], name) for clip in kl.clips]
                assert getattr(codec.scores, name) == pytest.approx(np.mean(values)), name

    def test_lpips_is_the_mean_over_frames(self, models: Path, kl: Evaluation, networks: tuple[Path, Path]) -> None:
        from models.lpips import load_lpips

        source = frames_of("b")
        pair = (to_pixels(torch.from_numpy(clip)[None], "cpu") for clip in (reconstruct(models / "kl", source), source))
        expected = float(load_lpips(networks[0])(*pair))
        assert kl.clips[1].scores[0].lpips == pytest.approx(expected, rel=1e-4)

    def test_rfvd_is_of_the_whole_set(self, models: Path, kl: Evaluation) -> None:
        sources = [frames_of(key) for key in KEYS]
        made = {
            0: [reconstruct(models / "kl", source) for source in sources],
            2: [bicubic(source, (7, 8)) for source in sources],
        }
        for number, clips in made.items():
            expected = frechet_distance(moments_of(sources), moments_of(clips))
            assert kl.codecs[number].frechet_distance == pytest.approx(expected, rel=1e-3)

    def test_the_same_arguments_give_the_same_record(
        self, models: Path, held_out: IndexedShards, training: IndexedShards
    ) -> None:
        trees = [
            evaluate_encoder(str(models / "kl"), held_out, FakeDecoders(seconds), SETTINGS, training).to_tree()
            for seconds in (0.0, 0.02)
        ]
        assert trees[0] == trees[1]


class TestBaselines:
    def test_have_the_encoders_rate(self, kl: Evaluation) -> None:
        encoder, pca, bicubic_codec = kl.codecs
        assert [codec.name for codec in kl.codecs] == ["kl-2x4x4x4", "PCA", "bicubic"]
        assert encoder.rate == pca.rate
        assert (encoder.rate.numbers, encoder.rate.bits) == (3 * 4 * POSITIONS, 3 * 4 * POSITIONS * 16)
        assert encoder.rate.pixels == 3 * PIXELS
        # 153.6 values a frame are 51.2 pixels: 7 x 8 is the smallest size next to 7.2 x 7.2 that holds them.
        assert bicubic_codec.rate.numbers == 3 * 5 * 3 * 7 * 8

    def test_pca_is_fitted_to_the_training_clips_alone(self, models: Path, kl: Evaluation) -> None:
        meter = PatchPcaMeter(load_encoder(str(models / "kl")).card.geometry)
        for number in range(6):
            meter.update(to_pixels(torch.from_numpy(frames_of(f"train{number}"))[None], "cpu"))
        pca, source = meter.result(), to_pixels(torch.from_numpy(frames_of("a"))[None], "cpu")
        made = pca.decode(pca.encode(source).mean.half().float()).clamp(-1, 1)
        expected = ((made + 1) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 3, 0)
        assert kl.clips[0].scores[1].psnr == pytest.approx(psnr(frames_of("a"), expected))
        assert kl.baseline is not None
        assert (kl.baseline.clips, kl.baseline.failed, kl.baseline.held_out_shards) == (6, 0, ())

    def test_bicubic_keeps_that_size(self, kl: Evaluation) -> None:
        assert kl.clips[0].scores[2].psnr == pytest.approx(psnr(frames_of("a"), bicubic(frames_of("a"), (7, 8))))

    def test_without_training_clips_there_is_bicubic_alone(self, models: Path, held_out: IndexedShards) -> None:
        found = evaluate_encoder(str(models / "kl"), held_out, FakeDecoders(), SETTINGS)
        assert [codec.name for codec in found.codecs] == ["kl-2x4x4x4", "bicubic"]
        assert found.baseline is None
        assert found.latent.kl is not None
        assert found.latent.elbo is None
        assert found.codecs[0].frechet_distance is None

    def test_training_on_the_held_out_tars_is_said(self, models: Path, held_out: IndexedShards) -> None:
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(bad=("c",)), SETTINGS, held_out)
        assert found.baseline is not None
        assert found.baseline.held_out_shards == held_out.urls
        assert (found.baseline.clips, found.baseline.failed) == (2, 1)

    def test_no_more_clips_are_fitted_to_than_asked(self, models: Path, held_out: IndexedShards) -> None:
        many = dataclasses.replace(SETTINGS, baseline_clips=2)
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), many, held_out)
        assert found.baseline is not None
        assert found.baseline.clips == 2

    def test_training_clips_of_which_none_can_be_decoded(
        self, models: Path, held_out: IndexedShards, training: IndexedShards
    ) -> None:
        bad = FakeDecoders(bad=[f"train{number}" for number in range(6)])
        with pytest.raises(UsageError, match="--baseline-shards: a PCA is fitted to clips, got none"):
            evaluate_encoder(str(models / "kl"), held_out, bad, SETTINGS, training)


class TestLatents:
    def test_kl_and_elbo_by_their_formulas(self, models: Path, kl: Evaluation) -> None:
        encoder, scale = load_encoder(str(models / "kl")), kl.latent.likelihood_scale
        assert scale is not None
        for clip in kl.clips:
            source = torch.from_numpy(frames_of(clip.key))[None]
            posterior = encoder.encode(source)
            assert posterior.logvar is not None
            mean, variance = posterior.mean.half().double(), posterior.logvar.double().exp()
            divergence = 0.5 * (mean**2 + variance - 1 - variance.log())
            assert clip.kl == pytest.approx(float(divergence.mean()))
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
            made = encoder.decode(posterior.mean + noise * (0.5 * posterior.logvar).exp())
            residual = (source.double() - made.double()) / 127.5 / scale
            log_density = -0.5 * residual**2 - math.log(scale * math.sqrt(2 * math.pi))
            bound = float(log_density.sum()) - float((0.5 * (posterior.mean**2 + variance - 1 - variance.log())).sum())
            bits = -(bound / source.numel() + math.log(2 / 255)) / math.log(2)
            assert clip.elbo_bits_per_dimension == pytest.approx(bits, rel=1e-4)
        found = [clip.elbo_bits_per_dimension for clip in kl.clips]
        assert kl.latent.elbo_bits_per_dimension == pytest.approx(np.mean(found))

    def test_the_likelihood_is_fitted_to_training_clips(self, models: Path, kl: Evaluation) -> None:
        encoder, squares = load_encoder(str(models / "kl")), []
        for number in range(6):
            frames = torch.from_numpy(frames_of(f"train{number}"))[None]
            posterior = encoder.encode(frames)
            assert posterior.logvar is not None
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
            made = encoder.decode(posterior.mean + noise * (0.5 * posterior.logvar).exp())
            squares.append(((frames.double() - made.double()) / 127.5).square().mean())
        assert kl.latent.likelihood_scale == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-5)

    def test_more_samples_change_the_bound_and_nothing_else(
        self, models: Path, held_out: IndexedShards, training: IndexedShards, kl: Evaluation
    ) -> None:
        settings = dataclasses.replace(SETTINGS, elbo_samples=3)
        found = evaluate_encoder(str(models / "kl"), held_out, FakeDecoders(), settings, training)
        assert found.latent.elbo != kl.latent.elbo
        assert found.latent.kl == kl.latent.kl

    @pytest.mark.parametrize(("name", "sizes"), [("fsq", [81]), ("rvq", [8, 8])])
    def test_codes_are_counted_over_the_set_and_cost_their_bits(
        self, name: str, sizes: list[int], models: Path, held_out: IndexedShards, training: IndexedShards
    ) -> None:
        found = evaluate_encoder(str(models / name), held_out, FakeDecoders(), SETTINGS, training)
        model = load_native(models / name)[1].model
        encoder = load_encoder(str(models / name))
        latents = [encoder.encode(torch.from_numpy(frames_of(key))[None]).mean for key in KEYS]
        (ids,) = zip(*(latent_to_grids(model, latent) for latent in latents), strict=True)
        for number, codes in enumerate(found.latent.codes):
            chosen = torch.cat([grid[:, number].flatten() for grid in ids])
            shares = torch.bincount(chosen).double() / len(chosen)
            entropy = float(torch.special.entr(shares).sum())
            assert (codes.codebook_size, codes.seen, codes.used) == (sizes[number], 3 * POSITIONS, len(chosen.unique()))
            assert codes.perplexity == pytest.approx(math.exp(entropy))
        bits = sum(map(math.log2, sizes))
        own, pca, _ = (codec.rate for codec in found.codecs)
        assert own.bits == pytest.approx(3 * POSITIONS * bits)
        assert own.numbers == 3 * POSITIONS * len(sizes)
        assert pca.numbers == 3 * POSITIONS  # one float16 number is the least that holds these bits
        assert all(codec.rate.bits >= own.bits for codec in found.codecs)
        assert (found.latent.kl, found.latent.elbo) == (None, None)

    def test_a_plain_latent_has_neither(self, models: Path, held_out: IndexedShards, training: IndexedShards) -> None:
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), SETTINGS, training)
        assert (found.latent.kl, found.latent.elbo, found.latent.codes) == (None, None, ())

    def test_a_wider_type_costs_more(self, models: Path, held_out: IndexedShards) -> None:
        settings = dataclasses.replace(SETTINGS, dtype="float32")
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings)
        assert found.codecs[0].rate.bits == 3 * 4 * POSITIONS * 32


class TestWhatCannotBeJudged:
    def test_is_counted_by_reason_and_named(self, models: Path, held_out: IndexedShards) -> None:
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(bad=("b",)), SETTINGS)
        assert [clip.key for clip in found.clips] == ["a", "c"]
        assert [(clip.key, clip.window, clip.reason, clip.detail) for clip in found.failed] == [
            ("b", 0, "bad_media", "on purpose")
        ]
        assert found.filtered == {"short_video": 1}
        assert len(found.clips) + len(found.failed) + sum(found.filtered.values()) == len(VIDEOS)
        assert [clip.key for clip in found.shown] == ["a", "c"]

    def test_a_failed_clip_leaves_its_place_on_the_sheet_to_the_next(self, models: Path, tmp_path: Path) -> None:
        many = indexed(tmp_path, {f"v{number:02d}": 5 for number in range(20)})
        found = evaluate_encoder(str(models / "plain"), many, FakeDecoders(bad=("v00",)), SETTINGS)
        assert len(found.shown) == 8
        assert found.shown[0].key == "v01"
        assert found.shown[-1].key == "v19"

    def test_infinite_latents_fail_their_clip(self, models: Path, held_out: IndexedShards, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = build_model(ModelConfig(NARROW, NoBottleneck(), "plain"))
        with torch.no_grad():
            assert model.encoder.conv_out.conv.bias is not None
            model.encoder.conv_out.conv.bias += 1e6
        save_checkpoint(tmp_path / "huge", model, Normaliser((0.0,) * 4, (1.0,) * 4))
        with pytest.raises(FailureLimitError, match=r"could be judged with .*huge: overflow 3, short_video 1"):
            evaluate_encoder(str(tmp_path / "huge"), held_out, FakeDecoders(), SETTINGS)

    def test_padded_frames_are_not_judged(self, models: Path, held_out: IndexedShards) -> None:
        settings = dataclasses.replace(SETTINGS, sampling=SamplingConfig((7,), short="pad"))
        found = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings)
        by_key = {clip.key: clip for clip in found.clips}
        source = frames_of("a")
        made = reconstruct(models / "plain", np.concatenate([source, source[-1:], source[-1:]]))
        assert by_key["a"].scores[0].psnr == pytest.approx(psnr(source, made[:5]))
        assert "short" in by_key


class TestStills:
    SAMPLING = SamplingConfig((1, 5), short="smaller")

    def test_count_where_they_can(
        self, models: Path, held_out: IndexedShards, training: IndexedShards, networks: tuple[Path, Path]
    ) -> None:
        settings = dataclasses.replace(SETTINGS, sampling=self.SAMPLING, fvd_weights=networks[1])
        with_stills = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings, training)
        settings = dataclasses.replace(SETTINGS, fvd_weights=networks[1])
        without = evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings, training)
        assert len(with_stills.clips) == len(without.clips) + 1
        for mixed, videos in zip(with_stills.codecs, without.codecs, strict=True):
            assert mixed.scores.temporal_psnr == pytest.approx(videos.scores.temporal_psnr)
            assert mixed.frechet_distance == pytest.approx(videos.frechet_distance)
            assert mixed.scores.psnr != videos.scores.psnr
            assert mixed.rate.pixels == videos.rate.pixels + 32 * 32

    def test_are_not_enough_to_fit_the_pca_of_videos(
        self, models: Path, held_out: IndexedShards, tmp_path: Path
    ) -> None:
        stills = indexed(tmp_path, {f"still{number}": 1 for number in range(5)})
        settings = dataclasses.replace(SETTINGS, sampling=self.SAMPLING)
        with pytest.raises(UsageError, match="--baseline-shards: this PCA was fitted to clips without the frames"):
            evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings, stills)


class TestRefusals:
    def test_an_encoder_that_is_not_there(self, held_out: IndexedShards) -> None:
        with pytest.raises(UsageError, match="the encoder nowhere/at/all cannot be loaded"):
            evaluate_encoder("nowhere/at/all", held_out, FakeDecoders(), SETTINGS)

    def test_networks_that_are_none(self, models: Path, held_out: IndexedShards, tmp_path: Path) -> None:
        (tmp_path / "none").write_text("nothing")
        for name in ("lpips_weights", "fvd_weights"):
            settings = dataclasses.replace(SETTINGS, **{name: tmp_path / "none"})
            with pytest.raises(UsageError, match="none"):
                evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings)

    def test_frames_too_small_for_lpips(
        self, models: Path, held_out: IndexedShards, networks: tuple[Path, Path]
    ) -> None:
        settings = EvaluateSettings(SamplingConfig((5,)), BucketConfig(("16x16",)), lpips_weights=networks[0])
        with pytest.raises(UsageError, match="at least 32 pixels a side"):
            evaluate_encoder(str(models / "plain"), held_out, FakeDecoders(), settings)


def test_spread() -> None:
    assert spread(3, 8) == {0, 1, 2}
    assert spread(100, 3) == {0, 50, 99} or spread(100, 3) == {0, 49, 99}
    assert len(spread(1000, 256)) == 256


@pytest.fixture(scope="module")
def report(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    first, second = write_numbered_shards(folder / "shards", 2, 2, broken={"bad|key": b"no video"})
    output = folder / "report"
    flags = ["--frames", "5", "--sizes", "32x32", "--decode-workers", "1", "--threads", "1"]
    encoders = ["--encoder", str(models / "kl"), str(models / "rvq")]
    line = [str(first), *encoders, "--output", str(output), "--baseline-shards", str(second), *flags]
    assert main(["evaluate", *line]) == 0
    return output


class TestCommand:
    def test_numbers_for_programs(self, report: Path) -> None:
        tree: dict[str, Any] = json.loads((report / "evaluation.json").read_text())
        assert [found["encoder"] for found in tree["evaluations"]] == ["kl-2x4x4x4", "rvq-2x4x4x4"]
        assert [Path(url).name for url in tree["held_out"]] == ["shard-000.tar"]
        assert [Path(url).name for url in tree["baseline"]] == ["shard-001.tar"]
        assert tree["settings"]["sampling"]["frames"] == [5]
        for found in tree["evaluations"]:
            assert [clip["key"] for clip in found["clips"]] == ["00_000", "00_001"]
            assert [(clip["key"], clip["window"]) for clip in found["failed"]] == [("bad|key", None)]
            assert found["codecs"][1]["scores"]["psnr"] > found["codecs"][0]["scores"]["psnr"]  # PCA, random weights

    def test_tables_for_people(self, report: Path) -> None:
        text = (report / "evaluation.md").read_text()
        tree = json.loads((report / "evaluation.json").read_text())
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        by_name = {row[0].strip("| *"): row for row in rows if row[0].startswith("| **")}
        for found in tree["evaluations"]:
            row = by_name[f"{found['encoder']}** {found['fingerprint'][:12]}"]
            assert row[4] == f"{found['codecs'][0]['scores']['psnr']:.2f}"
        assert "clips judged 2, failed 1, samples filtered 0" in text
        assert "shard-000.tar:bad\\|key" in text
        assert "LPIPS" not in text
        assert "rFVD" not in text
        tables = [block for block in text.split("\n\n") if block.startswith("|")]
        for table in tables:
            widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
            assert len(widths) == 1, table

    def test_a_sheet(self, report: Path) -> None:
        with Image.open(report / "contact_sheet.png") as sheet:
            assert sheet.mode == "RGB"
            assert sheet.height > 2 * 7 * 192

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("--encoder {models}/kl --output {new}", "evaluate needs SHARDS"),
            ("x.tar --output {new}", "at least one --encoder"),
            ("x.tar --encoder {models}/kl --output {models}", "exists already"),
            ("x.tar --encoder {models}/kl nowhere --output {new}", "nowhere"),
            ("x.tar --encoder {models}/kl --frames 4 --output {new}", "--frames 4: for kl-2x4x4x4"),
            ("x.tar --encoder {models}/kl --baseline-clips 0 --output {new}", "--baseline-clips must be positive"),
        ],
    )
    def test_refusals(
        self, line: str, told: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["evaluate", *line.format(models=models, new=tmp_path / "new").split()]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
