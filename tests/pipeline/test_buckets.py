import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.buckets import ASPECT_RATIOS, Bucket, BucketConfig, choose_size, resolve_sizes
from pipeline.errors import SampleError, UsageError

STRIDES = st.sampled_from([8, 16, 32])
SIDES = st.integers(1, 5000)


@settings(deadline=None)
@given(st.integers(100_000, 4_000_000), STRIDES)
def test_derived_sizes_are_on_stride_within_the_budget_and_near_both_ideals(budget, stride):
    for ratio in ASPECT_RATIOS:
        ((height, width),) = resolve_sizes(BucketConfig(pixel_budget=budget, aspect_ratios=(ratio,)), stride)
        wide, high = map(int, ratio.split(":"))
        assert height % stride == 0
        assert width % stride == 0
        assert height * width <= budget
        assert abs(height - math.sqrt(budget * high / wide)) <= stride
        assert abs(width - math.sqrt(budget * wide / high)) <= stride


@settings(deadline=None)
@given(st.integers(32, 5_000), st.integers(1, 30), st.integers(1, 30))
def test_any_budget_gives_a_size_within_it_or_names_the_ratio(budget, wide, high):
    ratio = f"{wide}:{high}"
    try:
        sizes = resolve_sizes(BucketConfig(pixel_budget=budget, aspect_ratios=(ratio,)), 32)
    except UsageError as error:
        sizes, message = (), str(error)
    assert all(height % 32 == width % 32 == 0 < height * width <= budget for height, width in sizes)
    assert sizes or f"{budget} has no room for {ratio}" in message


def test_worked_budget():
    sizes = resolve_sizes(BucketConfig(pixel_budget=256 * 256), 32)
    assert sizes == ((160, 384), (192, 320), (224, 288), (256, 256), (288, 224), (320, 192))
    assert resolve_sizes(BucketConfig(pixel_budget=480 * 832, aspect_ratios=("26:15",)), 16) == ((480, 832),)


def test_given_sizes_are_sorted_and_unique():
    assert resolve_sizes(BucketConfig(sizes=("512x256", "256x512", "512x256")), 32) == ((256, 512), (512, 256))
    assert resolve_sizes(BucketConfig(), 32) == ((256, 256),)
    assert BucketConfig() == BucketConfig(sizes=("256x256",))


def test_a_size_off_the_stride_names_the_nearest():
    with pytest.raises(UsageError, match=r"270x480 .* multiples of 32: the nearest is 256x480"):
        resolve_sizes(BucketConfig(sizes=("270x480",)), 32)
    with pytest.raises(UsageError, match="nearest is 32x32"):
        resolve_sizes(BucketConfig(sizes=("4x32",)), 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ("256x256",), "pixel_budget": 65536}, "not both"),
        ({"sizes": ("256",)}, "height x width"),
        ({"sizes": ("0x256",)}, "height x width"),
        ({"sizes": ("256x256x3",)}, "height x width"),
        ({"aspect_ratios": ("1:1",)}, "need a pixel_budget"),
        ({"pixel_budget": 0}, "positive"),
        ({"pixel_budget": 65536, "aspect_ratios": ()}, "aspect ratio"),
        ({"pixel_budget": 65536, "aspect_ratios": ("16x9",)}, "width:height"),
        ({"fit": "letterbox"}, "letterbox"),
        ({"filter": "nearest"}, "nearest"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        BucketConfig(**options)


@settings(deadline=None)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8).map(tuple), SIDES, SIDES)
def test_the_chosen_size_has_the_nearest_aspect_whatever_the_order(sizes, height, width):
    chosen = choose_size(sizes, height, width)

    def distance(size):
        return abs(math.log(size[1] / size[0]) - math.log(width / height))

    assert chosen in sizes
    assert distance(chosen) <= min(map(distance, sizes)) + 1e-9
    assert chosen == choose_size(sizes[::-1], height, width)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1080, 1920, (288, 512)),
        (288, 512, (288, 512)),
        (287, 512, (144, 256)),
        (100, 178, (144, 256)),
        (1920, 1080, (512, 288)),
        (600, 600, (512, 512)),
        (300, 300, (256, 256)),
        (64, 64, (256, 256)),
    ],
)
def test_among_equal_aspects_the_largest_without_upscaling_else_the_smallest(height, width, expected):
    sizes = ((144, 256), (288, 512), (576, 1024), (512, 288), (256, 256), (512, 512))
    assert choose_size(sizes[:2] + sizes[3:], height, width) == expected


def test_opposite_aspects_are_equally_far_from_a_square():
    assert choose_size(((32, 96), (192, 64)), 48, 48) == (32, 96)
    assert choose_size(((32, 96), (192, 64)), 500, 500) == (192, 64)


def test_a_sample_without_pixels_is_a_sample_error():
    with pytest.raises(SampleError) as caught:
        choose_size(((256, 256),), 0, 640)
    assert caught.value.reason == "no_pixels"


@settings(deadline=None)
@given(SIDES, SIDES, SIDES)
def test_a_bucket_is_its_name(frames, height, width):
    bucket = Bucket(frames, height, width)
    assert bucket.name == f"{frames}x{height}x{width}"
    assert Bucket.parse(bucket.name) == bucket


def test_buckets_are_ordered_by_frames_height_width():
    names = ["17x256x256", "1x512x512", "17x256x320", "9x64x64", "17x128x999"]
    assert [bucket.name for bucket in sorted(map(Bucket.parse, names))] == [
        "1x512x512",
        "9x64x64",
        "17x128x999",
        "17x256x256",
        "17x256x320",
    ]


@pytest.mark.parametrize("name", ["", "17x256", "17x256x256x3", "017x256x256", "17x0x256", "17x-2x256", "17 x 2 x 2"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not frames x height x width"):
        Bucket.parse(name)


def test_a_bucket_without_pixels_cannot_be():
    with pytest.raises(ValueError, match="17x0x256"):
        Bucket(17, 0, 256)
