from __future__ import annotations

import dataclasses

import pytest

from pipeline.buckets import Bucket, BucketConfig
from pipeline.decode.records import Window
from pipeline.filters import FilterConfig
from pipeline.placement import Clip, PlacedShard, Placement, Unplaced, caption, place
from pipeline.samples import Sample
from pipeline.sampling import SamplingConfig
from tests.fakes import FAKE_CARD, FAKE_GEOMETRY, fake_recipe
from tests.plans import fragment, media_info

SAMPLE = Sample("k", 512, 99, "k.mp4", media_info(20), caption="from the index", metadata='{"alt": "from the field"}')


def test_a_video_goes_to_the_bucket_of_its_aspect_with_its_windows() -> None:
    recipe = fake_recipe(buckets=BucketConfig(("32x32", "32x64")))
    wide = dataclasses.replace(SAMPLE, media=media_info(20, height=90, width=160))
    placed = place(wide, recipe)
    assert isinstance(placed, Placement)
    assert placed.bucket == Bucket(9, 32, 64)
    assert [placed.windows.window(i) for i in range(placed.windows.count)] == [Window(0, 9), Window(11, 9)]


def test_an_image_is_a_clip_of_one_frame() -> None:
    image = dataclasses.replace(SAMPLE, media=media_info(kind="image"))
    placed = place(image, fake_recipe())
    assert isinstance(placed, Placement)
    assert (placed.bucket, placed.windows.count) == (Bucket(1, 32, 32), 1)
    no_lead = dataclasses.replace(FAKE_CARD, geometry=dataclasses.replace(FAKE_GEOMETRY, leading_frame=False))
    unplaced = place(image, fake_recipe(encoder=no_lead, sampling=SamplingConfig((8,))))
    assert unplaced == Unplaced(image, "filtered", "image", "fake takes no single frames")


def test_why_a_sample_has_no_clip() -> None:
    failed = Sample("k", status="failed", reason="tar_damaged", detail="bytes")
    assert place(failed, fake_recipe()) == Unplaced(failed, "failed", "tar_damaged", "bytes")
    filtered = place(SAMPLE, fake_recipe(filters=FilterConfig(min_width=97)))
    assert filtered == Unplaced(SAMPLE, "filtered", "min_width")
    short = dataclasses.replace(SAMPLE, media=media_info(8))
    assert place(short, fake_recipe()) == Unplaced(short, "filtered", "short_video", "8 frames on the sampling grid")


def test_a_video_without_pixels_fails_alone() -> None:
    flat = dataclasses.replace(SAMPLE, media=media_info(height=0))
    assert place(flat, fake_recipe()) == Unplaced(flat, "failed", "no_pixels", "height 0, width 96")


def test_filters_see_the_caption_of_the_recipe() -> None:
    filters = FilterConfig(keep='"field" in caption')
    assert isinstance(place(SAMPLE, fake_recipe(filters=filters)), Unplaced)
    assert isinstance(place(SAMPLE, fake_recipe(filters=filters, caption_field="alt")), Placement)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ('{"alt": "from the field"}', "from the field"),
        ('{"alt": 3}', "from the index"),
        ("{}", "from the index"),
        ('{"alt": "half \\ud800 a pair"}', "half ? a pair"),
    ],
)
def test_caption_field(metadata: str, expected: str) -> None:
    found = caption(dataclasses.replace(SAMPLE, metadata=metadata), fake_recipe(caption_field="alt"))
    assert found == expected
    assert found.encode()


def test_any_slice_of_a_shards_clips() -> None:
    media = [media_info(9), media_info(30), "broken", media_info(kind="image"), media_info(20), media_info(8)]
    placed = PlacedShard.of(fragment("s", media), fake_recipe())
    bucket = Bucket(9, 32, 32)
    assert placed.rows_per_bucket() == {Bucket(1, 32, 32): 1, bucket: 5}
    assert [unplaced.reason for unplaced in placed.unplaced] == ["broken", "short_video"]
    whole = list(placed.clips(bucket, 100, 0, 5))
    assert [(clip.row, clip.sample.key, clip.window_index) for clip in whole] == [
        (100, "s-0", 0),
        (101, "s-1", 0),
        (102, "s-1", 1),
        (103, "s-4", 0),
        (104, "s-4", 1),
    ]
    for skip in range(6):
        for count in range(6 - skip):
            assert list(placed.clips(bucket, 100, skip, count)) == whole[skip : skip + count]


def test_decoded_bytes_count_the_padding() -> None:
    clip = Clip(0, "s", SAMPLE, media_info(5), Bucket(9, 32, 64), 0, Window(0, 5))
    assert clip.decoded_bytes == 9 * 32 * 64 * 3
