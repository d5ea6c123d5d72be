"""Videos in an object store: a decode asks for their bytes once, a probe for few of them."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.block_cache import JUMP_BYTES, OPENING_BYTES
from pipeline.decode.backend import decode_pieces, decode_windows, probe_media
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.decode.source import MAX_FETCHED_BYTES, fetched, open_source
from pipeline.errors import ShardError, UnitError
from tests.clips import stored

LIMITS = DecodeLimits()
NUM_FRAMES = 110
WINDOWS = {"start": (0,), "middle": (80,), "several": (0, 40, 90), "past the end": (90, 105)}


class Bucket:
    """An object store of one object; `asked` holds (offset, size) of each request, of which so many succeed."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.num_answers = 1000
        self.asked: list[tuple[int, int]] = []

    def get_range(self, name: str, offset: int, size_bytes: int) -> tuple[bytes, int]:
        if name != "shard.tar":
            raise FileNotFoundError(f"there is no {name}")
        if len(self.asked) == self.num_answers:
            raise OSError("SlowDown")
        self.asked.append((offset, size_bytes))
        return self.content[offset : offset + size_bytes], len(self.content)


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket(b"")
    monkeypatch.setattr(storage, "client_of", lambda url: (bucket, url.rpartition("/")[2]))
    return bucket


def put(bucket, source):
    """The same medium in the object store, with the bytes around it."""
    bucket.content = Path(source.path).read_bytes() + bytes(2 << 20)
    return dataclasses.replace(source, path="s3://videos/shard.tar")


def noise(container):
    """A video of more than 4 MB, which H.264 cannot make smaller."""
    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container) as output:
            stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "8", "g": "10"})
            stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
            stream.codec_context.thread_count = 1
            for _ in range(NUM_FRAMES):
                planes = rng.integers(0, 256, (216, 176), np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
            output.mux(stream.encode(None))
        return Path(file.name).read_bytes()


@pytest.fixture(scope="module", params=["mp4", "matroska", "mpegts"])
def any_video(request, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("videos"), noise(request.param))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("videos"), noise("mp4"))


def request_of(source, starts, decoder="auto"):
    return DecodeRequest(source, Grid(), tuple(Window(start, 10) for start in starts), ClipShape(48, 48), decoder)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, DecodedClip):
            assert np.array_equal(one.frames, other.frames)
        else:
            assert (one.reason, one.detail) == (other.reason, other.detail)


@pytest.mark.parametrize("starts", WINDOWS.values(), ids=WINDOWS)
def test_a_decode_is_one_request(bucket, any_video, starts):
    source = put(bucket, any_video)
    assert 4 << 20 < source.size_bytes < MAX_FETCHED_BYTES
    outcomes = decode_windows(request_of(source, starts), LIMITS)
    assert bucket.asked == [(source.offset, source.size_bytes)]
    assert_same(outcomes, decode_windows(request_of(any_video, starts), LIMITS))


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_back_ends_that_open_the_source_several_times_share_the_bytes(bucket, mp4, decoder, request):
    if decoder == "torchcodec":
        request.getfixturevalue("torchcodec_or_skip")
    source = put(bucket, mp4)
    outcomes = decode_windows(request_of(source, (80,), decoder), LIMITS)
    assert bucket.asked == [(source.offset, source.size_bytes)]
    assert outcomes[0].decoder == decoder


def test_pieces_are_one_request(bucket, mp4):
    source = put(bucket, mp4)
    request = dataclasses.replace(request_of(source, ()), windows=(Window(5, 100),))
    assert sum(len(piece.frames) for piece in decode_pieces(request, LIMITS, 30)) == 100
    assert bucket.asked == [(source.offset, source.size_bytes)]


def test_a_probe_reads_the_beginning_and_the_index(bucket, mp4):
    source = put(bucket, mp4)
    assert probe_media(source, LIMITS) == probe_media(mp4, LIMITS)
    assert bucket.asked[0] == (source.offset, OPENING_BYTES)
    assert sum(size for _, size in bucket.asked) <= OPENING_BYTES + JUMP_BYTES


def test_an_image_is_one_request(bucket, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (1200, 1000)).save(picture, "BMP")
    source = put(bucket, stored(tmp_path, picture.getvalue(), "image"))
    assert probe_media(source, LIMITS).width == 1200
    request = dataclasses.replace(request_of(source, ()), windows=(Window(0, 1),))
    assert isinstance(decode_windows(request, LIMITS)[0], DecodedClip)
    assert bucket.asked == 2 * [(source.offset, source.size_bytes)]


def test_only_small_videos_of_an_object_store_are_fetched(bucket, tmp_path):
    large = MediaSource("s3://videos/shard.tar", 512, MAX_FETCHED_BYTES + 1, "video")
    local = stored(tmp_path, b"of any size")
    assert fetched(large) is large
    assert fetched(local) is local
    assert bucket.asked == []
    bucket.content = bytes(512 + MAX_FETCHED_BYTES + 1)
    small = dataclasses.replace(large, size_bytes=MAX_FETCHED_BYTES)
    with open_source(fetched(small)) as file:
        assert len(file.read()) == MAX_FETCHED_BYTES
    assert bucket.asked == [(512, MAX_FETCHED_BYTES)]


def test_a_large_video_is_decoded_by_blocks(bucket, mp4, monkeypatch):
    monkeypatch.setattr("pipeline.decode.source.MAX_FETCHED_BYTES", mp4.size_bytes - 1)
    source = put(bucket, mp4)
    assert_same(decode_windows(request_of(source, (80,)), LIMITS), decode_windows(request_of(mp4, (80,)), LIMITS))
    assert bucket.asked[0] == (source.offset, OPENING_BYTES)
    assert len(bucket.asked) > 1


def test_an_object_that_ends_early_gives_what_it_has(bucket):
    bucket.content = b"only this"
    source = fetched(MediaSource("s3://videos/shard.tar", 5, 100, "video"))
    with open_source(source) as file:
        assert file.read() == b"this"
    assert "this" not in repr(source)


def test_an_object_that_is_not_there(bucket):
    with pytest.raises(ShardError, match=r"cannot read shard s3://videos/gone\.tar"):
        fetched(MediaSource("s3://videos/gone.tar", 0, 100, "video"))


@pytest.mark.parametrize("num_answers", [0, 1])
def test_a_store_that_fails_in_a_decode_is_no_fault_of_the_video(bucket, mp4, num_answers, monkeypatch):
    monkeypatch.setattr("pipeline.decode.source.MAX_FETCHED_BYTES", num_answers * (mp4.size_bytes - 1))
    source = put(bucket, mp4)
    bucket.num_answers = num_answers
    with pytest.raises(UnitError, match=r"cannot read .*s3://videos/shard\.tar: SlowDown"):
        decode_windows(request_of(source, (80,)), LIMITS)


@pytest.mark.parametrize("num_answers", [0, 1])
def test_a_store_that_fails_in_an_image_is_no_fault_of_the_image(bucket, tmp_path, num_answers):
    picture = io.BytesIO()
    Image.new("RGB", (2000, 1500)).save(picture, "BMP")
    source = put(bucket, stored(tmp_path, picture.getvalue(), "image"))
    assert source.size_bytes > MAX_FETCHED_BYTES
    bucket.num_answers = num_answers
    request = dataclasses.replace(request_of(source, ()), windows=(Window(0, 1),))
    with pytest.raises(UnitError, match=r"cannot read .*s3://videos/shard\.tar: SlowDown"):
        decode_windows(request, LIMITS)
