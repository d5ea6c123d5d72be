"""The main job through the command line: any engine, any number of workers, any crash, the same store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from jobs.__main__ import main
from models.encoders import load_encoder
from pipeline.buckets import Bucket
from pipeline.decode.process import DecodeProcess
from pipeline.storage import open_storage
from pipeline.store import open_array
from tests.clips import numbered_video, read_number, real_data
from tests.fakes import sample_members, write_numbered_shards, write_tar

ROOT = Path(__file__).parents[2]
CUT = numbered_video(num_frames=60, container_options={"movflags": "faststart"})
BROKEN = {"zz_random": b"\x17" * 5000, "zz_cut": CUT[: len(CUT) * 2 // 3]}
RECIPE = ["--frames", "9", "--sizes", "96x96", "--windows", "uniform", "--num-windows", "12"]
UNITS = ["--batch-size", "2", "--unit-rows", "8"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = write_numbered_shards(tmp_path_factory.mktemp("shards"), num_shards=3, videos_per_shard=8, broken=BROKEN)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def reference(shards: list[str], vae_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that `--local` makes without a crash."""
    store = tmp_path_factory.mktemp("reference") / "store"
    assert main(encode_args(shards, store, vae_directory, "--local")) == 0
    return store


def encode_args(shards: list[str], store: Path, encoder: Path, *more: str) -> list[str]:
    engine = ["--decode-workers", "2", "--window-mb", "16"]
    return ["encode", *shards, "--store", str(store), "--encoder", str(encoder), *RECIPE, *UNITS, *engine, *more]


def contents(store: Path) -> dict[str, str]:
    """Every object of a store but the run logs, by name, as a hash."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.relative_to(store).parts[0] != "runs"
    }


def ledger_rows(store: Path) -> list[dict[str, object]]:
    return [row for path in sorted(store.glob("ledger/*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_sample_is_written_or_has_a_reason(reference: Path) -> None:
    rows = ledger_rows(reference)
    fates = {str(row["key"]): (row["status"], row["reason"]) for row in rows}
    assert len(fates) == 26
    assert fates["zz_random"] == ("failed", "not_media")
    assert {str(row["status"]) for row in rows if row["key"] == "zz_cut"} == {"written", "failed"}
    assert all(fate == ("written", "") for key, fate in fates.items() if not key.startswith("zz_"))
    written = [row for row in rows if row["status"] == "written"]
    assert len({(row["key"], row["window_index"]) for row in written}) == len(written)


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "placement"), [(1, "cluster"), (2, "cluster"), (2, "worker"), (4, "worker")])
def test_ray_makes_the_same_store_with_any_number_of_workers(
    ray_cluster: None,
    reference: Path,
    shards: list[str],
    vae_directory: Path,
    tmp_path: Path,
    workers: int,
    placement: str,
) -> None:
    engine = ["--workers", str(workers), "--decode-placement", placement]
    assert main(encode_args(shards, tmp_path / "store", vae_directory, *engine)) == 0
    assert contents(tmp_path / "store") == contents(reference)


class Driver:
    """The encode command in a process of its own, with its cluster."""

    def __init__(self, args: list[str], log: Path) -> None:
        self._log = log.open("ab")
        self.process = psutil.Popen(
            [sys.executable, "-m", "jobs", *args], cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT
        )

    def descendants(self, marker: str) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found += [process] if marker in " ".join(process.cmdline()) else []
        return found

    def kill_one(self, marker: str, chance: random.Random) -> bool:
        victims = self.descendants(marker)
        if victims:
            chance.choice(victims).send_signal(signal.SIGKILL)
        return bool(victims)

    def kill(self) -> None:
        """kill -9 of the driver; what it leaves behind is ended too, as a machine's end would."""
        orphans = self.process.children(recursive=True)
        self.process.kill()
        self.process.wait()
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        self._log.close()

    def wait(self, timeout_seconds: float) -> int:
        code: int = self.process.wait(timeout_seconds)
        self._log.close()
        return code


def committed(store: Path) -> int:
    return len(list(store.glob("ledger/9x*/*.parquet")))


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.ray
def test_kill_9_of_workers_decoders_and_driver_changes_nothing(
    reference: Path, shards: list[str], vae_directory: Path, tmp_path: Path
) -> None:
    chance, store, log = random.Random(11), tmp_path / "store", tmp_path / "log"
    units = committed(reference)
    args = encode_args(shards, store, vae_directory, "--workers", "2")
    first = Driver(args, log)
    assert wait_for(lambda: committed(store) >= 1), log.read_text()
    # A worker is titled so while it runs a unit, and may be between two of them.
    assert wait_for(lambda: first.kill_one("ray::encode", chance)), "no encode worker to kill"
    assert wait_for(lambda: first.kill_one("pipeline.decode.child", chance)), "no decode process to kill"
    assert wait_for(lambda: committed(store) >= units // 3), log.read_text()
    time.sleep(chance.random() * 0.1)
    assert committed(store) < units, "the job was over before the driver could be killed"
    first.kill()
    second = Driver([*args, "--decode-placement", "cluster"], log)
    assert wait_for(lambda: bool(second.descendants("ray::decode")) or second.process.poll() is not None)
    second.kill_one("ray::decode", chance)
    assert second.wait(120) == 0, log.read_text()
    assert contents(store) == contents(reference)


def test_kill_9_of_a_local_driver_at_any_moment(
    reference: Path, shards: list[str], vae_directory: Path, tmp_path: Path
) -> None:
    chance, store, log = random.Random(5), tmp_path / "store", tmp_path / "log"
    args = encode_args(shards, store, vae_directory, "--local")
    units = committed(reference)
    for target in (0, 1, units // 3):
        driver = Driver(args, log)
        assert wait_for(lambda: committed(store) >= target and (store / "runs").is_dir()), log.read_text()  # noqa: B023
        time.sleep(chance.random() * 0.05)
        driver.kill()
    assert 0 < committed(store) < units
    assert Driver(args, log).wait(60) == 0, log.read_text()
    assert contents(store) == contents(reference)


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        (["--local"], signal.SIGINT),
        (["--local"], signal.SIGTERM),
        pytest.param(["--workers", "1"], signal.SIGTERM, marks=pytest.mark.ray),
    ],
    ids=str,
)
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(
    reference: Path, shards: list[str], vae_directory: Path, tmp_path: Path, engine: list[str], number: signal.Signals
) -> None:
    """Of an indexed store, so that it is the encoding that starts Ray, which takes SIGTERM for itself."""
    store, log = tmp_path / "store", tmp_path / "log"
    assert main(["index", *shards, "--store", str(store), "--local"]) == 0
    driver = Driver(encode_args(shards, store, vae_directory, *engine), log)
    assert wait_for(lambda: committed(store) >= 1), log.read_text()
    os.kill(driver.process.pid, number)
    assert driver.wait(30) == 128 + number, log.read_text()
    assert "the same command goes on" in log.read_text()
    assert committed(store) < committed(reference)
    assert main(encode_args(shards, store, vae_directory, "--local")) == 0
    assert contents(store) == contents(reference)


def test_a_finished_job_is_left_alone(
    reference: Path, shards: list[str], vae_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_decoding(*_: object) -> None:
        raise AssertionError("a finished job must not decode")

    before = contents(reference)
    monkeypatch.setattr(DecodeProcess, "start", no_decoding)
    started = time.monotonic()
    assert main(encode_args(shards, reference, vae_directory, "--local")) == 0
    assert time.monotonic() - started < 10
    assert contents(reference) == before


def test_another_recipe_is_refused_by_field(
    reference: Path, shards: list[str], vae_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = encode_args(shards, reference, vae_directory, "--local", "--dtype", "float32")
    assert main(args) == 1
    assert 'encode.dtype: the store has "float16", this command asks for "float32"' in capsys.readouterr().err


def test_a_new_tar_takes_new_units_and_nothing_else_is_touched(
    shards: list[str], vae_directory: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert main(encode_args(shards[:2], store, vae_directory, "--local")) == 0
    before = {
        path: (path.stat().st_ino, path.read_bytes())
        for folder in ("ledger", "plan", "index")
        for path in (store / folder).rglob("*.parquet")
    } | {path: (path.stat().st_ino, path.read_bytes()) for path in store.glob("latents.zarr/*/c.*")}
    assert main(encode_args(shards, store, vae_directory, "--local")) == 0
    assert all((path.stat().st_ino, path.read_bytes()) == old for path, old in before.items())
    new = [
        row
        for path in store.glob("ledger/9x*/*.parquet")
        if path not in before
        for row in pq.read_table(path).to_pylist()
    ]
    assert {row["shard"] for row in new} == {shards[2]}
    assert main(["verify", "--store", str(store)]) == 0


def test_stored_rows_equal_the_encoder_on_independently_decoded_frames(
    reference: Path, shards: list[str], vae_directory: Path
) -> None:
    """Whole videos through PyAV alone; the encoder called clip by clip."""
    torch.set_num_threads(1)
    encoder = load_encoder(str(vae_directory))
    array = open_array(open_storage(str(reference)), Bucket(9, 96, 96))
    rows = [row for row in ledger_rows(reference) if row["status"] == "written" and row["key"] != "zz_cut"]
    for row in rows[::20]:
        with tarfile.open(str(row["shard"])) as tar, av.open(tar.extractfile(str(row["member"]))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        start = int(str(row["window_start"]))
        clip = np.stack(frames[start : start + 9])
        assert [read_number(frame) for frame in clip] == list(range(start, start + 9))
        expected = encoder.encode(torch.from_numpy(clip)[None]).mean[0].numpy()
        stored = np.asarray(array[int(str(row["row"]))], np.float32)
        # Batches of another size and swscale's other rounding: a few thousandths of the latents' spread.
        assert np.abs(stored - expected).max() < 0.02 * expected.std()


def test_the_store_opens_without_our_code(reference: Path, tmp_path: Path) -> None:
    script = tmp_path / "strangers.py"
    script.write_text(
        """
import hashlib, json, pathlib, sys
import numpy as np, pyarrow.dataset, tensorstore, zarr
store = pathlib.Path(sys.argv[1])
group = zarr.open_group(str(store / "latents.zarr"), mode="r")
facts = dict(group.attrs)["latentmill"]
table = pyarrow.dataset.dataset(store / "samples").to_table().to_pylist()
for row in table:
    other = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{store}/latents.zarr/{row['bucket']}/"}).result()
    mine, theirs = np.asarray(group[row["bucket"]][row["row"]]), other[row["row"]].read().result()
    assert mine.tobytes() == theirs.tobytes() and np.isfinite(mine).all()
    assert hashlib.blake2b(mine.tobytes(), digest_size=16).hexdigest() == row["checksum"]
print(json.dumps({"rows": len(table), "posterior": facts["posterior"], "formula": facts["normaliser"]["formula"]}))
assert not {"pipeline", "models", "jobs"} & set(sys.modules)
"""
    )
    done = subprocess.run(
        [sys.executable, "-I", script, reference], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["posterior"] == "mean"
    assert facts["rows"] == sum(row["status"] == "written" for row in ledger_rows(reference)) > 30


@pytest.fixture
def real_shards() -> list[str]:
    data = real_data()
    if data is None:
        pytest.skip("no real clips here: LATENTMILL_DATA names their folder")
    return [str(path) for path in sorted((data / "shards").glob("*.tar"))]


def test_real_clips(real_shards: list[str], vae_directory: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    recipe = ["--frames", "9", "--sizes", "64x64", "64x96", "96x64", "--short", "pad", "--unit-rows", "4"]
    args = ["encode", *real_shards, "--store", str(store), "--encoder", str(vae_directory), "--local", *recipe]
    assert main(args) == 0
    fates = {str(row["key"]): row for row in ledger_rows(store)}
    assert len(fates) == 13
    filtered = {key for key, row in fates.items() if row["status"] == "filtered"}
    assert filtered == {"000000_9999", "000001_9999"}
    assert all(fates[key]["reason"] == "no_video_or_image" for key in filtered)
    written = {key for key, row in fates.items() if row["status"] == "written"}
    assert {"000001_0007", "000000_0010", "000001_0001", "000000_0008"} <= written  # 10 bit, rotated, AV1, two streams
    turned = fates["000000_0010"]
    assert (turned["source_height"], turned["source_width"], turned["valid_frames"]) == (568, 320, 3)
    assert main(["verify", "--store", str(store), "--share", "1"]) == 0


def test_a_sample_of_several_kinds(vae_directory: Path, tmp_path: Path) -> None:
    """Long and short videos and an image in one tar, longer windows first, shorter ones where they must be."""
    from tests.clips import numbered_image

    members = [
        *sample_members("long", numbered_video(num_frames=40)),
        *sample_members("short", numbered_video(num_frames=6)),
        *sample_members("still", numbered_image(3), "png"),
    ]
    tar = write_tar(tmp_path / "mixed.tar", members)
    store = tmp_path / "store"
    recipe = ["--frames", "17", "5", "--short", "smaller", "--sizes", "32x32", "--unit-rows", "4"]
    args = ["encode", str(tar), "--store", str(store), "--encoder", str(vae_directory), "--local", *recipe]
    assert main(args) == 0
    buckets = {
        path.parent.name: {row["key"] for row in pq.read_table(path).to_pylist()} for path in store.glob("ledger/*x*/*")
    }
    assert buckets == {"17x32x32": {"long"}, "5x32x32": {"short"}, "1x32x32": {"still"}}
