"""What a plan will cost, in clips, frames and bytes. Pure.

In:   the placed shards, one at a time.
Out:  Price, and its table for people.
Cost: sums.
Errors: none.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from pipeline.buckets import Bucket
from pipeline.placement import PlacedShard, Placement
from pipeline.recipe import Recipe


@dataclasses.dataclass
class BucketPrice:
    """One bucket's share of the cost. `decoded_frames` counts what the decoder goes through, wanted or not."""

    clips: int = 0
    samples: int = 0
    wanted_frames: int = 0
    decoded_frames: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclasses.dataclass
class Price:
    """The cost of encoding some shards."""

    recipe: Recipe
    buckets: dict[Bucket, BucketPrice] = dataclasses.field(default_factory=dict)
    unplaced: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    shards: int = 0
    padded_clips: int = 0

    def add(self, placed: PlacedShard) -> None:
        """Add one shard."""
        self.shards += 1
        self.unplaced.update((unplaced.status, unplaced.reason) for unplaced in placed.unplaced)
        for placement in placed.placements:
            self._add_placement(placement)

    def _add_placement(self, placement: Placement) -> None:
        price = self.buckets.setdefault(placement.bucket, BucketPrice())
        windows, count = placement.windows, placement.windows.count
        last = windows.window(count - 1)
        price.clips += count
        price.samples += 1
        price.wanted_frames += count * windows.num_frames
        price.decoded_frames += self._native_frames(placement, last.start + last.num_frames)
        price.bytes_read += placement.sample.size_bytes
        price.bytes_written += count * self.recipe.row_bytes(placement.bucket)
        self.padded_clips += last.num_frames < windows.num_frames

    def _native_frames(self, placement: Placement, positions: int) -> int:
        """Frames of the video up to a number of grid positions."""
        fps = self.recipe.sampling.fps
        if placement.media.kind == "image":
            return 1
        last = positions - 1
        number = last * self.recipe.sampling.frame_step if fps is None else last / fps * placement.media.fps
        return min(placement.media.num_frames, int(number) + 1)

    @property
    def clips(self) -> int:
        return sum(price.clips for price in self.buckets.values())

    @property
    def failed_samples(self) -> int:
        return sum(count for (status, _), count in self.unplaced.items() if status == "failed")

    @property
    def units(self) -> int:
        return sum(-(-price.clips // self.recipe.unit_rows(bucket)) for bucket, price in self.buckets.items())

    def lines(self) -> list[str]:
        """The price as a table for people."""
        total_read = sum(price.bytes_read for price in self.buckets.values())
        total_written = sum(price.bytes_written for price in self.buckets.values())
        rows = [
            f"{'bucket':<16}{'clips':>10}{'videos':>10}{'frames to decode':>18}{'read':>12}{'written':>12}{'units':>8}"
        ]
        for bucket, price in sorted(self.buckets.items()):
            units = -(-price.clips // self.recipe.unit_rows(bucket))
            rows.append(
                f"{bucket.name:<16}{price.clips:>10}{price.samples:>10}{price.decoded_frames:>18}"
                f"{format_bytes(price.bytes_read):>12}{format_bytes(price.bytes_written):>12}{units:>8}"
            )
        padded = f", {self.padded_clips} of them padded" if self.padded_clips else ""
        rows.append(
            f"{self.shards} shards, {self.clips} clips{padded}, {self.units} units, "
            f"{format_bytes(total_read)} to read, {format_bytes(total_written)} to write"
        )
        rows += [f"  {status} {reason}: {count}" for (status, reason), count in sorted(self.unplaced.items())]
        return rows


def format_bytes(num_bytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"
