"""Blocks of a remote object: the bytes are those of the object; how many requests they cost, and how much memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import block_cache
from pipeline.block_cache import BlockCache

CONTENT = random.Random(0).randbytes(1 << 16)
MEGABYTE = 1 << 20


class Remote:
    """An object that counts; `asked` holds (offset, size) of each request."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def __call__(self, offset: int, size_bytes: int) -> tuple[bytes, int]:
        self.asked.append((offset, size_bytes))
        return self.content[offset : offset + size_bytes], len(self.content)


def read_all(cache: BlockCache, start: int, size_bytes: int) -> bytes:
    """As a file does: until the end of the range, or nothing more comes."""
    data = b""
    while part := cache.read(start + len(data), size_bytes - len(data)):
        data += part
    return data


READS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([1, 16, 300, 5000, 20_000, 1 << 16])), max_size=25)


class TestAnyReads:
    """With small blocks, so that few reads meet every case."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def small_blocks(cls) -> Iterator[None]:
        sizes = {"OPENING": 1024, "JUMP": 256, "NEAR": 1024, "MAX_BLOCK": 8192, "MAX_KEPT": 16384}
        with pytest.MonkeyPatch.context() as patch:
            for name, size in sizes.items():
                patch.setattr(block_cache, f"{name}_BYTES", size)
            yield

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 70_000), st.none() | st.integers(0, 70_000), READS)
    def test_the_bytes_are_those_of_the_object(
        self, offset: int, size: int | None, reads: list[tuple[float, int]]
    ) -> None:
        cache = BlockCache(Remote(CONTENT), offset, size)
        slice_ = CONTENT[offset:] if size is None else CONTENT[offset : offset + size]
        assert cache.size_bytes == len(slice_)
        for share, count in reads:
            place = int(share * len(slice_))
            wanted = slice_[place : place + count]
            assert read_all(cache, offset + place, len(wanted)) == wanted

    @settings(max_examples=150, deadline=None)
    @given(READS)
    def test_nothing_kept_is_asked_for_again_and_memory_has_a_bound(self, reads: list[tuple[float, int]]) -> None:
        remote = Remote(CONTENT)
        cache = BlockCache(remote, 0, None)
        for share, count in reads:
            kept, first = list(cache._blocks), len(remote.asked)
            cache.read(int(share * (len(CONTENT) - 1)), count)
            for start, size in remote.asked[first:]:
                assert all(start >= block.stop or start + size <= block.start for block in kept)
            assert sum(len(block.data) for block in cache._blocks) <= block_cache.MAX_KEPT_BYTES


def test_reading_in_order_asks_for_more_each_time() -> None:
    remote = Remote(bytes(40 * MEGABYTE))
    cache = BlockCache(remote, 0, None)
    for start in range(0, 40 * MEGABYTE, 1 << 16):
        assert len(cache.read(start, 1 << 16)) == 1 << 16
    sizes = [size // MEGABYTE for _, size in remote.asked]
    assert sizes == [1, 4, 8, 8, 8, 8, 3]
    assert sum(len(block.data) for block in cache._blocks) <= 32 * MEGABYTE


def test_what_is_about_to_be_read_whole_comes_at_once_up_to_a_block() -> None:
    for size, asked in ((5, [5]), (8, [8]), (20, [8, 12])):
        remote = Remote(bytes(40 * MEGABYTE))
        cache = BlockCache(remote, 1000, size * MEGABYTE, whole=True)
        assert len(read_all(cache, 1000, size * MEGABYTE)) == size * MEGABYTE
        assert [asked // MEGABYTE for _, asked in remote.asked] == asked


def test_headers_far_apart_cost_little_each() -> None:
    remote = Remote(bytes(50 * MEGABYTE))
    cache = BlockCache(remote, 0, None)
    for start in range(0, 50 * MEGABYTE, 5 * MEGABYTE):
        cache.read(start, 512)
    assert [size for _, size in remote.asked] == [block_cache.OPENING_BYTES] + [block_cache.JUMP_BYTES] * 9


def test_an_index_at_the_end_and_a_start_read_in_turns_cost_no_request_twice() -> None:
    remote = Remote(bytes(20 * MEGABYTE))
    cache = BlockCache(remote, 0, 20 * MEGABYTE)
    for start in range(0, 12 * MEGABYTE, 1 << 16):
        cache.read(start, 1 << 16)
        cache.read(20 * MEGABYTE - 50_000, 32_768)
    assert sorted(remote.asked) == [
        (0, MEGABYTE),
        (MEGABYTE, 4 * MEGABYTE),
        (5 * MEGABYTE, 8 * MEGABYTE),
        (20 * MEGABYTE - 50_000, 50_000),
    ]


def test_a_large_read_is_one_request_and_is_not_kept() -> None:
    remote = Remote(bytes(60 * MEGABYTE))
    cache = BlockCache(remote, 0, None)
    assert len(cache.read(30 * MEGABYTE, 30 * MEGABYTE)) == 30 * MEGABYTE
    assert remote.asked[1:] == [(30 * MEGABYTE, 30 * MEGABYTE)]
    assert sum(len(block.data) for block in cache._blocks) <= 2 * MEGABYTE


def test_an_object_that_shrinks_ends_the_reading() -> None:
    remote = Remote(bytes(3 * MEGABYTE))
    cache = BlockCache(remote, 0, None)
    remote.content = remote.content[: 2 * MEGABYTE]
    assert len(read_all(cache, 0, 3 * MEGABYTE)) == 2 * MEGABYTE
    assert all(block.data for block in cache._blocks)


def test_the_most_recently_used_are_kept() -> None:
    remote = Remote(bytes(120 * MEGABYTE))
    cache = BlockCache(remote, 0, None)
    for start in range(0, 100 * MEGABYTE, 1 << 16):
        cache.read(start, 1 << 16)
        cache.read(110 * MEGABYTE, 16)
    assert [size for start, size in remote.asked if start == 110 * MEGABYTE] == [block_cache.JUMP_BYTES]


def test_closed_it_holds_nothing() -> None:
    cache = BlockCache(Remote(CONTENT), 0, None)
    cache.close()
    assert cache._blocks == []
