"""Clips for training, from the same index, sampler and decoder that encode uses.

In:   index fragments, a SamplingConfig, a size, decoders.
Out:  an endless iterator of uint8 batches, B T H W 3.
Cost: decoding; a bounded number of requests ahead; one small record per video.
Errors: UsageError when no sample yields a clip; a bad video is left out and counted; UnitError and ShardError from
        decoding itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, MediaSource
from pipeline.decode_requests import Decoders, PendingDecode
from pipeline.errors import UsageError
from pipeline.index import IndexFragment
from pipeline.sampling import SamplingConfig, grid, sample_windows

_REQUESTS_AHEAD = 8


@dataclasses.dataclass
class TrainingClips:
    """Endless shuffled batches; every epoch draws new random windows.

    The same seed gives the same batches, however long decoding takes. `failed` counts the requests, one per video and
    epoch, that gave no clip.
    """

    fragments: Sequence[IndexFragment]
    num_frames: int
    windows_per_video: int
    shape: ClipShape
    decoders: Decoders
    batch_size: int
    seed: int
    failed: int = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        clips: list[np.ndarray] = []
        for decoded in self._decoded():
            clips += decoded
            while len(clips) >= self.batch_size:
                yield np.stack(clips[: self.batch_size])
                del clips[: self.batch_size]

    def _decoded(self) -> Iterator[list[np.ndarray]]:
        """The clips of one request after another, in their order, whichever is decoded first."""
        pending: deque[PendingDecode] = deque()
        failed_in_a_row = 0
        for epoch in itertools.count():
            requests = self._requests(epoch)
            for request in requests:
                pending.append(self.decoders.submit(request))
                if len(pending) < _REQUESTS_AHEAD:
                    continue
                good = [outcome.frames for outcome in pending.popleft().result() if isinstance(outcome, DecodedClip)]
                failed_in_a_row = 0 if good else failed_in_a_row + 1
                self.failed += not good
                if failed_in_a_row == 2 * len(requests):  # Within two epochs every one has had its turn.
                    raise UsageError(
                        f"none of the {len(requests)} videos with {self.num_frames} frames can be decoded: "
                        "`latentmill index` and `latentmill encode` name the reasons"
                    )
                yield good

    def _requests(self, epoch: int) -> list[DecodeRequest]:
        """One request per video that is long enough, shuffled; windows and order change with the epoch."""
        config = SamplingConfig(
            (self.num_frames,), windows="random", num_windows=self.windows_per_video, seed=self.seed + epoch
        )
        requests = list(self._epoch(config))
        if not requests:
            raise UsageError(f"no video of the shards has {self.num_frames} frames: use fewer --frames")
        order = np.random.default_rng([self.seed, epoch]).permutation(len(requests))
        return [requests[number] for number in order]

    def _epoch(self, config: SamplingConfig) -> Iterator[DecodeRequest]:
        for fragment in self.fragments:
            for sample in fragment.samples:
                if sample.status != "ok" or sample.media is None or sample.media.kind != "video":
                    continue
                plan = sample_windows(config, sample.media.num_frames, sample.key)
                if plan.filtered is None:
                    source = MediaSource(fragment.shard.url, sample.offset, sample.size_bytes, "video", sample.key)
                    windows = tuple(plan.window(index) for index in range(plan.count))
                    yield DecodeRequest(source, grid(config), windows, self.shape)
