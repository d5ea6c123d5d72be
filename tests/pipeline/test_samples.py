import dataclasses
import json

import pytest

from pipeline.decode.records import MediaInfo
from pipeline.errors import DecodeError
from pipeline.samples import (
    MAX_TEXT_BYTES,
    Sample,
    SampleParts,
    damage_sample,
    describe,
    group,
    media_kind,
    split_name,
)
from pipeline.tarscan import Damage, Member, TarScan

INFO = MediaInfo("video", "mp4", "h264", 64, 48, 0, 30.0, 90, 3.0, "yuv420p", 1)


def tar(*names: str, damages: tuple[Damage, ...] = ()) -> TarScan:
    """Members of 10 bytes, one every 1000 bytes; `name!` is truncated."""
    members = (
        Member(name.rstrip("!"), 1000 * number + 512, 10, 4 if name.endswith("!") else 10)
        for number, name in enumerate(names)
    )
    return TarScan(tuple(members), (), damages)


def names(parts: list[SampleParts]) -> list[tuple[str, list[str]]]:
    return [(part.key, [member.name for member in part.members]) for part in parts]


def row(*members: str, texts: dict[str, bytes] | None = None) -> Sample:
    (part,) = group(tar(*members))
    return describe(part, texts or {}, None if part.verdict else INFO)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.mp4", ("a", "mp4")),
        ("d.1/e.2/a.left.MP4", ("d.1/e.2/a", "left.mp4")),
        ("./a.json", ("./a", "json")),
        ("../../etc/passwd.mp4", ("../../etc/passwd", "mp4")),
        ("/root/a.mp4", ("/root/a", "mp4")),
        ("a b\n.mp4", ("a b\n", "mp4")),
        ("README", None),
        ("d/.hidden", None),
        ("._a.mp4", None),
        ("a.", None),
        ("d.x/", None),
        ("", None),
    ],
)
def test_keys_follow_the_webdataset_rule_and_stay_verbatim(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


def test_the_key_rule_agrees_with_webdataset_where_both_take_a_name() -> None:
    import re

    rule = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset.tariterators.base_plus_ext
    for name in ("a.mp4", "a.b.c", "d.e/f.g.h", "./x.y", "../k.txt", "no", "d/no", "/r/a.b"):
        match = rule.match(name)
        assert split_name(name) == (match.groups() if match else None)


def test_media_kinds() -> None:
    assert media_kind("a.MKV") == "video"
    assert media_kind("a.left.jpg") == "image"
    assert media_kind("a.mp4.json") is None
    assert media_kind(".mp4") is None


def test_interleaved_members_are_one_sample_in_order_of_their_media() -> None:
    parts = group(tar("a.json", "b.mp4", "README", "a.mp4", "b.json"))
    assert names(parts) == [("b", ["b.mp4", "b.json"]), ("a", ["a.json", "a.mp4"])]


def test_a_repeated_member_starts_a_failed_sample_and_the_first_stays() -> None:
    parts = group(tar("a.mp4", "a.txt", "a.MP4", "a.txt", "a.mp4", "b.mp4"))
    assert names(parts) == [
        ("a", ["a.mp4", "a.txt"]),
        ("a", ["a.MP4", "a.txt"]),
        ("a", ["a.mp4"]),
        ("b", ["b.mp4"]),
    ]
    assert [part.verdict and part.verdict[:2] for part in parts] == [
        None,
        ("failed", "duplicate_key"),
        ("failed", "duplicate_key"),
        None,
    ]


def test_video_goes_before_image_and_the_other_media_are_listed() -> None:
    sample = row("a.jpg", "a.0.mp4", "a.1.mp4", "a.npy", "a.txt", "a.json")
    assert (sample.status, sample.member, sample.offset, sample.size_bytes) == ("ok", "a.0.mp4", 1512, 10)
    assert sample.other_members == ("a.jpg", "a.1.mp4", "a.npy")
    assert sample.media == INFO


@pytest.mark.parametrize(
    ("members", "status", "reason"),
    [
        (("a.png",), "ok", ""),
        (("a.json", "a.txt"), "filtered", "no_video_or_image"),
        (("a.json", "a.mp4!"), "failed", "truncated_member"),
        (("a.mp4", "a.json!"), "ok", ""),
    ],
)
def test_every_sample_gets_a_verdict(members: tuple[str, ...], status: str, reason: str) -> None:
    sample = row(*members)
    assert (sample.status, sample.reason) == (status, reason)
    assert ("holds 4 of 10 bytes" in sample.detail) == ("!" in "".join(members))
    assert (sample.media is not None) == (status == "ok")


def test_a_probe_that_fails_fails_its_sample() -> None:
    (part,) = group(tar("a.mp4", "a.txt"))
    sample = describe(part, {"a.txt": b"hello"}, DecodeError("no_video_stream", "only audio"))
    assert (sample.status, sample.reason, sample.detail) == ("failed", "no_video_stream", "only audio")
    assert (sample.caption, sample.media) == ("hello", None)


def test_samples_next_to_damage_say_so() -> None:
    """The damage took b.mp4, or perhaps a.txt: neither neighbour can be called complete."""
    parts = group(tar("a.mp4", "b.json", "c.mp4", damages=(Damage(1200, 300, "bad_header"),)))
    rows = [describe(part, {}, None if part.verdict else INFO) for part in parts]
    assert [(sample.key, sample.status, sample.reason) for sample in rows] == [
        ("a", "ok", ""),
        ("b", "failed", "tar_damaged"),
        ("c", "ok", ""),
    ]
    assert ["300 damaged bytes at offset 1200" in sample.detail for sample in rows] == [True, True, False]


def test_the_last_sample_of_a_tar_without_an_end_says_so() -> None:
    first, last = group(dataclasses.replace(tar("a.mp4", "b.mp4"), cut_at=2048))
    assert describe(first, {}, INFO).detail == ""
    assert describe(last, {}, INFO).detail == "next to 0 damaged bytes at offset 2048: members may be missing"


def test_damage_has_a_row_of_its_own() -> None:
    sample = damage_sample(Damage(1200, 300, "zero_hole"))
    assert (sample.key, sample.status, sample.reason) == ("", "failed", "tar_damaged")
    assert sample.detail == "zero_hole: 300 bytes at offset 1200"


@pytest.mark.parametrize(
    ("text", "document", "caption"),
    [
        (b"\xef\xbb\xbf from txt \n", {"caption": "from json"}, "from txt"),
        (None, {"caption": "from json", "text": "no"}, "from json"),
        (b" \n", {"text": "from text"}, "from text"),
        (None, {"caption": ["a", "list"]}, ""),
        (None, {"caption": "half \ud800 pair"}, "half ? pair"),
    ],
)
def test_captions(text: bytes | None, document: dict[str, object], caption: str) -> None:
    texts = {"a.json": json.dumps(document).encode()} | ({"a.txt": text} if text is not None else {})
    sample = row("a.mp4", "a.json", "a.txt", texts=texts)
    assert sample.caption == caption
    assert sample.detail == ""


def test_the_plain_txt_member_is_the_caption() -> None:
    sample = row("a.ocr.txt", "a.txt", "a.mp4", texts={"a.txt": b"this", "a.ocr.txt": b"not this"})
    assert sample.caption == "this"
    assert sample.other_members == ("a.ocr.txt",)


def test_metadata_is_merged_and_canonical() -> None:
    texts = {"a.json": b'{"b": 1, "a": NaN}', "a.more.json": b'{"c": "\xc3\xbc", "b": 2}'}
    sample = row("a.mp4", "a.json", "a.more.json", texts=texts)
    assert sample.metadata == '{"a": null, "b": 2, "c": "\\u00fc"}'


@pytest.mark.parametrize(
    "document", [b"{", b"[1]", b"\xff{}", b'{"a": 1e999}', b"[" * 100_000, b"1" * 5000, b""], ids=range(7)
)
def test_bad_json_is_noted_and_does_not_fail_the_sample(document: bytes) -> None:
    sample = row("a.mp4", "a.json", "a.b.json", texts={"a.json": document, "a.b.json": b'{"caption": "c"}'})
    assert sample.status == "ok"
    assert sample.detail.startswith("json_error: a.json: ")
    assert (sample.metadata, sample.caption) == ('{"caption": "c"}', "c")


def test_bad_utf8_in_a_caption_is_noted() -> None:
    sample = row("a.mp4", "a.txt", texts={"a.txt": b"caf\xe9"})
    assert sample.caption == "caf\N{REPLACEMENT CHARACTER}"
    assert sample.detail.startswith("text_error: a.txt: ")


def test_only_whole_and_small_texts_are_wanted() -> None:
    (part,) = group(tar("a.mp4", "a.txt!", "a.json", "a.2.json"))
    big = dataclasses.replace(part.members[3], size_bytes=MAX_TEXT_BYTES + 1, found_bytes=MAX_TEXT_BYTES + 1)
    part = dataclasses.replace(part, members=(*part.members[:3], big))
    assert [member.name for member in part.text_members] == ["a.json"]
    detail = describe(part, {"a.json": b"{}"}, INFO).detail
    assert "truncated_member: a.txt" in detail
    assert "text_too_large: a.2.json" in detail


@pytest.mark.parametrize(
    "fields",
    [{}, {"media": INFO, "reason": "x"}, {"status": "failed"}, {"status": "odd", "reason": "x"}],
    ids=["ok without media", "ok with reason", "failed without reason", "unknown status"],
)
def test_a_sample_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sample"):
        Sample(key="a", **fields)  # type: ignore[arg-type]
