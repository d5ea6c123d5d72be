"""The in-process engine with real decode processes, against an independent path."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipeline import ledger
from pipeline.account import close_books, take_account, units_left
from pipeline.controller import Controller, Policy
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.engine import UnitDone, UnitFailed, WorkerReady, run
from pipeline.errors import JobError, ShardError
from pipeline.index import read_fragment
from pipeline.local import LocalEngine
from pipeline.plan import Plan, load_plan
from pipeline.reader import LatentDataset
from pipeline.recipe import EncodeConfig
from pipeline.sampling import SamplingConfig
from pipeline.storage import LocalStorage
from pipeline.store import read_unit
from tests.clips import read_number
from tests.fakes import (
    FakeDecoders,
    FakeEncoder,
    fake_recipe,
    index,
    make_plan,
    planned_store,
    write_numbered_shards,
)

pytestmark = pytest.mark.timeout(60)


def drive(engine: LocalEngine, storage: LocalStorage, plan: Plan) -> Controller:
    controller = Controller(units_left(storage, plan), Policy(max_failed_share=0.5))
    try:
        run(
            controller,
            engine,
            num_workers=1,
            unit_timeout_seconds=60,
            stop=threading.Event(),
            on_tick=lambda _: None,
        )
    finally:
        engine.close()
    return controller


def frames_of(shard: Path) -> dict[str, np.ndarray]:
    """Every frame of every readable video of a tar, by key, decoded in one pass and scaled to 32 x 32."""
    videos = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".mp4") and "broken" not in member.name:
                data = tar.extractfile(member)
                assert data is not None
                with av.open(io.BytesIO(data.read())) as container:
                    shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
                videos[member.name.removesuffix(".mp4")] = np.stack(shown)
    return videos


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStorage, Plan, list[Path], Controller]:
    directory = tmp_path_factory.mktemp("local")
    paths = write_numbered_shards(directory / "shards", 2, 3, broken={"broken": b"no video"})
    storage = LocalStorage(directory / "store")
    shards = index(storage, paths)
    make_plan(storage, [read_fragment(storage, shard.shard_id) for shard in shards], fake_recipe())
    plan = load_plan(storage, fake_recipe())
    with ProcessPool(2, DecodeLimits()) as pool:
        controller = drive(LocalEngine(FakeEncoder(), pool, storage, plan, 1 << 20), storage, plan)
    close_books(storage, plan)
    return storage, plan, paths, controller


def test_everything_is_written_and_the_books_balance(
    encoded: tuple[LocalStorage, Plan, list[Path], Controller],
) -> None:
    storage, plan, _, controller = encoded
    account = take_account(storage, plan)
    assert account.is_complete
    assert account.written == plan.num_clips == controller.progress.written
    assert sum(account.failed.values()) == 1
    assert controller.progress.units == account.units
    assert list(units_left(storage, plan)) == []


def test_rows_equal_an_independent_path(encoded: tuple[LocalStorage, Plan, list[Path], Controller]) -> None:
    """Numbered pictures of 96 x 96 at 32 x 32 by area are 3 x 3 means; the encoder's blocks of 8 are 24 x 24 means."""
    storage, plan, paths, _ = encoded
    videos = {key: frames for path in paths for key, frames in frames_of(path).items()}
    rows = [row for unit in plan.units() for row in ledger.read_rows(storage, ledger.unit_name(unit))]
    items = list(LatentDataset(storage.url, normalise=False))  # type: ignore[call-overload]
    assert len(items) == len(rows) == plan.num_clips
    for row, item in zip(rows, items, strict=True):
        frames = videos[row["key"]][row["window_start"] : row["window_start"] + 9]
        assert [read_number(frame) for frame in frames] == list(range(row["window_start"], row["window_start"] + 9))
        latent = FakeEncoder().encode(torch.from_numpy(thirds(frames))[None]).mean[0].numpy()
        assert np.abs(item["latent"].numpy() - latent).max() < 0.02
        assert (item["key"], item["row"]) == (row["key"], row["row"])
        np.testing.assert_allclose(row["pts_seconds"], (row["window_start"] + np.arange(9)) / 25, atol=1e-6)
        assert row["caption"] == item["caption"] == f"a clip called {row['key']}"
        assert json.loads(item["metadata"]) == {"score": int(row["key"].split("_")[1])}


def thirds(frames: np.ndarray) -> np.ndarray:
    """Each 3 x 3 block's mean: T 96 96 3 to T 32 32 3."""
    blocks = frames.reshape(len(frames), 32, 3, 32, 3, 3).astype(np.float64)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def test_a_second_run_has_nothing_to_do(encoded: tuple[LocalStorage, Plan, list[Path], Controller]) -> None:
    storage, plan, _, _ = encoded
    decoders = FakeDecoders()
    controller = drive(LocalEngine(FakeEncoder(), decoders, storage, plan, 1 << 20), storage, plan)
    assert controller.progress.units == 0
    assert decoders.requests == []


def test_long_clips_in_pieces_end_beside_short_ones_with_one_decode_process(
    encoded: tuple[LocalStorage, Plan, list[Path], Controller], tmp_path: Path
) -> None:
    """Frames, times and failures are those of whole clips."""
    _, _, paths, _ = encoded
    sampling = SamplingConfig((17, 9), short="smaller", windows="uniform", num_windows=2)
    rows = []
    for stream_mb in (1000, 10 * 32 * 32 * 3 / 2**20):
        recipe = fake_recipe(
            sampling=sampling, encode=EncodeConfig(batch_size=1, unit_rows=2, dtype="float32", stream_mb=stream_mb)
        )
        storage = LocalStorage(tmp_path / f"{stream_mb:.0f}")
        shards = index(storage, paths)
        make_plan(storage, [read_fragment(storage, shard.shard_id) for shard in shards], recipe)
        plan = load_plan(storage, recipe)
        with ProcessPool(1, DecodeLimits()) as pool:
            drive(LocalEngine(FakeEncoder(), pool, storage, plan, 100_000), storage, plan)
        units = list(plan.units())
        assert {unit.bucket.num_frames for unit in units} == {9, 17}
        rows.append(
            [
                (read_unit(storage, recipe, unit).tobytes(), ledger.read_rows(storage, ledger.unit_name(unit)))
                for unit in units
            ]
        )
    assert rows[0] == rows[1]


def test_events_tell_what_became_of_units(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path)
    first, second, *_ = plan.units()
    engine = LocalEngine(FakeEncoder(), FakeDecoders(), storage, plan, 1 << 20)
    assert engine.start_worker() == "local"
    assert engine.wait(5) == [WorkerReady("local")]
    engine.submit("local", first)
    (done,) = engine.wait(5)
    assert isinstance(done, UnitDone)
    assert done.report.unit == first
    for shard in plan.shards:
        Path(shard).unlink()
    engine.submit("local", second)
    (failed,) = engine.wait(5)
    assert isinstance(failed, UnitFailed)
    assert isinstance(failed.error, ShardError)
    assert engine.wait(0.01) == []
    engine.close()


def test_what_ends_a_thread_ends_the_job(tmp_path: Path) -> None:
    class Broken(FakeEncoder):
        def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None):  # type: ignore[no-untyped-def]
            raise MemoryError("no GPU memory")

    storage, plan = planned_store(tmp_path)
    with pytest.raises(MemoryError, match="no GPU memory"):
        drive(LocalEngine(Broken(), FakeDecoders(), storage, plan, 1 << 20), storage, plan)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latentmill-")]


def test_a_hung_worker_ends_the_job_with_a_remedy(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path)
    engine = LocalEngine(FakeEncoder(), FakeDecoders(), storage, plan, 1 << 20)
    with pytest.raises(JobError, match="--unit-timeout-seconds"):
        engine.kill_worker("local")
    engine.close()
