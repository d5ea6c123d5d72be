"""sample, interpolate, train prior through the command line, with tiny models and a small store."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.__main__ import main
from jobs.generate_pictures import write_clips
from models.bottlenecks.config import Fsq, Kl, NoBottleneck
from models.build import build_model
from models.checkpoint import save_checkpoint
from models.config import ModelConfig
from models.generative.codes import latent_to_grids
from models.generative.prior_checkpoint import load_prior
from models.generative.prior_training import train_prior
from models.native import describe_native, load_native
from models.spec import Normaliser
from pipeline.errors import UsageError
from pipeline.filmstrip import LABEL_PIXELS, TITLE_PIXELS, draw_strip
from pipeline.reader import LatentDataset
from tests.backbones import NARROW
from tests.clips import numbered_video
from tests.fakes import sample_members, write_tar

FSQ = Fsq(levels=(3, 3, 3, 3))
PRIOR = ["--steps", "3", "--width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--batch-size", "4"]
CLIPS = ["--frames", "5", "--size", "32", "--num", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: `fsq`, `other` (an fsq of other weights), `kl`, `plain`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, bottleneck) in enumerate({"fsq": FSQ, "other": FSQ, "kl": Kl(), "plain": NoBottleneck()}.items()):
        torch.manual_seed(seed)
        model = build_model(ModelConfig(NARROW, bottleneck, "vae" if name == "kl" else name))
        save_checkpoint(folder / name, model, Normaliser((0.9, 0.2, -0.9, 0.4), (0.5, 0.6, 0.7, 0.8)))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long` has four clips of 9 frames, `other` two, `brief` one of 5, and `short` is too short for either."""
    videos = {"long": 40, "other": 20, "brief": 6, "short": 3}
    members = [
        member for key, count in videos.items() for member in sample_members(key, numbered_video(num_frames=count))
    ]
    return write_tar(tmp_path_factory.mktemp("shards") / "a.tar", members)


def encoded(shards: Path, model: Path, store: Path, *more: str) -> str:
    recipe = [
        "--frames",
        "9",
        "--sizes",
        "32x32",
        "--windows",
        "slide",
        "--stride",
        "9",
        "--unit-rows",
        "4",
        "--batch-size",
        "2",
    ]
    place = ["--store", str(store), "--encoder", str(model), "--local", "--decode-workers", "1"]
    assert main(["encode", str(shards), *place, *recipe, "--max-failed-share", "1", *more]) == 0
    return str(store)


@pytest.fixture(scope="module")
def discrete_store(shards: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoded(shards, models / "fsq", tmp_path_factory.mktemp("stores") / "fsq")


@pytest.fixture(scope="module")
def continuous_store(shards: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoded(
        shards, models / "kl", tmp_path_factory.mktemp("stores") / "kl", "--frames", "9", "5", "--short", "smaller"
    )


@pytest.fixture(scope="module")
def prior(discrete_store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("priors") / "prior"
    assert main(["train", "prior", "--store", discrete_store, "--output", str(directory), *PRIOR]) == 0
    return directory


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def sample(model: Path, output: Path, *more: str) -> int:
    return main(["sample", "--encoder", str(model), "--output", str(output), *CLIPS, *more])


class TestSample:
    @pytest.mark.parametrize(("model", "prior"), [("kl", "gaussian"), ("plain", "aggregate"), ("fsq", "uniform")])
    def test_by_default_from_the_models_own_prior(
        self, model: str, prior: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(models / model, tmp_path / "out") == 0
        assert f"prior {prior}, temperature 1, seed 0 -> " in capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["samples.mp4", "samples.png"]
        frames = frames_of(tmp_path / "out/samples.mp4")
        assert [frame.shape for frame in frames] == [(32, 3 * 32, 3)] * 5
        strip = np.asarray(Image.open(tmp_path / "out/samples.png"))
        assert strip.shape == (TITLE_PIXELS + 3 * 196, LABEL_PIXELS + 5 * 196, 3)

    def test_samples_differ_from_one_another_and_by_seed_and_repeat(self, models: Path, tmp_path: Path) -> None:
        for name, seed in (("first", "0"), ("again", "0"), ("second", "1")):
            assert sample(models / "kl", tmp_path / name, "--seed", seed) == 0
        first, again, second = ((tmp_path / name / "samples.png").read_bytes() for name in ("first", "again", "second"))
        assert first == again != second
        strip = np.asarray(Image.open(tmp_path / "first/samples.png"))
        rows = [strip[TITLE_PIXELS + row * 196 :][:192, LABEL_PIXELS : LABEL_PIXELS + 192] for row in range(3)]
        assert not np.array_equal(rows[0], rows[1])
        assert not np.array_equal(rows[1], rows[2])

    def test_the_pictures_are_the_decoded_latents(self, models: Path, tmp_path: Path) -> None:
        from models.generative.sampling import sample_latents

        assert sample(models / "kl", tmp_path, "--seed", "4", "--prior", "aggregate", "--temperature", "0.5") == 0
        card, backend = load_native(models / "kl")
        generator = torch.Generator().manual_seed(4)
        latents = sample_latents(
            backend.model, card.normaliser, "aggregate", 3, (5, 32, 32), temperature=0.5, generator=generator
        )
        pixels = backend.model.decode(latents)[1, :, 2].permute(1, 2, 0)
        wanted = ((pixels + 1) * 127.5).round().clamp(0, 255).numpy()
        corner = TITLE_PIXELS + 196, LABEL_PIXELS + 2 * 196
        shown = np.asarray(Image.open(tmp_path / "samples.png"))[corner[0] :, corner[1] :][:192:6, :192:6]
        assert np.abs(shown - wanted).max() <= 1

    def test_from_a_learned_prior(
        self, models: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("first", "again"):
            assert sample(models / "fsq", tmp_path / name, "--prior", str(prior), "--top-k", "5") == 0
        assert f"prior {prior}, temperature 1, top 5, seed 0 -> " in capsys.readouterr().out
        assert (tmp_path / "first/samples.png").read_bytes() == (tmp_path / "again/samples.png").read_bytes()

    @pytest.mark.parametrize(
        ("model", "flags", "told"),
        [
            ("fsq", "--prior gaussian", "has no prior 'gaussian': use uniform"),
            ("plain", "--prior gaussian", "use aggregate"),
            ("kl", "--prior uniform", "use gaussian or aggregate"),
            ("kl", "--prior gausian", "--prior gausian: neither one of gaussian, aggregate, uniform nor the directory"),
            ("kl", "--frames 4", "4 frames are not 1+2k: use 3 or 5"),
            ("kl", "--size 33", "height 33 is not a multiple of 4"),
            ("kl", "--top-k 3", "top_k chooses among the codes of a learned prior"),
            ("fsq", "--temperature 0.5", "uniform codes have no temperature"),
            ("kl", "--num 0", "--num must be positive"),
            ("kl", "--temperature -1", "--temperature must be positive"),
            ("kl", "--fps 0", "--fps must be positive"),
            ("nobody", "", "no such directory"),
        ],
    )
    def test_what_cannot_be(
        self, model: str, flags: str, told: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(models / model, tmp_path, *flags.split()) == 2
        assert told in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_pretrained_encoder_has_no_prior_that_we_know(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
        assert sample(tmp_path, tmp_path / "out") == 2
        assert "is not a model that `latentmill train` made" in capsys.readouterr().err

    def test_a_prior_of_another_model_is_refused_by_name(
        self, models: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(models / "other", tmp_path, "--prior", str(prior)) == 2
        own, other = (describe_native(models / name).fingerprint[:12] for name in ("fsq", "other"))
        assert f"is a prior over the codes of the autoencoder {own}, not of {other}" in capsys.readouterr().err

    def test_a_clip_larger_than_the_priors(
        self, models: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(models / "fsq", tmp_path, "--prior", str(prior), "--size", "64") == 2
        assert "3x16x16 does not fit into 5x8x8, this prior's largest" in capsys.readouterr().err


class TestTrainPrior:
    def test_tells_how_well_it_knows_the_codes(
        self, discrete_store: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = [*PRIOR, "--steps", "60", "--learning-rate", "0.01"]
        assert main(["train", "prior", "--store", discrete_store, "--output", str(tmp_path / "p"), *flags]) == 0
        out = capsys.readouterr().out
        found = re.search(r"bits per code: ([\d.]+) in the last steps, none held out .* \(uniform: 6.340\)", out)
        assert found, out
        assert float(found[1]) < 5.5
        assert "for 60 steps" in out
        prior = load_prior(tmp_path / "p", describe_native(models / "fsq").fingerprint)
        assert prior.config.codebook_sizes == ((81,),)
        assert prior.config.max_extents == ((5, 8, 8),)

    def test_clips_are_held_out_where_there_are_eight(
        self, shards: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = encoded(shards, models / "fsq", tmp_path / "store", "--stride", "3")
        assert main(["train", "prior", "--store", store, "--output", str(tmp_path / "p"), *PRIOR]) == 0
        clips = len(LatentDataset(store))
        assert clips >= 8
        assert f"on {clips // 8} clips held out" in capsys.readouterr().out

    def test_every_clip_is_learned_from_or_held_out(self, shards: Path, models: Path, tmp_path: Path) -> None:
        """Each epoch the codes of the same clips, in another order; then those that are left, and none twice."""
        from jobs.train.prior import CodeBatches

        dataset = LatentDataset(encoded(shards, models / "fsq", tmp_path / "store", "--stride", "3"), normalise=False)
        _, backend = load_native(models / "fsq")
        wanted = [latent_to_grids(backend.model, dataset[item]["latent"][None])[0] for item in range(len(dataset))]
        batches = CodeBatches(dataset, backend.model, 4, seed=0)
        held_out = [ids for (grid,) in batches.held_out() for ids in grid]
        assert len(held_out) == batches.num_held_out == len(dataset) // 8 > 0
        stream, num_batches = batches.to_learn(), -(-(len(dataset) - len(held_out)) // 4)
        epochs = [[ids for _ in range(num_batches) for ids in next(stream)[0]] for _ in range(2)]
        for epoch in epochs:
            assert _as_set([*epoch, *held_out]) == _as_set([ids for grid in wanted for ids in grid])
        assert not torch.equal(torch.stack(epochs[0]), torch.stack(epochs[1]))

    def test_is_what_the_functions_make(self, discrete_store: str, models: Path, prior: Path) -> None:
        """Of the store's unnormalised latents, by the seed, step for step."""
        from jobs.train.prior import CodeBatches

        card, backend = load_native(models / "fsq")
        batches = CodeBatches(LatentDataset(discrete_store, normalise=False), backend.model, 4, seed=0)
        loaded = load_prior(prior, card.fingerprint)
        direct = train_prior(loaded.config, batches.to_learn(), steps=3).prior
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in direct.state_dict().items())

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (["--heads", "3"], "heads divides width"),
            (["--steps", "0"], "--steps must be positive"),
            (["--learning-rate", "0"], "learning_rate must be positive"),
        ],
    )
    def test_what_cannot_be(
        self, flags: list[str], told: str, discrete_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["train", "prior", "--store", discrete_store, "--output", str(tmp_path / "p"), *PRIOR, *flags]) == 2
        assert told in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_stores_models_and_places_that_do_not_fit(
        self, discrete_store: str, continuous_store: str, models: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        place = ["--output", str(tmp_path / "p"), *PRIOR]
        assert main(["train", "prior", "--store", continuous_store, *place]) == 2
        assert "a vae with bottleneck kl has no codes" in capsys.readouterr().err
        assert main(["train", "prior", "--store", discrete_store, "--encoder", str(models / "other"), *place]) == 2
        assert "has fingerprint" in capsys.readouterr().err
        assert main(["train", "prior", "--store", str(tmp_path), *place]) == 2
        assert "is not a store yet" in capsys.readouterr().err
        (tmp_path / "p").mkdir()
        assert main(["train", "prior", "--store", discrete_store, *place]) == 2
        assert "exists already" in capsys.readouterr().err


def _as_set(clips: list[torch.Tensor]) -> list[bytes]:
    return sorted(ids.contiguous().numpy().tobytes() for ids in clips)


class TestInterpolate:
    @pytest.mark.parametrize(("path", "window"), [("line", 0), ("sphere", 1)])
    def test_the_ends_are_the_stored_clips(
        self,
        path: str,
        window: int,
        continuous_store: str,
        models: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        flags = [
            "--store",
            continuous_store,
            "--output",
            str(tmp_path),
            "--path",
            path,
            "--steps",
            "4",
            "--window",
            str(window),
        ]
        assert main(["interpolate", "long", "a.tar:other", *flags]) == 0
        (video,), (strip,) = tmp_path.glob("*.mp4"), tmp_path.glob("*.png")
        name = "long to a.tar:other" + (" window 1" if window else "")
        assert f"{name}: {path} in 4 steps, vae-2x4x4x4 -> {video}, {strip}" in capsys.readouterr().out
        assert [frame.shape for frame in frames_of(video)] == [(32, 4 * 32, 3)] * 9
        with av.open(video) as container:
            assert container.streams.video[0].average_rate == 25
        picture = np.asarray(Image.open(strip))
        assert picture.shape[:2] == (TITLE_PIXELS + 4 * 196, LABEL_PIXELS + 8 * 196)
        dataset = LatentDataset(continuous_store, bucket="9x32x32", normalise=False)
        clips = [dataset[item] for item in range(len(dataset))]
        _, backend = load_native(models / "kl")
        for row, key in ((0, "long"), (3, "other")):
            latent = [clip["latent"] for clip in clips if clip["key"] == key][window]
            pixels = backend.model.decode(latent[None])[0, :, 0].permute(1, 2, 0)
            wanted = ((pixels + 1) * 127.5).round().clamp(0, 255).numpy()
            shown = picture[TITLE_PIXELS + row * 196 :, LABEL_PIXELS:][:192:6, :192:6]
            assert np.abs(shown - wanted).max() <= 1

    def test_a_line_passes_the_middle_and_a_sphere_keeps_the_length(self, continuous_store: str) -> None:
        from jobs.generate import _between
        from jobs.generate_config import Interpolate
        from pipeline.storage import open_storage
        from pipeline.store import open_header

        header = open_header(open_storage(continuous_store))
        normaliser = header.recipe.encoder.normaliser
        mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (normaliser.mean, normaliser.std))
        ends = [
            mean + std * torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
        ]
        for path, length in (("line", 0.5**0.5), ("sphere", 1.0)):
            command = Interpolate(store="", keys=("a", "b"), steps=3, path=path)
            latents, labels = _between(command, ends, header)
            assert labels == ["a", "50%", "b"]
            torch.testing.assert_close(latents[[0, 2]], torch.cat(ends))
            assert ((latents[1] - mean) / std).square().mean().sqrt().item() == pytest.approx(length, abs=0.05)

    @pytest.mark.parametrize(
        ("keys", "flags", "told"),
        [
            (["long"], [], "needs two KEYs"),
            (["long", "other", "brief"], [], "needs two KEYs"),
            (["long", "nobody"], [], "the store has no latent of 'nobody', window 0: no planned shard"),
            (["long", "short"], [], "it was filtered: short_video"),
            (["long", "brief"], [], "long is in bucket 9x32x32, brief in 5x32x32: only clips of one size"),
            (["long", "other"], ["--window", "3"], "it has 2 clips, --window counts them from 0"),
            (["long", "other"], ["--steps", "1"], "at least 2, got 1"),
        ],
    )
    def test_what_cannot_be(
        self, keys: list[str], flags: list[str], told: str, continuous_store: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        place = ["--store", continuous_store, "--output", str(tmp_path)]
        assert main(["interpolate", *keys, *place, *flags]) == 2
        assert told in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_another_encoder_is_refused(
        self, continuous_store: str, models: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--store", continuous_store, "--encoder", str(models / "plain")]
        assert main(["interpolate", "long", "other", *flags]) == 2
        assert "the store was made with" in capsys.readouterr().err


class TestPictures:
    def clip(self, level: int, frames: int = 3, height: int = 31, width: int = 45) -> np.ndarray:
        return np.full((frames, height, width, 3), level, np.uint8)

    def test_every_clip_has_its_row_and_its_place_in_the_video(self, tmp_path: Path) -> None:
        clips = [(f"clip {level}", self.clip(level)) for level in range(10, 110, 10)]
        video, _ = write_clips(tmp_path / "out" / "all", clips, 8.0, "a title", "a line")
        frames = frames_of(video)
        assert [frame.shape for frame in frames] == [(62, 360, 3)] * 3
        middles = [frames[0][number // 8 * 31 + 15, number % 8 * 45 + 22].mean() for number in range(10)]
        np.testing.assert_allclose(middles, range(10, 110, 10), atol=4)
        assert frames[0][31 + 15, 3 * 45 :].max() < 8
        strip = np.asarray(draw_strip(clips, "a title", "a line"))
        height = 31 * 4 + 4
        assert [strip[TITLE_PIXELS + row * height + 60, LABEL_PIXELS + 60, 0] for row in range(10)] == list(
            range(10, 110, 10)
        )

    def test_a_still_is_shown_for_a_second(self, tmp_path: Path) -> None:
        video, _ = write_clips(tmp_path / "one", [("still", self.clip(90, frames=1))], 25.0, "", "")
        with av.open(video) as container:
            assert container.streams.video[0].average_rate == 1
            assert container.streams.video[0].frames == 1

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="cannot be written"):
            write_clips(tmp_path / "file" / "clips", [("still", self.clip(9))], 8.0, "", "")
