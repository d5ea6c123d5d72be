"""encode --local, status, verify, reconstruct through the command line with a tiny real encoder, on disk and on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import inspect_store
from jobs.__main__ import main
from jobs.prepare import open_encoder
from models.autoencoder import CausalAutoencoder
from models.checkpoint import save_checkpoint
from models.config import ModelConfig, preset
from models.spec import Normaliser, VideoEncoder
from pipeline.plan import Plan, load_plan
from pipeline.storage import Storage, open_storage
from pipeline.store import open_array, open_header, read_unit
from tests.clips import numbered_video
from tests.fakes import sample_members, write_tar
from tests.object_server import object_server

RECIPE = ["--frames", "9", "--sizes", "32x32", "--windows", "uniform", "--num-windows=2", "--unit-rows=4"]
RECIPE += ["--batch-size=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tars: `same` is a key of both, `short` has too few frames, `late` breaks while it is decoded."""
    folder = tmp_path_factory.mktemp("shards")
    whole = numbered_video(num_frames=14)
    broken = bytearray(numbered_video(num_frames=30))
    media, table = broken.index(b"mdat"), broken.index(b"moov")
    late = media + (table - media) * 2 // 3
    broken[late : table - 8] = b"\xff" * (table - 8 - late)
    first = [
        *sample_members("same", whole),
        *sample_members("own", whole),
        *sample_members("short", numbered_video(num_frames=5)),
        *sample_members("no_video", b"nothing"),
    ]
    second = [*sample_members("same", numbered_video(num_frames=20)), *sample_members("late", bytes(broken))]
    return [write_tar(folder / "a.tar", first), write_tar(folder / "b.tar", second)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("encoders") / "tiny"
    save_checkpoint(
        directory, CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"))), Normaliser((0.0,) * 16, (1.0,) * 16)
    )
    return directory


@pytest.fixture(scope="module")
def store(shards: list[Path], encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stores") / "local")
    place = ["--store", url, "--encoder", str(encoder), "--local", "--decode-workers", "2", "--max-failed-share", "1"]
    assert main(["encode", *map(str, shards), *place, *RECIPE]) == 0
    return url


def opened(url: str) -> tuple[Storage, Plan]:
    storage = open_storage(url)
    return storage, load_plan(storage, open_header(storage).recipe)


def test_status_tells_the_books(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--store", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"store: {store}" in lines
    assert any(line.startswith("bucket 9x32x32: 8 clips, latent (16, 3, 4, 4)") for line in lines)
    assert any(line.startswith("in 10 = ") and " + 1 filtered + " in line for line in lines)
    assert "  filtered short_video: 1" in lines
    assert "  failed not_media: 1" in lines
    assert any(line.startswith("  late: ") for line in lines)
    assert any(line.startswith("  no_video: not_media") for line in lines)
    assert "units: 2 of 2 done" in lines


def test_a_finished_job_says_so_without_flags(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The store's recipe is the default of every flag: no encoder and no recipe need be named again."""
    before = {name: open_storage(store).read(name) for name in open_storage(store).list("")}
    assert main(["encode", "--store", store, "--local", "--max-failed-share", "1"]) == 0
    assert "units: 2 of 2 done" in capsys.readouterr().out
    assert {name: open_storage(store).read(name) for name in open_storage(store).list("")} == before


class TestVerify:
    def test_a_sound_store(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--store", store, "--share", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "verify: the store is sound"
        assert any(line.startswith("reconstruction 9x32x32: ") for line in lines)
        assert sum(line.startswith("  worst: ") for line in lines) == 5

    def test_a_clip_that_reconstructs_too_badly(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--store", store, "--min-psnr", "99"]) == 1
        assert "dB is below --min-psnr 99" in capsys.readouterr().out

    def test_flipped_bits(self, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        damaged = copied(store, tmp_path)
        shard = tmp_path / "latents.zarr/9x32x32/c.0.0.0.0.0"
        data = bytearray(shard.read_bytes())
        data[100] ^= 1
        shard.write_bytes(data)
        assert main(["verify", "--store", damaged, "--share", "0"]) == 1
        assert "problem: " in capsys.readouterr().out

    def test_an_incomplete_store(self, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        incomplete = copied(store, tmp_path)
        (tmp_path / "ledger/9x32x32/000001.parquet").unlink()
        assert main(["verify", "--store", incomplete, "--share", "0"]) == 1
        out = capsys.readouterr().out
        assert "problem: 1 units are not encoded yet: run `latentmill encode`" in out
        assert " left" in out

    def test_another_encoder_is_refused(self, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(1)
        other = tmp_path / "other"
        save_checkpoint(
            other, CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"))), Normaliser((0.0,) * 16, (1.0,) * 16)
        )
        assert main(["verify", "--store", store, "--encoder", str(other)]) == 2
        assert "has fingerprint" in capsys.readouterr().err

    def test_no_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command in ("verify", "status"):
            assert main([command, "--store", str(tmp_path)]) == 2
            assert "is not a store yet" in capsys.readouterr().err


class TestDevice:
    """Where the commands that decode a store's latents run its encoder."""

    COMMANDS = ("verify", "reconstruct own", "interpolate own b.tar:same")

    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize(
        ("flag", "has_gpu", "device"),
        [("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu")],
    )
    def test_is_what_encode_would_take(
        self,
        store: str,
        command: str,
        flag: str,
        has_gpu: bool,
        device: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        opened: list[str] = []

        def open_here(source: str, device: str, compute_dtype: str) -> VideoEncoder:
            opened.append(device)
            return open_encoder(source, "cpu", compute_dtype)

        monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
        monkeypatch.setattr(inspect_store, "open_encoder", open_here)
        flags = [] if flag == "auto" else ["--device", flag]
        assert main([*command.split(), "--store", store, *flags]) == 0
        assert opened == [device]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_cuda_where_there_is_none(
        self, store: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert main([*command.split(), "--store", store, "--device", "cuda"]) == 2
        assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err


class TestReconstruct:
    def test_several_keys(self, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = ["--output", str(tmp_path / "out")]
        assert main(["reconstruct", "own", "b.tar:same", "--store", store, *output]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in lines] == ["own", "b.tar:same"]
        assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".mp4", ".mp4", ".png", ".png"]
        assert (tmp_path / "out/own.png").stat().st_size > 1000

    def test_another_window_is_another_file(self, store: str, tmp_path: Path) -> None:
        for window in ("0", "1"):
            assert main(["reconstruct", "own", "--store", store, "--output", str(tmp_path), "--window", window]) == 0
        assert len(list(tmp_path.glob("*.mp4"))) == 2

    @pytest.mark.parametrize(
        ("key", "window", "told"),
        [
            ("same", 0, "'same' is the key of 2 samples, name one as SHARD:KEY: "),
            ("nobody", 0, "no planned shard has a sample with this key"),
            ("short", 0, "it was filtered: short_video"),
            ("no_video", 0, "it was failed: not_media"),
            ("own", 2, "it has 2 clips, --window counts them from 0"),
            ("own", -1, "it has 2 clips"),
        ],
    )
    def test_what_became_of_a_key(
        self, store: str, key: str, window: int, told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["reconstruct", key, "--store", store, f"--window={window}"]) == 2
        assert told in capsys.readouterr().err

    def test_of_a_clip_that_failed(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reconstruct", "late", "--store", store, "--window", "1"]) == 2
        assert "window 1: it failed: " in capsys.readouterr().err

    def test_of_a_clip_that_is_not_encoded_yet(
        self, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        incomplete = copied(store, tmp_path)
        (tmp_path / "ledger/9x32x32/000000.parquet").unlink()
        assert main(["reconstruct", "own", "--store", incomplete]) == 2
        assert "its unit 9x32x32/000000 is not encoded yet" in capsys.readouterr().err

    def test_without_a_key(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reconstruct", "--store", store]) == 2
        assert f"needs KEYs: column `key` of {store}/samples/*.parquet" in capsys.readouterr().err

    def test_keys_are_where_the_message_says(self, store: str) -> None:
        for pattern in ("samples/*.parquet", "ledger/*/*.parquet"):
            tables = [pq.read_table(path, columns=["key"]) for path in Path(store).glob(pattern)]
            assert "own" in {key for table in tables for key in table["key"].to_pylist()}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_server() as address:
        yield address


def test_everything_on_s3_equals_everything_on_disk(
    store: str, shards: list[Path], encoder: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shards:
        open_storage("s3://videos/in").put(path.name, path.read_bytes())
    remote = "s3://latents/runs/first"
    assert main(["index", "s3://videos/in/{a,b}.tar", "--store", remote, "--local"]) == 0
    place = ["--store", remote, "--max-failed-share", "1"]
    assert main(["plan", *place, "--encoder", str(encoder), *RECIPE]) == 0
    assert main(["encode", *place, "--local"]) == 0
    assert main(["status", "--store", remote]) == 0
    assert "units: 2 of 2 done" in capsys.readouterr().out
    assert main(["verify", "--store", remote, "--share", "1"]) == 0

    (here, plan), (there, remote_plan) = opened(store), opened(remote)
    units = list(plan.units())
    assert list(remote_plan.units()) == units
    for unit in units:
        rows = read_unit(here, plan.recipe, unit)
        np.testing.assert_array_equal(rows, read_unit(there, remote_plan.recipe, unit))
    first = units[0].bucket
    np.testing.assert_array_equal(open_array(here, first)[:], open_array(there, first)[:])


def copied(store: str, folder: Path) -> str:
    """Another store with the same objects."""
    source, target = open_storage(store), open_storage(str(folder))
    for name in source.list(""):
        target.put(name, source.read(name))
    return str(folder)
