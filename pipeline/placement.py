"""From a shard's samples to its clips: which bucket, which windows; or why not. Pure.

In:   an IndexFragment and a Recipe.
Out:  per sample a Placement (bucket and windows) or an Unplaced (filtered or failed, with its reason).
Cost: some ten microseconds per sample; windows are counted, not listed; one shard in memory at a time.
Errors: UsageError for a filter expression that cannot be read.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator

from pipeline.buckets import Bucket, choose_size
from pipeline.decode.records import MediaInfo, Window
from pipeline.errors import SampleError
from pipeline.filters import Facts, reject_reason
from pipeline.index import IndexFragment
from pipeline.recipe import Recipe
from pipeline.samples import Sample
from pipeline.sampling import WindowPlan, grid, image_window, sample_windows


@dataclasses.dataclass(frozen=True)
class Placement:
    """A sample's clips: `windows.count` rows of one bucket, in window order."""

    sample: Sample
    media: MediaInfo
    bucket: Bucket
    windows: WindowPlan


@dataclasses.dataclass(frozen=True)
class Unplaced:
    """A sample (or a damaged stretch of its shard) that has no clip, and why."""

    sample: Sample
    status: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
    """One row to be: a window of a sample, at its bucket's size."""

    row: int
    shard_url: str
    sample: Sample
    media: MediaInfo
    bucket: Bucket
    window_index: int
    window: Window

    @property
    def decoded_bytes(self) -> int:
        """Size of the clip's uint8 frames, padding included."""
        return self.bucket.decoded_bytes


def place(sample: Sample, recipe: Recipe) -> Placement | Unplaced:
    """The sample's bucket and windows under the recipe, or the reason why it has none."""
    if sample.status != "ok" or sample.media is None:
        return Unplaced(sample, sample.status, sample.reason, sample.detail)
    media = sample.media
    facts = Facts(media, sample.key, caption(sample, recipe), sample.metadata)
    rejected = reject_reason(recipe.filters, facts)
    if rejected is not None:
        return Unplaced(sample, "filtered", rejected)
    windows = _windows(sample, media, recipe)
    if isinstance(windows, Unplaced):
        return windows
    try:
        height, width = choose_size(recipe.sizes, media.height, media.width)
    except SampleError as error:
        return Unplaced(sample, "failed", error.reason, error.detail)
    return Placement(sample, media, Bucket(windows.num_frames, height, width), windows)


def _windows(sample: Sample, media: MediaInfo, recipe: Recipe) -> WindowPlan | Unplaced:
    if media.kind == "image":
        if recipe.encoder.geometry.leading_frame:
            return image_window()
        return Unplaced(sample, "filtered", "image", f"{recipe.encoder.name} takes no single frames")
    length = grid(recipe.sampling).length(media.num_frames, media.duration_seconds)
    windows = sample_windows(recipe.sampling, length, sample.key)
    if windows.filtered is not None:
        return Unplaced(sample, "filtered", windows.filtered, f"{length} frames on the sampling grid")
    return windows


def caption(sample: Sample, recipe: Recipe) -> str:
    """The sample's caption: the recipe's json field where there is one, else what the index found."""
    field = json.loads(sample.metadata).get(recipe.caption_field) if recipe.caption_field else None
    if not isinstance(field, str):
        return sample.caption
    return field.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, a UTF-8 column may not.


@dataclasses.dataclass(frozen=True)
class PlacedShard:
    """All of a shard's samples, placed."""

    shard_url: str
    placements: tuple[Placement, ...]
    unplaced: tuple[Unplaced, ...]

    @classmethod
    def of(cls, fragment: IndexFragment, recipe: Recipe) -> PlacedShard:
        """Place every sample of a fragment, in tar order."""
        results = [place(sample, recipe) for sample in fragment.samples]
        return cls(
            fragment.shard.url,
            tuple(result for result in results if isinstance(result, Placement)),
            tuple(result for result in results if isinstance(result, Unplaced)),
        )

    def rows_per_bucket(self) -> dict[Bucket, int]:
        """How many clips go to each bucket, buckets in order."""
        counts: Counter[Bucket] = Counter()
        for placement in self.placements:
            counts[placement.bucket] += placement.windows.count
        return dict(sorted(counts.items()))

    def clips(self, bucket: Bucket, first_row: int, skip: int, count: int) -> Iterator[Clip]:
        """Clips [skip, skip + count) of this shard in one bucket; the shard's first one has row `first_row`."""
        position = 0
        for placement in self.placements:
            if placement.bucket != bucket:
                continue
            start, position = position, position + placement.windows.count
            for index in range(max(0, skip - start), min(placement.windows.count, skip + count - start)):
                window = placement.windows.window(index)
                row = first_row + start + index
                yield Clip(row, self.shard_url, placement.sample, placement.media, bucket, index, window)
