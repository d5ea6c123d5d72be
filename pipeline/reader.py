"""Read a finished store for training: latents, normalised, with their captions.

In:   a store whose job has ended (`samples/` is there).
Out:  LatentDataset, map-style; BucketBatches, a batch sampler whose batches are of one shape.
Cost: the table of samples in memory; one chunk read per item (about 400 items/s and core).
Errors: UsageError when the store is not finished or has no such bucket; StoreError for a row that is damaged or not
        there.

Nothing is opened before the first item, and each process opens its own, so that it works in DataLoader workers however
they are started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import zarr

from pipeline import parquet
from pipeline.buckets import Bucket
from pipeline.errors import StoreError, UsageError
from pipeline.storage import Storage, open_storage
from pipeline.store import Header, open_array, open_header, to_float32

_COLUMNS = ["bucket", "row", "key", "caption", "metadata", "num_frames", "valid_frames"]


class LatentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The written clips of a store, in row order of their buckets.

    Each item is a dict: latent (float32, C t h w; normalised unless `normalise` is False), logvar (likewise, only in a
    store of moments, never normalised), key, caption, metadata (JSON text), bucket, row, num_frames, valid_frames.

    Args:
        store: the store, a directory or a url.
        bucket: only this bucket, as in "17x256x256"; None for all.
        normalise: apply the encoder's normaliser, (latent - mean) / std per channel.
    """

    def __init__(self, store: str, bucket: str | None = None, normalise: bool = True) -> None:
        self._url = store
        self.normalise = normalise
        storage = open_storage(store)
        self.header = open_header(storage)
        self._table = _read_samples(storage, self.header)
        if bucket is not None:
            if bucket not in self.buckets():
                raise UsageError(f"{store} has no clips in bucket {bucket!r}; it has {', '.join(self.buckets())}")
            self._table = self._table.filter(pc.equal(self._table["bucket"], bucket))
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._owner_pid = os.getpid()

    def buckets(self) -> list[str]:
        """The buckets that have clips here."""
        return sorted(self._table["bucket"].unique().to_pylist())

    def items_of(self, bucket: str) -> np.ndarray:
        """The numbers of the items of one bucket."""
        return np.flatnonzero(pc.equal(self._table["bucket"], bucket).to_numpy())

    def __len__(self) -> int:
        num_rows: int = self._table.num_rows
        return num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}, "_owner_pid": 0}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        item: dict[str, Any] = self._table.slice(index % len(self), 1).to_pylist()[0]
        values = self._read(item)
        recipe = self.header.recipe
        latent = values[: recipe.encoder.geometry.channels]
        if self.normalise:
            normaliser = recipe.encoder.normaliser
            mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (normaliser.mean, normaliser.std))
            latent = (latent - mean) / std
        moments = {"logvar": values[len(latent) :]} if recipe.encode.posterior == "moments" else {}
        return {"latent": latent, **moments, **item}

    def _read(self, item: dict[str, Any]) -> torch.Tensor:
        """A stored row as float32."""
        place = f"{self._url}: row {item['row']} of {item['bucket']} ({item['key']})"
        try:
            stored = np.asarray(self._array(item["bucket"])[item["row"]])
        except (ValueError, RuntimeError, IndexError) as error:
            raise StoreError(f"{place} is damaged: {error}") from error
        values = torch.from_numpy(to_float32(stored, self.header.recipe.encode.dtype))
        if torch.isnan(values).any():
            raise StoreError(f"{place} holds no latent")
        return values

    def _array(self, bucket: str) -> zarr.Array[Any]:
        if self._owner_pid != os.getpid():  # Handles do not cross a fork.
            self._arrays, self._owner_pid = {}, os.getpid()
        if bucket not in self._arrays:
            self._arrays[bucket] = open_array(open_storage(self._url), Bucket.parse(bucket))
        return self._arrays[bucket]


def _read_samples(storage: Storage, header: Header) -> pa.Table:
    """The table of written clips.

    Raises:
        UsageError: the store is not finished, or holds no clip.
    """
    names = storage.list("samples/")
    parts = [parquet.from_bytes(storage.read(name), _COLUMNS)[1] for name in names]
    num_rows = sum(part.num_rows for part in parts)
    if not parts or header.statistics.get("rows") != num_rows:
        raise UsageError(f"{storage.url} is not finished: run `latentmill encode --store {storage.url}` to its end")
    if not num_rows:
        raise UsageError(f"{storage.url} holds no latents: `latentmill status` says why")
    return pa.concat_tables(parts)


class BucketBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of item numbers, each of one bucket, shuffled by (seed, epoch); the last of a bucket may be short.

    Pass it to a DataLoader as `batch_sampler`. `epoch` is yours to advance.
    """

    def __init__(self, dataset: LatentDataset, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self._items = [dataset.items_of(bucket) for bucket in dataset.buckets()]

    def __len__(self) -> int:
        return sum(-(-len(items) // self.batch_size) for items in self._items)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for items in self._items:
            shuffled = order.permutation(items)
            batches += [shuffled[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        for number in order.permutation(len(batches)):
            yield batches[number].tolist()
