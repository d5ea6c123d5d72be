"""The order in which training sees clips: a pure function of (index, config, seed), whatever reads it.

In:   the index fragments of some shards, a DrawConfig.
Out:  GlobalBatch after GlobalBatch without end, and after each the LoaderState from which the next ones follow.
Cost: the samples of `shuffle_shards` shards in memory; fewer than a batch of draws waiting per bucket. To go on from a
      state in mid-epoch reads the epoch's index up to there.
Errors: UsageError for settings that cannot be, or when no sample can give a clip.

A draw is one use of one sample: a bucket and a window. In an epoch every usable video is drawn `draws_per_video` times,
every image `draws_per_image` times, no more and no less. Shards are permuted, then the samples of each run of
`shuffle_shards` shards together. A draw waits in its bucket's queue until the queue holds a batch, so every batch has
one shape; what waits at an epoch's end goes into the next epoch's first batches. A batch is divided among ranks
afterwards: their number changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.buckets import Bucket, BucketConfig, Size, choose_size, resolve_sizes
from pipeline.decode.records import Grid, MediaInfo, MediaSource, Window
from pipeline.errors import UsageError
from pipeline.samples import Sample
from pipeline.sampling import exact_fps

if TYPE_CHECKING:
    from pipeline.index import IndexFragment  # which would bring pyarrow to a command line that needs the flags alone

ReadFragment = Callable[[int], "IndexFragment"]
"""The index fragment of shard number n; numbers follow the order of the shards' urls."""


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """How clips are drawn from samples for training.

    Images and videos are mixed by counts: an epoch holds `draws_per_image` clips of each image and `draws_per_video` of
    each video, and with a 1 in `frames`, `frames_weights` says how many of the latter are single frames.
    """

    frames: tuple[int, ...] = (9,)
    """Clip lengths on the model's grid; each draw takes one that fits its video. Images need a 1."""
    frames_weights: tuple[float, ...] = ()
    """How often each of `frames` is taken where it fits, as relative weights; default: all alike."""
    fps: float | None = None
    """Resample in time to this rate. None keeps the video's own frames, every `frame_step`-th of them."""
    frame_step: int = 1
    """Without fps: take every so many frames."""
    batch_size: int = 4
    """Clips per step, over all ranks."""
    draws_per_video: int = 1
    """Clips of a video per epoch, each with a length and a window of its own."""
    draws_per_image: int = 1
    """Clips of an image per epoch; with draws_per_video it sets how images and videos are mixed."""
    shuffle_shards: int = 16
    """Shards whose samples are shuffled together; memory grows with it."""
    seed: int = 0
    """Of the clips' order, lengths and windows, and of the first weights."""

    def __post_init__(self) -> None:
        if not self.frames or min(self.frames) < 1 or len(set(self.frames)) < len(self.frames):
            raise UsageError(f"frames must be different positive clip lengths, got {self.frames}")
        if self.frames_weights and (
            len(self.frames_weights) != len(self.frames) or not all(weight > 0 for weight in self.frames_weights)
        ):
            raise UsageError(f"frames_weights needs a positive weight for each of {self.frames}: {self.frames_weights}")
        if self.fps is not None and (self.frame_step != 1 or not self.fps > 0):
            raise UsageError(f"fps must be positive and without a frame_step, got {self.fps=} {self.frame_step=}")
        for name in ("frame_step", "batch_size", "draws_per_video", "draws_per_image", "shuffle_shards"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, got {self.seed}")

    @property
    def grid(self) -> Grid:
        """The positions in time that windows count."""
        return Grid(None if self.fps is None else exact_fps(self.fps), self.frame_step)


@dataclasses.dataclass(frozen=True)
class Draw:
    """One use of one sample: `number` is its place in the epoch's order."""

    epoch: int
    number: int
    source: MediaSource
    bucket: Bucket
    window: Window


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
    """The draws of one step over all ranks, all of one bucket. stage: of the curriculum that it belongs to."""

    step: int
    draws: tuple[Draw, ...]
    stage: int = 0

    @property
    def bucket(self) -> Bucket:
        """The shape of every clip in it."""
        return self.draws[0].bucket


@dataclasses.dataclass(frozen=True)
class LoaderState:
    """Where the order stands: what the next batch depends on, as plain numbers.

    step: batches given out, over all stages. epoch, number: the next draw of the stage to take. waiting: (epoch,
    number) of the draws that were taken and are in no batch yet, in the order of their taking. stage: of the
    curriculum.
    """

    step: int = 0
    epoch: int = 0
    number: int = 0
    waiting: tuple[tuple[int, int], ...] = ()
    stage: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LoaderState:
        """Read `as_json` back."""
        waiting = tuple((epoch, number) for epoch, number in fields["waiting"])
        return cls(fields["step"], fields["epoch"], fields["number"], waiting, fields["stage"])


class ClipOrder:
    """The draws of every epoch, and the batches that they form; each stage of a curriculum has an order of its own."""

    def __init__(
        self,
        config: DrawConfig,
        sizes: BucketConfig,
        spatial_stride: int,
        num_shards: int,
        read: ReadFragment,
        stage: int = 0,
    ) -> None:
        self.config, self.stage = config, stage
        self._sizes = resolve_sizes(sizes, spatial_stride)
        self._num_shards, self._read = num_shards, read

    def batches(self, state: LoaderState | None = None) -> Iterator[tuple[GlobalBatch, LoaderState]]:
        """Batches from a state on, each with the state after it.

        Raises:
            UsageError: an epoch gave no draw.
        """
        state = state or LoaderState(stage=self.stage)
        queues: dict[Bucket, list[Draw]] = {}
        for draw in self._waiting(state):
            queues.setdefault(draw.bucket, []).append(draw)
        step = state.step
        for epoch in itertools.count(state.epoch):
            for draw in self.draws(epoch, state.number if epoch == state.epoch else 0):
                queue = queues.setdefault(draw.bucket, [])
                queue.append(draw)
                if len(queue) == self.config.batch_size:
                    step += 1
                    del queues[draw.bucket]
                    yield GlobalBatch(step, tuple(queue), self.stage), self._state_after(step, draw, queues)

    def draws(self, epoch: int, first_number: int = 0) -> Iterator[Draw]:
        """The draws of one epoch in their order, from `first_number` on.

        Raises:
            UsageError: the epoch has none.
        """
        shards = self._permutation(self._num_shards, epoch, 0)
        number = 0
        for start in range(0, self._num_shards, self.config.shuffle_shards):
            uses = [use for shard in shards[start : start + self.config.shuffle_shards] for use in self._uses(shard)]
            for place in self._permutation(len(uses), epoch, 1 + start):
                if number >= first_number:
                    yield self._draw(epoch, number, uses[place])
                number += 1
        if not number:
            raise UsageError(
                f"no sample of the shards has {min(self.config.frames)} frames: use fewer --frames, or other shards"
            )

    def _state_after(self, step: int, draw: Draw, queues: Mapping[Bucket, list[Draw]]) -> LoaderState:
        waiting = sorted((waiting.epoch, waiting.number) for queue in queues.values() for waiting in queue)
        return LoaderState(step, draw.epoch, draw.number + 1, tuple(waiting), self.stage)

    def _waiting(self, state: LoaderState) -> Iterator[Draw]:
        for epoch, places in itertools.groupby(state.waiting, key=lambda place: place[0]):
            numbers = {number for _, number in places}
            yield from itertools.islice((draw for draw in self.draws(epoch) if draw.number in numbers), len(numbers))

    def _permutation(self, count: int, epoch: int, salt: int) -> list[int]:
        seeds = [self.config.seed, self.stage, epoch, salt]
        order: list[int] = np.random.default_rng(seeds).permutation(count).tolist()
        return order

    def _uses(self, shard: int) -> Iterator[_Use]:
        """What one epoch takes of a shard, in tar order."""
        fragment = self._read(shard)
        for sample in fragment.samples:
            if sample.status != "ok" or sample.media is None:
                continue
            length = self._grid_length(sample.media)
            is_image = sample.media.kind == "image"
            repeats = self.config.draws_per_image if is_image else self.config.draws_per_video
            if length >= min(self.config.frames):
                size = choose_size(self._sizes, sample.media.height, sample.media.width)
                for repeat in range(repeats):
                    yield _Use(shard, fragment.shard.url, sample, length, size, repeat)

    def _grid_length(self, media: MediaInfo) -> int:
        if media.kind == "image":
            return 1
        return self.config.grid.length(media.num_frames, media.duration_seconds)

    def _draw(self, epoch: int, number: int, use: _Use) -> Draw:
        config, sample = self.config, use.sample
        assert sample.media is not None
        weights = config.frames_weights or (1.0,) * len(config.frames)
        fitting = [(t, weight) for t, weight in zip(config.frames, weights, strict=True) if t <= use.grid_length]
        chance, place = self._chances(epoch, use)
        num_frames = _pick(fitting, chance)
        start = int(place * (use.grid_length - num_frames + 1))
        source = MediaSource(use.shard_url, sample.offset, sample.size_bytes, sample.media.kind, sample.key)
        return Draw(epoch, number, source, Bucket(num_frames, *use.size), Window(start, num_frames))

    def _chances(self, epoch: int, use: _Use) -> tuple[float, float]:
        """Two numbers of [0, 1) that depend on the sample, stage and epoch, and not on the sample's neighbours."""
        numbers = (self.config.seed, self.stage, epoch, use.repeat, use.shard, use.sample.offset)
        identity = "/".join((*map(str, numbers), use.sample.key))
        digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first, second = struct.unpack("<2Q", digest)
        return (first >> 11) / (1 << 53), (second >> 11) / (1 << 53)


@dataclasses.dataclass(frozen=True)
class _Use:
    """A sample that an epoch takes: its frames on the grid, its size, and which of its draws this is."""

    shard: int
    shard_url: str
    sample: Sample
    grid_length: int
    size: Size
    repeat: int


def _pick(choices: list[tuple[int, float]], chance: float) -> int:
    """The choice at that share of the summed weights."""
    target = chance * sum(weight for _, weight in choices)
    for value, weight in choices:
        target -= weight
        if target < 0:
            return value
    return choices[-1][0]
