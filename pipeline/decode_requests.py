"""What a unit's clips are asked for: decode requests, and the fixed slices that are encoded together.

In:   a unit's clips in row order, and the recipe.
Out:  DecodeRequests for some Decoders; slices; a refusal of shards that changed.
Cost: pure, but for one stat per shard in `require_unchanged`.
Errors: ShardError for a shard that is not the one that was planned; UnitError when nobody can tell at the moment.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import groupby
from typing import Protocol

from pipeline.decode.records import ClipShape, DecodedClip, DecodeOutcome, DecodeRequest, MediaSource
from pipeline.errors import ShardError
from pipeline.placement import Clip
from pipeline.recipe import Recipe
from pipeline.sampling import grid
from pipeline.shards import ShardRef
from pipeline.storage import stat_object

_MESSAGE_PIXELS = 16e6  # some 40 ms of H.264: no process waits long for another's last message
_MESSAGE_REQUESTS = 64


class PendingDecode(Protocol):
    """A decode request under way."""

    def result(self) -> tuple[DecodeOutcome, ...]:
        """Wait for one outcome per window, in order. Bad media is an outcome; UnitError: decoding itself broke."""
        ...


class Decoders(Protocol):
    """Where decode requests go: processes of this machine, or tasks of a cluster."""

    def submit(self, *requests: DecodeRequest) -> PendingDecode:
        """Start decoding; the outcomes are of all requests, one after another. What breaks it is told by `result`."""
        ...

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        """The one window of a request as consecutive clips of `piece_frames` frames; the last one may be shorter.

        Decodes when asked for the next one, or a few ahead; closing the generator ends it.

        Raises:
            DecodeError: the rest cannot be decoded. UnitError: decoding itself broke.
        """
        ...


def next_slice(clips: Sequence[Clip], done: int, recipe: Recipe, first_row: int) -> Sequence[Clip]:
    """The clips of the fixed batch that clip number `done` is in: rows [k * B, (k + 1) * B) of the unit. Pure."""
    batch_size = recipe.batch_size(clips[done].bucket)
    batch = (clips[done].row - first_row) // batch_size
    end = done
    while end < len(clips) and (clips[end].row - first_row) // batch_size == batch:
        end += 1
    return clips[done:end]


def to_requests(clips: Sequence[Clip], recipe: Recipe, group_bytes: int) -> list[DecodeRequest]:
    """Neighbouring windows of one sample become one request, so that they share a pass, up to `group_bytes`. Pure."""
    bucket, positions = clips[0].bucket, grid(recipe.sampling)
    shape = ClipShape(bucket.height, bucket.width, recipe.buckets.fit, recipe.buckets.filter)
    step = max(1, group_bytes // clips[0].decoded_bytes)
    requests = []
    for _, group in groupby(clips, key=lambda clip: (clip.shard_url, clip.sample.offset)):
        same = list(group)
        source = _source(same[0])
        for start in range(0, len(same), step):
            windows = tuple(clip.window for clip in same[start : start + step])
            requests.append(DecodeRequest(source, positions, windows, shape, recipe.decoder))
    return requests


def to_messages(clips: Sequence[Clip], recipe: Recipe, group_bytes: int) -> list[list[DecodeRequest]]:
    """The requests of `to_requests`, small neighbours together: what decodes in milliseconds costs as much to ask for.

    A message is at most `_MESSAGE_PIXELS` of frames as stored and `group_bytes` of clips, padding included. Pure.
    """
    messages: list[list[DecodeRequest]] = []
    pixels = num_bytes = 0.0
    place = 0
    for request in to_requests(clips, recipe, group_bytes):
        clip = clips[place]
        place += len(request.windows)
        own_pixels = sum(window.num_frames for window in request.windows) * clip.media.height * clip.media.width
        own_bytes = len(request.windows) * clip.decoded_bytes
        pixels, num_bytes = pixels + own_pixels, num_bytes + own_bytes
        is_full = pixels > _MESSAGE_PIXELS or num_bytes > group_bytes
        if not messages or is_full or len(messages[-1]) == _MESSAGE_REQUESTS:
            messages.append([])
            pixels, num_bytes = own_pixels, own_bytes
        messages[-1].append(request)
    return messages


def _source(clip: Clip) -> MediaSource:
    sample = clip.sample
    return MediaSource(clip.shard_url, sample.offset, sample.size_bytes, clip.media.kind, sample.key)


def require_unchanged(shard: ShardRef) -> None:
    """Refuse a shard that is not the one that was planned.

    Raises:
        ShardError: its size or version differs, or it is gone.
        UnitError: it cannot be looked at now.
    """
    now = stat_object(shard.url)
    if (now.size_bytes, now.version) != (shard.size_bytes, shard.version):
        raise ShardError(
            f"shard {shard.url} changed since it was planned: size {shard.size_bytes} -> {now.size_bytes}, "
            f"version {shard.version} -> {now.version}. Restore it, or write to a new --store."
        )
