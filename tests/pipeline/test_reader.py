"""The reader gives what the store holds, in every process, and refuses what is not a finished store."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from pipeline.errors import StoreError, UsageError
from pipeline.plan import Plan
from pipeline.reader import BucketBatches, LatentDataset
from pipeline.recipe import EncodeConfig, Recipe
from pipeline.sampling import SamplingConfig
from pipeline.storage import LocalStorage
from pipeline.store import read_unit, shard_name, to_float32
from tests.fakes import FAKE_CARD, FakeDecoders, encode_store, fake_recipe, planned_store

# Python 3.12 warns of a fork in a process with threads, and zarr has one.
FORK = r"ignore:This process \(pid=\d+\) is multi-threaded, use of fork\(\):DeprecationWarning"
MEAN = torch.tensor(FAKE_CARD.normaliser.mean).view(-1, 1, 1, 1)
STD = torch.tensor(FAKE_CARD.normaliser.std).view(-1, 1, 1, 1)


def encode(**changes: object) -> Recipe:
    return fake_recipe(encode=EncodeConfig(batch_size=2, unit_rows=4, **changes))  # type: ignore[arg-type]


def two_buckets() -> Recipe:
    return fake_recipe(sampling=SamplingConfig((9, 17), short="smaller", windows="uniform", num_windows=2))


def made(directory: Path, recipe: Recipe | None = None) -> tuple[LocalStorage, Plan]:
    storage, plan = planned_store(directory, recipe=recipe)
    encode_store(storage, plan, FakeDecoders(bad=["e"]))
    return storage, plan


def stored_rows(storage: LocalStorage, plan: Plan) -> dict[tuple[str, int], np.ndarray]:
    rows = {}
    for unit in plan.units():
        for place, row in enumerate(read_unit(storage, plan.recipe, unit)):
            rows[unit.bucket.name, unit.number * 4 + place] = to_float32(row, plan.recipe.encode.dtype)
    return rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_items_are_the_rows_of_the_store(tmp_path: Path, dtype: str, posterior: str) -> None:
    storage, plan = made(tmp_path, encode(dtype=dtype, posterior=posterior))
    rows = stored_rows(storage, plan)
    plain, normalised = LatentDataset(storage.url, normalise=False), LatentDataset(storage.url)
    assert len(plain) == len(normalised) == 7
    for raw, item in zip(plain, normalised, strict=True):  # type: ignore[call-overload]
        row = torch.from_numpy(rows[raw["bucket"], raw["row"]])
        assert raw["latent"].shape == (4, 3, 4, 4)
        assert raw["latent"].dtype == item["latent"].dtype == torch.float32
        torch.testing.assert_close(raw["latent"], row[:4], rtol=0, atol=0)
        torch.testing.assert_close(item["latent"], (row[:4] - MEAN) / STD, rtol=0, atol=0)
        assert ("logvar" in item) == (posterior == "moments")
        if posterior == "moments":
            torch.testing.assert_close(item["logvar"], torch.full((4, 3, 4, 4), -2.0), rtol=0, atol=0)
        assert item["caption"] == f"a clip called {item['key']}"
        assert json.loads(item["metadata"]) == {}


def test_items_are_what_any_zarr_client_reads(tmp_path: Path) -> None:
    storage, _ = made(tmp_path)
    array = zarr.open_array(f"{storage.url}/latents.zarr/9x32x32", mode="r")
    for item in LatentDataset(storage.url, normalise=False):  # type: ignore[attr-defined]
        np.testing.assert_array_equal(item["latent"].numpy(), np.asarray(array[item["row"]]).astype(np.float32))


def test_padded_clips_say_how_many_frames_are_real(tmp_path: Path) -> None:
    storage, plan = planned_store(
        tmp_path, [{"a": 6, "b": 30}], fake_recipe(sampling=SamplingConfig((9,), short="pad"))
    )
    encode_store(storage, plan, FakeDecoders())
    items = {item["key"]: item for item in LatentDataset(storage.url)}  # type: ignore[attr-defined]
    assert {key: (item["num_frames"], item["valid_frames"]) for key, item in items.items()} == {
        "a": (9, 6),
        "b": (9, 9),
    }


def test_a_bucket_can_be_chosen(tmp_path: Path) -> None:
    storage, _ = made(tmp_path, two_buckets())
    both = LatentDataset(storage.url)
    assert both.buckets() == ["17x32x32", "9x32x32"]
    one = LatentDataset(storage.url, bucket="17x32x32")
    assert {item["bucket"] for item in one} == {"17x32x32"}  # type: ignore[attr-defined]
    assert 0 < len(one) < len(both)
    with pytest.raises(UsageError, match="no clips in bucket '17x64x64'; it has 17x32x32, 9x32x32"):
        LatentDataset(storage.url, bucket="17x64x64")


def test_indices_work_as_in_a_list(tmp_path: Path) -> None:
    dataset = LatentDataset(made(tmp_path)[0].url)
    assert dataset[-1]["row"] == dataset[len(dataset) - 1]["row"]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"item {index} of 7"):
            dataset[index]


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_read_the_same(tmp_path: Path, start: str) -> None:
    storage, _ = made(tmp_path, two_buckets())
    dataset = LatentDataset(storage.url)
    here = {(item["bucket"], item["row"]): item["latent"] for item in dataset}  # type: ignore[attr-defined]
    batches = BucketBatches(dataset, 3)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=2, multiprocessing_context=start, timeout=60)
    there = {}
    for batch in loader:
        for bucket, row, latent in zip(batch["bucket"], batch["row"].tolist(), batch["latent"], strict=True):
            there[bucket, row] = latent
    assert here.keys() == there.keys()
    assert all(torch.equal(here[place], there[place]) for place in here)


def test_datasets_can_be_pickled_after_use(tmp_path: Path) -> None:
    dataset = LatentDataset(made(tmp_path)[0].url)
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._arrays
    assert torch.equal(copy[0]["latent"], first["latent"])


def test_open_arrays_are_not_taken_across_a_fork(tmp_path: Path) -> None:
    dataset = LatentDataset(made(tmp_path)[0].url)
    here = dataset._array("9x32x32")
    assert dataset._array("9x32x32") is here
    dataset._owner_pid = -1
    assert dataset._array("9x32x32") is not here


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    storage, plan = made(tmp_path)
    dataset = LatentDataset(storage.url)
    storage.delete(shard_name(next(plan.units())))
    with pytest.raises(StoreError, match=r"row 0 of 9x32x32 \(a\) holds no latent"):
        dataset[0]


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    storage, plan = made(tmp_path)
    name = shard_name(next(plan.units()))
    data = bytearray(storage.read(name))
    data[3] ^= 1
    storage.put(name, bytes(data))
    with pytest.raises(StoreError, match=r"row 0 of 9x32x32 \(a\) is damaged"):
        LatentDataset(storage.url)[0]


def test_unfinished_stores_are_refused(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path)
    with pytest.raises(UsageError, match=r"is not finished: run `latentmill encode --store"):
        LatentDataset(storage.url)
    encode_store(storage, plan, FakeDecoders())
    part = storage.read("samples/part-000000.parquet")
    storage.put("samples/part-000001.parquet", part)  # as when compaction was broken off
    with pytest.raises(UsageError, match="is not finished"):
        LatentDataset(storage.url)
    for name in storage.list("samples/"):
        storage.delete(name)
    with pytest.raises(UsageError, match="is not finished"):
        LatentDataset(storage.url)
    with pytest.raises(UsageError, match="is not a store yet"):
        LatentDataset(str(tmp_path / "nowhere"))


def test_a_store_without_latents_says_so(tmp_path: Path) -> None:
    storage, plan = planned_store(tmp_path, [{"a": 30}])
    encode_store(storage, plan, FakeDecoders(bad=["a"]))
    with pytest.raises(UsageError, match="holds no latents"):
        LatentDataset(storage.url)


def test_batches_hold_every_item_once_and_one_bucket_each(tmp_path: Path) -> None:
    dataset = LatentDataset(made(tmp_path, two_buckets())[0].url)
    batches = BucketBatches(dataset, 3, seed=7)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    assert sorted(number for batch in drawn for number in batch) == list(range(len(dataset)))
    assert all(len({dataset[number]["bucket"] for number in batch}) == 1 for batch in drawn)
    assert all(1 <= len(batch) <= 3 for batch in drawn)


def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Many:
        """What BucketBatches asks of a dataset."""

        def buckets(self) -> list[str]:
            return ["a", "b"]

        def items_of(self, bucket: str) -> np.ndarray:
            return np.arange(100) + 100 * (bucket == "b")

    def draw(seed: int, epoch: int) -> list[list[int]]:
        batches = BucketBatches(Many(), 8, seed)  # type: ignore[arg-type]
        batches.epoch = epoch
        return list(batches)

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(1, 0) != draw(2, 0)
    assert sorted(number for batch in draw(1, 3) for number in batch) == list(range(200))
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        BucketBatches(Many(), 0)  # type: ignore[arg-type]
