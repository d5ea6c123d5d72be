from __future__ import annotations

from pipeline.buckets import Bucket
from pipeline.placement import PlacedShard
from pipeline.price import BucketPrice, Price, format_bytes
from pipeline.sampling import SamplingConfig
from tests.fakes import fake_recipe
from tests.plans import fragment, media_info

BUCKET = Bucket(9, 32, 32)


def priced(recipe_changes: dict[str, object], *shards: list[object]) -> Price:
    recipe = fake_recipe(**recipe_changes)
    price = Price(recipe)
    for number, media in enumerate(shards):
        price.add(PlacedShard.of(fragment(f"s{number}", media), recipe))  # type: ignore[arg-type]
    return price


def test_sums_by_hand() -> None:
    price = priced({}, [media_info(30), media_info(9), "no_video"], [media_info(20), media_info(kind="image"), "cut"])
    # Two windows of 9 frames in the videos of 30 and 20, one in that of 9; a row is 384 bytes.
    assert price.buckets[BUCKET] == BucketPrice(
        clips=5, samples=3, wanted_frames=45, decoded_frames=59, bytes_read=2000 + 2001 + 2000, bytes_written=5 * 384
    )
    assert price.buckets[Bucket(1, 32, 32)] == BucketPrice(1, 1, 1, 1, 2001, 128)
    assert (price.shards, price.clips, price.units, price.failed_samples) == (2, 6, 3, 2)
    assert dict(price.unplaced) == {("failed", "no_video"): 1, ("failed", "cut"): 1}


def test_the_decoder_goes_no_further_than_the_last_wanted_frame() -> None:
    head = {"sampling": SamplingConfig((9,))}
    assert priced(head, [media_info(100)]).buckets[BUCKET].decoded_frames == 9
    stepped = {"sampling": SamplingConfig((9,), frame_step=4)}
    assert priced(stepped, [media_info(100)]).buckets[BUCKET].decoded_frames == 33
    slow = {"sampling": SamplingConfig((9,), fps=5.0)}  # every fifth frame of 25 a second
    assert priced(slow, [media_info(100)]).buckets[BUCKET].decoded_frames == 41


def test_padded_clips_are_counted() -> None:
    price = priced({"sampling": SamplingConfig((9,), short="pad")}, [media_info(5), media_info(9)])
    assert (price.clips, price.padded_clips) == (2, 1)
    assert "2 clips, 1 of them padded, 1 units" in price.lines()[-1]


def test_the_table() -> None:
    lines = priced({}, [media_info(30), "no_video"]).lines()
    assert lines[0].split() == ["bucket", "clips", "videos", "frames", "to", "decode", "read", "written", "units"]
    assert lines[1].split() == ["9x32x32", "2", "1", "30", "2.0", "kB", "768", "B", "1"]
    assert lines[2] == "1 shards, 2 clips, 1 units, 2.0 kB to read, 768 B to write"
    assert lines[3] == "  failed no_video: 1"


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 1.5e6, 2e9, 3e12, 4e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 GB",
        "3.00 TB",
        "4000.00 TB",
    ]
