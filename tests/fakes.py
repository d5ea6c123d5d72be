"""Stand-ins for tests: an encoder of ten lines, shards of numbered videos, and a store made from them.

In:   numbers.
Out:  FakeEncoder (VideoEncoder), WebDataset tars on disk, planned and encoded stores.
Cost: milliseconds; a shard of eight videos takes about a quarter of a second.
Errors: none.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from models.chunks import StreamState
from models.spec import EncoderCard, Geometry, Normaliser, Posterior
from models.streamed import EncodeStream
from pipeline.account import close_books
from pipeline.decode.backend import pieces_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import (
    ClipShape,
    DecodedClip,
    DecodeOutcome,
    DecodeRequest,
    MediaInfo,
    MediaKind,
    Window,
)
from pipeline.decode_requests import Decoders
from pipeline.errors import DecodeError
from pipeline.index import IndexFragment, MemberCounts, index_shard, write_fragment
from pipeline.ledger import write_unplaced
from pipeline.plan import Plan, extend, load_plan, to_parquet
from pipeline.recipe import Recipe
from pipeline.samples import Sample
from pipeline.sampling import SamplingConfig
from pipeline.shards import ShardRef, identify
from pipeline.storage import LocalStorage
from pipeline.store import Header, write_arrays, write_header
from pipeline.worker import EncodeWorker, UnitReport
from tests.clips import numbered_video

FAKE_GEOMETRY = Geometry(temporal_stride=4, spatial_stride=8, channels=4)
FAKE_CARD = EncoderCard(
    name="fake",
    kind="fake",
    geometry=FAKE_GEOMETRY,
    normaliser=Normaliser((0.5, 0.0, 0.0, -1.0), (1.0, 2.0, 4.0, 0.5)),
    fingerprint="f" * 64,
    posterior=True,
)


class FakeEncoder:
    """Mean colours of each 8 x 8 block of every fourth frame, and their brightness; log-variance -2 everywhere.

    `batches` counts the calls; `scale` makes values too large for float16.
    """

    one_at_a_time = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.batches = scale, 0

    @property
    def card(self) -> EncoderCard:
        return FAKE_CARD

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        self.batches += 1
        assert frames_BTHWC.dtype == torch.uint8
        B, T, H, W, _ = frames_BTHWC.shape
        FAKE_GEOMETRY.latent_shape(T, H, W)
        pixels = frames_BTHWC[:, ::4].float() / 127.5 - 1
        blocks = pixels.view(B, -1, H // 8, 8, W // 8, 8, 3).mean(dim=(3, 5)).permute(0, 4, 1, 2, 3)
        mean = torch.cat([blocks, blocks.mean(dim=1, keepdim=True)], dim=1) * self.scale
        return Posterior(mean.contiguous(), torch.full_like(mean, -2.0))

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        return EncodeStream(FAKE_GEOMETRY, self._encode_chunk, chunk_frames or 8, state)

    def _encode_chunk(self, frames: torch.Tensor, state: object) -> tuple[Posterior, object]:
        if state is None:
            return self.encode(frames), "started"
        posterior = self.encode(torch.cat([frames[:, :1], frames], dim=1))  # as if a leading frame came with it
        assert posterior.logvar is not None
        return Posterior(posterior.mean[:, :, 1:], posterior.logvar[:, :, 1:]), "started"

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        frames = latents[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        first, rest = frames[:, :, :1], frames[:, :, 1:].repeat_interleave(4, dim=2)
        pixels = torch.cat([first, rest], dim=2).permute(0, 2, 3, 4, 1) / self.scale
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of named members, in this order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def sample_members(key: str, media: bytes, extension: str = "mp4", **metadata: object) -> list[tuple[str, bytes]]:
    """The three members of one sample."""
    caption = f"a clip called {key}".encode()
    return [(f"{key}.{extension}", media), (f"{key}.json", json.dumps(metadata).encode()), (f"{key}.txt", caption)]


def write_numbered_shards(
    directory: Path, num_shards: int = 2, videos_per_shard: int = 4, broken: Mapping[str, bytes] | None = None
) -> list[Path]:
    """Tars of small numbered videos, 9 to 30 frames; `broken` adds samples of these bytes to the first tar."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        members: list[tuple[str, bytes]] = []
        for number in range(videos_per_shard):
            frames = 9 + (7 * (shard * videos_per_shard + number)) % 22
            video = numbered_video(num_frames=frames)
            members += sample_members(f"{shard:02d}_{number:03d}", video, score=number)
        for key, media in (broken or {}).items() if shard == 0 else ():
            members += sample_members(key, media)
        paths.append(write_tar(directory / f"shard-{shard:03d}.tar", members))
    return paths


def index(storage: LocalStorage, paths: Sequence[Path]) -> list[ShardRef]:
    """Index tars with the real decoder."""
    shards = [identify(str(path)) for path in paths]
    with DecodeProcess(DecodeLimits()) as process:
        for shard in shards:
            write_fragment(storage, index_shard(shard, process.probe))
    return shards


def fake_recipe(**changes: object) -> Recipe:
    """A recipe for FakeEncoder at 9 x 32 x 32, two windows per video."""
    from pipeline.buckets import BucketConfig
    from pipeline.recipe import EncodeConfig

    recipe = Recipe(
        FAKE_CARD,
        sampling=SamplingConfig((9,), windows="uniform", num_windows=2),
        buckets=BucketConfig(("32x32",)),
        encode=EncodeConfig(batch_size=2, unit_rows=4),
    )
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


def planned_store(
    directory: Path,
    num_frames_of: Sequence[Mapping[str, int]] = ({"a": 30, "b": 9, "c": 50}, {"d": 31, "e": 12}),
    recipe: Recipe | None = None,
) -> tuple[LocalStorage, Plan]:
    """A store with index, header, arrays and plan; per shard the videos' frames by key. No video lies in the shards.

    Decode it with `FakeDecoders`. Milliseconds.
    """
    recipe = recipe or fake_recipe()
    storage = LocalStorage(directory / "store")
    fragments = [_fake_fragment(directory / f"shard-{n:03d}.tar", videos) for n, videos in enumerate(num_frames_of)]
    for fragment in fragments:
        write_fragment(storage, fragment)
    make_plan(storage, fragments, recipe)
    return storage, load_plan(storage, recipe)


def make_plan(storage: LocalStorage, fragments: Sequence[IndexFragment], recipe: Recipe) -> None:
    """Header, arrays and the first generation, as jobs.prepare writes them."""
    write_header(storage, Header(recipe, "fake"))
    generation = extend(
        Plan([], recipe),
        fragments,
        recipe,
        on_placed=lambda shard, placed: write_unplaced(storage, shard, placed, recipe.fingerprint),
    )
    write_arrays(storage, Plan([generation], recipe))
    storage.put_if_absent(generation.name, to_parquet(generation))


def _fake_fragment(path: Path, num_frames: Mapping[str, int]) -> IndexFragment:
    path.write_bytes(bytes(512 * (len(num_frames) + 1)))
    samples = tuple(
        Sample(
            key,
            offset=512 * number,
            size_bytes=100 + number,
            member=f"{key}.mp4",
            media=MediaInfo("video", "mp4", "h264", 64, 48, 0, 25.0, frames, frames / 25, "yuv420p", 1),
            caption=f"a clip called {key}",
        )
        for number, (key, frames) in enumerate(num_frames.items(), start=1)
    )
    return IndexFragment(identify(str(path)), samples, MemberCounts(len(samples), len(samples), 0))


def fragment_of_lengths(number: int, lengths: Sequence[int]) -> IndexFragment:
    """A shard of videos of these lengths, every third one wide; length 0 is an image, negative a damaged sample."""
    samples = [
        Sample(
            f"{number}/{place}",
            offset=512 * place,
            size_bytes=100,
            member="x.mp4",
            media=_media(max(1, length), 128 if place % 3 == 0 else 64, "video" if length else "image"),
            status="ok" if length >= 0 else "failed",
            reason="" if length >= 0 else "truncated",
        )
        for place, length in enumerate(lengths)
    ]
    return IndexFragment(ShardRef(f"shard-{number}.tar", 1000, "v"), tuple(samples), MemberCounts(1, 1, 0))


def _media(num_frames: int, width: int, kind: MediaKind) -> MediaInfo:
    return MediaInfo(kind, "mov", "h264", width, 64, 0, 24.0, num_frames, num_frames / 24, "yuv420p", 1)


def fake_frames(key: str, window: Window, shape: ClipShape) -> np.ndarray:
    """The frames that FakeDecoders make: noise that depends on nothing but the arguments."""
    draw = np.random.default_rng([*key.encode(), window.start])
    blocks = draw.integers(0, 256, (window.num_frames, shape.height // 8, shape.width // 8, 3), np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


DECODE_SECONDS, READ_SECONDS = 0.5, 0.25
"""What a clip says that it cost FakeDecoders, or a piece of one."""


class FakeDecoders:
    """Decodes what `planned_store` planned, in a thread per message at most `seconds` long (drawn from `seed`).

    Windows of the videos in `bad` are DecodeErrors; requests of those in `errors` raise their exception.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        seed: int = 0,
        bad: Collection[str] = (),
        errors: Mapping[str, Exception] | None = None,
    ) -> None:
        self._seconds, self._draw = seconds, random.Random(seed)
        self.bad, self._errors = bad, dict(errors or {})
        self.requests: list[DecodeRequest] = []

    def submit(self, *requests: DecodeRequest) -> Future[tuple[DecodeOutcome, ...]]:
        self.requests += requests
        future: Future[tuple[DecodeOutcome, ...]] = Future()
        if self._seconds:
            timer = threading.Timer(self._draw.uniform(0, self._seconds), self._decode, (requests, future))
            timer.daemon = True
            timer.start()
        else:
            self._decode(requests, future)
        return future

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        """A video in `bad` turns out to be so after its first piece, where it has several."""
        (outcome,) = self.submit(request).result()
        (window,) = request.windows
        clip = self._clip(request.source.key, window, request.shape)
        for piece in pieces_of(Window(0, window.num_frames), piece_frames):
            if isinstance(outcome, DecodeError) and piece.start + piece.num_frames == window.num_frames:
                raise outcome
            part = slice(piece.start, piece.start + piece.num_frames)
            yield dataclasses.replace(clip, frames=clip.frames[part], pts_seconds=clip.pts_seconds[part])

    def _decode(self, requests: Sequence[DecodeRequest], future: Future[tuple[DecodeOutcome, ...]]) -> None:
        outcomes: list[DecodeOutcome] = []
        for request in requests:
            key = request.source.key
            if key in self._errors:
                future.set_exception(self._errors[key])
                return
            bad = DecodeError("bad_media", "on purpose") if key in self.bad else None
            outcomes += [bad or self._clip(key, window, request.shape) for window in request.windows]
        future.set_result(tuple(outcomes))

    @staticmethod
    def _clip(key: str, window: Window, shape: ClipShape) -> DecodedClip:
        pts_seconds = (window.start + np.arange(window.num_frames)) / 25
        frames = fake_frames(key, window, shape)
        return DecodedClip(frames, pts_seconds, "fake", DECODE_SECONDS, READ_SECONDS)


def encode_store(
    storage: LocalStorage, plan: Plan, decoders: Decoders, window_bytes: int = 1 << 20
) -> list[UnitReport]:
    """Encode every unit with a FakeEncoder and close the books."""
    fatal: list[BaseException] = []
    worker = EncodeWorker(FakeEncoder(), decoders, storage, plan, window_bytes, fatal.append)
    futures = [worker.submit(unit) for unit in plan.units()]
    worker.close()
    assert not fatal, fatal
    reports = [future.result(timeout=0) for future in futures]
    close_books(storage, plan)
    return reports
