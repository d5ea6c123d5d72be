import dataclasses
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.synthetic import BROKEN_KINDS, FORMATS, MediaFormat, SyntheticSet, encode_media, make_sample, write_shards
from pipeline.synthetic_scenes import SCENE_KINDS, make_scene, scene_clip

NUM_SHARDS, SAMPLES_PER_SHARD = 2, 20
VIDEO_FORMATS = [media for media in FORMATS if media.fps]
IMAGE_FORMATS = [media for media in FORMATS if not media.fps]


def write(directory: Path, seed: int) -> SyntheticSet:
    return write_shards(directory, NUM_SHARDS, SAMPLES_PER_SHARD, seed, broken_share=0.125)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return write(tmp_path_factory.mktemp("synthetic") / "made" / "here", seed=7)


@pytest.fixture(scope="module")
def samples(written: SyntheticSet) -> dict[str, dict[str, bytes]]:
    grouped: dict[str, dict[str, bytes]] = {}
    for path in written.paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                grouped.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return grouped


def media_of(members: dict[str, bytes]) -> tuple[str, bytes]:
    [(extension, content)] = [(e, c) for e, c in members.items() if e not in ("json", "txt")]
    return extension, content


def decode(content: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(content)) as container:
        return list(container.decode(video=0))


def hashes(made: SyntheticSet) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in made.paths]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(written: SyntheticSet, tmp_path: Path) -> None:
    assert hashes(write(tmp_path / "again", seed=7)) == hashes(written)
    other = hashes(write(tmp_path / "other", seed=8))
    assert all(here != there for here, there in zip(other, hashes(written), strict=True))


def test_webdataset_groups_every_sample(written: SyntheticSet, samples: dict[str, dict[str, bytes]]) -> None:
    assert [path.name for path in written.paths] == ["shard-00000.tar", "shard-00001.tar"]
    read = []
    for path in written.paths:
        with path.open("rb") as stream:
            files = [file | {"__url__": str(path)} for file in tar_file_iterator(stream)]
        read += [{k: v for k, v in sample.items() if k != "__url__"} for sample in group_by_keys(files)]
    assert len(read) == written.num_samples == len(samples) == NUM_SHARDS * SAMPLES_PER_SHARD
    assert {sample.pop("__key__"): sample for sample in read} == samples


def test_the_set_holds_every_format_scene_and_kind_of_damage(
    written: SyntheticSet, samples: dict[str, dict[str, bytes]]
) -> None:
    metadata = [json.loads(members["json"]) for key, members in samples.items() if key not in written.broken]
    stored = {(entry["codec"], entry["height"], entry["width"]) for entry in metadata}
    assert stored == {(media.codec, media.height, media.width) for media in FORMATS}
    assert {entry["scene"] for entry in metadata} == set(SCENE_KINDS)
    assert sorted(written.broken.values()) == sorted(BROKEN_KINDS)
    assert all(3 <= entry["aesthetic"] <= 8 for entry in metadata)
    assert len({members["txt"] for members in samples.values()}) > 20


def test_whole_samples_decode_to_what_their_metadata_say(
    written: SyntheticSet, samples: dict[str, dict[str, bytes]]
) -> None:
    for key in samples.keys() - written.broken.keys():
        metadata = json.loads(samples[key]["json"])
        _, content = media_of(samples[key])
        size = (metadata["width"], metadata["height"])
        if not metadata["fps"]:
            assert (Image.open(io.BytesIO(content)).size, metadata["num_frames"]) == (size, 1), key
            continue
        frames = decode(content)
        coded_size = size if metadata["rotation_degrees"] == 0 else size[::-1]
        assert {(frame.width, frame.height) for frame in frames} == {coded_size}, key
        assert len(frames) == metadata["num_frames"], key


def test_broken_samples_fail_or_are_short(written: SyntheticSet, samples: dict[str, dict[str, bytes]]) -> None:
    by_kind = {kind: samples[key] for key, kind in written.broken.items()}
    assert by_kind["no_media"].keys() == {"json", "txt"}
    with pytest.raises(av.error.InvalidDataError):
        av.open(io.BytesIO(media_of(by_kind["random_bytes"])[1]))
    with av.open(io.BytesIO(media_of(by_kind["audio_only"])[1])) as container:
        assert [stream.type for stream in container.streams] == ["audio"]
    promised = json.loads(by_kind["truncated"]["json"])["num_frames"]
    for kind, least in (("truncated", 10), ("header_only", 0)):
        decoded = 0
        with av.open(io.BytesIO(media_of(by_kind[kind])[1])) as container:
            assert container.streams.video[0].frames == promised
            try:
                for _ in container.decode(video=0):
                    decoded += 1
            except av.error.InvalidDataError:
                pass
        assert least <= decoded < promised, kind


def test_no_sample_is_broken_when_none_is_asked_for(tmp_path: Path) -> None:
    assert write_shards(tmp_path, 1, 3, broken_share=0).broken == {}


@pytest.mark.parametrize("media", VIDEO_FORMATS, ids=lambda media: f"{media.codec}-{media.extension}-{media.width}")
def test_frames_show_the_scene_at_their_time(media: MediaFormat) -> None:
    scene = make_scene("camera", 3, media.height, media.width)
    frames = decode(encode_media(scene, media, 12))
    start = frames[0].time
    for frame in frames:
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        wanted = scene.paint(round((frame.time - start) * media.fps) / media.fps)
        assert np.abs(pixels.astype(int) - wanted).mean() < 6
    steps = {round((b.time - a.time) * media.fps) for a, b in itertools.pairwise(frames)}
    assert steps == set(media.tick_steps)


@pytest.mark.parametrize("media", IMAGE_FORMATS, ids=lambda media: media.extension)
def test_images_show_the_scene(media: MediaFormat) -> None:
    scene = make_scene("camera", 3, media.height, media.width)
    image = Image.open(io.BytesIO(encode_media(scene, media, 1)))
    assert image.format.lower() == media.codec
    assert np.abs(np.asarray(image, int) - scene.paint(1.0)).mean() < 6


def test_no_encoder_changes_how_its_caller_is_scheduled() -> None:
    """SVT-AV1 would, as root, and so every process that is started later."""
    before = os.sched_getscheduler(0)
    (media,) = (media for media in VIDEO_FORMATS if media.codec == "libsvtav1")
    encode_media(make_scene("camera", 3, media.height, media.width), media, 9)
    assert os.sched_getscheduler(0) == before


def test_the_rotated_format_carries_a_clockwise_matrix() -> None:
    media = next(media for media in FORMATS if media.rotation_degrees == 90)
    content = encode_media(make_scene("grain", 1, media.height, media.width), media, 2)
    matrix_at = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and duration, layer to volume
    a, b, _, c, d = struct.unpack(">5i", content[matrix_at : matrix_at + 20])
    # ISO/IEC 14496-12, 8.3.2: (x, y) is shown at (a x + c y, b x + d y), y down, 16.16 fixed point.
    assert (a, b, c, d) == (0, 1 << 16, -1 << 16, 0)


def test_formats_keep_their_promises() -> None:
    ten_bit = next(media for media in FORMATS if media.pixel_format == "yuv420p10le")
    scene = make_scene("shapes", 1, ten_bit.height, ten_bit.width)
    assert {frame.format.name for frame in decode(encode_media(scene, ten_bit, 3))} == {"yuv420p10le"}
    plain = dataclasses.replace(ten_bit, pixel_format="yuv420p")
    with av.open(io.BytesIO(encode_media(scene, plain, 9))) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert order != sorted(order), "no B-frames"


def test_a_sample_depends_on_its_index_and_seed_alone(samples: dict[str, dict[str, bytes]]) -> None:
    key, members = make_sample(16, seed=7)
    assert members == samples[key]


@pytest.mark.parametrize(
    ("num_shards", "samples_per_shard", "broken_share"), [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.5), (1, 1, -0.1)]
)
def test_impossible_sets_are_refused(
    tmp_path: Path, num_shards: int, samples_per_shard: int, broken_share: float
) -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        write_shards(tmp_path / "none", num_shards, samples_per_shard, 0, broken_share)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrong", [{"rotation_degrees": 45}, {"tick_steps": (1, 0)}])
def test_impossible_formats_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        MediaFormat("mp4", "libx264", 64, 64, 24, **wrong)


@pytest.mark.parametrize("kind", SCENE_KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_scenes_move_and_are_well_exposed(kind: str, seed: int) -> None:
    clip = scene_clip(kind, seed, 13, 72, 90)
    assert clip.shape == (13, 72, 90, 3)
    assert clip.dtype == np.uint8
    change = np.abs(np.diff(clip.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert change.min() > 0.2
    assert clip.std() > 10
    assert ((clip == 0) | (clip == 255)).mean() < 0.02
    assert 25 < clip.mean() < 230


@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_scenes_are_pure_functions_of_seed_and_time(kind: str) -> None:
    scene, same, other = (make_scene(kind, seed, 48, 64) for seed in (5, 5, 6))
    late, early = same.paint(0.7), same.paint(0.2)
    assert np.array_equal(scene.paint(0.2), early)
    assert np.array_equal(scene.paint(0.7), late)
    assert scene.caption == same.caption
    assert not np.array_equal(other.paint(0.2), early)


def test_captions_name_what_is_seen() -> None:
    scene = make_scene("shapes", 1, 144, 256)
    assert scene.caption == "a green box, an orange disc and a teal box move over a cloudy sky"


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'rain'.*shapes, text"):
        make_scene("rain", 0, 64, 64)
    with pytest.raises(ValueError, match="8 x 64"):
        make_scene("text", 0, 8, 64)
