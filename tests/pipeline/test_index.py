import dataclasses
import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import index
from pipeline.decode.records import MediaInfo, MediaSource
from pipeline.errors import DecodeError, ShardError, StoreError
from pipeline.index import IndexFragment, MemberCounts, index_shard, summarise
from pipeline.samples import Sample
from pipeline.shards import expand, identify
from pipeline.storage import LocalStorage

CONTENT = [
    member
    for number in range(5)
    for member in (
        (f"k{number}.mp4", bytes([65 + number]) * 1500),
        (f"k{number}.json", b'{"n": %d}' % number),
        (f"k{number}.txt", b"caption %d" % number),
    )
]


def pack(content: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in content:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


TAR = pack(CONTENT)


def probe(source: MediaSource) -> MediaInfo:
    """A stand-in for the decoder: media are runs of one capital letter."""
    with Path(source.path).open("rb") as file:
        file.seek(source.offset)
        payload = file.read(source.size_bytes)
    if len(set(payload)) != 1:
        raise DecodeError("not_decodable", f"{source.key} has {len(set(payload))} letters")
    return MediaInfo(source.kind, "fake", "letters", 8, 6, 0, 10.0, len(payload), len(payload) / 10, chr(payload[0]), 1)


@pytest.fixture
def shard_path(tmp_path: Path) -> Path:
    path = tmp_path / "train-000.tar"
    path.write_bytes(TAR)
    return path


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


def run(path: Path, data: bytes | None = None) -> IndexFragment:
    if data is not None:
        path.write_bytes(data)
    return index_shard(identify(str(path)), probe)


def test_a_whole_shard(shard_path: Path) -> None:
    fragment = run(shard_path)
    assert fragment.shard == identify(str(shard_path))
    assert fragment.members == MemberCounts(promised=15, read=15, other=0)
    assert fragment.notes == ()
    assert [(s.key, s.status, s.caption, s.metadata) for s in fragment.samples] == [
        (f"k{n}", "ok", f"caption {n}", f'{{"n": {n}}}') for n in range(5)
    ]
    offsets = [sample.offset for sample in fragment.samples]
    assert [TAR[offset : offset + 1500] for offset in offsets] == [payload for _, payload in CONTENT[::3]]
    assert [sample.media.pixel_format for sample in fragment.samples if sample.media] == list("ABCDE")


def test_a_media_member_that_cannot_be_decoded_fails_alone(shard_path: Path) -> None:
    fragment = run(shard_path, TAR.replace(b"C" * 100, b"C" * 99 + b"x", 1))
    assert [(s.key, s.reason) for s in fragment.samples if s.status != "ok"] == [("k2", "not_decodable")]
    assert fragment.samples[2].detail == "k2 has 2 letters"


def test_damage_stands_in_the_order_of_bytes_and_in_the_counts(shard_path: Path) -> None:
    header = TAR.index(b"k2.mp4")
    fragment = run(shard_path, TAR[:header] + b"X" + TAR[header + 1 :])
    rows = [(sample.key, sample.reason) for sample in fragment.samples]
    assert rows == [("k0", ""), ("k1", ""), ("", "tar_damaged"), ("k2", "tar_damaged"), ("k3", ""), ("k4", "")]
    assert fragment.members == MemberCounts(promised=15, read=14, other=0)
    assert fragment.members.lost == 1
    assert "members may be missing" in fragment.samples[1].detail


def test_members_without_a_sample_are_counted(tmp_path: Path) -> None:
    data = io.BytesIO(pack([("README", b"x"), (".hidden.mp4", b"x"), *CONTENT]))
    with tarfile.open(fileobj=data, mode="a") as tar:
        link = tarfile.TarInfo("k9.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    fragment = run(tmp_path / "x.tar", data.getvalue())
    assert fragment.members == MemberCounts(promised=18, read=15, other=3)
    assert fragment.notes == ("1 x symbolic link, not read",)
    assert {sample.key for sample in fragment.samples} == {f"k{n}" for n in range(5)}


@pytest.mark.parametrize("member", [1, 5, 9, 14])
@pytest.mark.parametrize("keep_bytes", [-512, -100, 0, 3])
def test_a_cut_tar_reports_what_it_lost(shard_path: Path, member: int, keep_bytes: int) -> None:
    name, _ = CONTENT[member]
    end = TAR.index(name.encode()) + 512 + keep_bytes
    fragment = run(shard_path, TAR[:end])
    assert [s.key for s in fragment.samples if s.status == "ok" and not s.detail][:2] == ["k0", "k1"][: member // 3]
    assert any("cut" in note for note in fragment.notes)
    assert (fragment.members.lost == 1) == (keep_bytes != -512)
    text = "\n".join(sample.reason + sample.detail for sample in fragment.samples)
    assert ("truncated" in text) == (keep_bytes != -512)


def test_a_shard_that_changed_is_refused(shard_path: Path) -> None:
    shard = identify(str(shard_path))
    os.utime(shard_path, ns=(1, 1))
    with pytest.raises(ShardError, match=r"train-000\.tar changed"):
        index_shard(shard, lambda source: pytest.fail(f"probed {source}"))

    def meddle(source: MediaSource) -> MediaInfo:
        shard_path.write_bytes(TAR + TAR)
        return probe(source)

    with pytest.raises(ShardError, match="changed"):
        index_shard(identify(str(shard_path)), meddle)


def test_a_missing_shard_and_a_compressed_one_are_shard_errors(shard_path: Path) -> None:
    shard = identify(str(shard_path))
    shard_path.write_bytes(b"\x1f\x8b" + TAR)
    with pytest.raises(ShardError, match="gzip"):
        run(shard_path)
    shard_path.unlink()
    with pytest.raises(ShardError, match="cannot read"):
        index_shard(shard, probe)


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.tar"


def alter(data: bytes, kind: str, position: int, amount: int) -> bytes:
    """One accident. A hole ends before the last header: zeros up to the end look like the padding of every tar."""
    tail = data[position:]
    hole = max(0, min(amount, LAST - position))
    return (
        data[:position]
        + {
            "cut": b"",
            "flip": bytes([tail[0] ^ (1 + amount % 255)]) + tail[1:],
            "zero": bytes(hole) + tail[hole:],
            "insert": b"\x07" * amount + tail,
        }[kind]
    )


LAST = TAR.index(b"k4.txt")
END = LAST + 1024
KINDS = st.sampled_from(["cut", "flip", "zero", "insert"])


@settings(max_examples=200, deadline=None)
@given(KINDS, st.integers(0, END - 1), st.integers(1, 4000))
def test_whatever_happens_to_a_tar_every_sample_is_intact_or_reported(
    fuzz_path: Path, kind: str, position: int, amount: int
) -> None:
    """The fake decoder sees changed payloads; a changed text inside its payload is beyond what a tar can tell."""
    altered = alter(TAR, kind, position, amount)
    fragment = run(fuzz_path, altered)
    reported = bool(fragment.notes or fragment.members.lost) or any(s.status != "ok" for s in fragment.samples)
    intact = {s.key: s for s in fragment.samples if s.status == "ok"}
    for number in range(5):
        sample = intact.get(f"k{number}")
        assert sample or reported
        if sample:
            payload = altered[sample.offset : sample.offset + sample.size_bytes]
            assert payload == CONTENT[3 * number][1] or (reported or len(set(payload)) == 1)
            assert sample.caption or sample.detail
    assert fragment.members.promised == fragment.members.read + fragment.members.other + fragment.members.lost
    lost_rows = sum(s.reason == "tar_damaged" and not s.key for s in fragment.samples)
    truncated = sum("truncated_member" in s.detail + s.reason for s in fragment.samples)
    assert fragment.members.lost == lost_rows + truncated
    assert index.from_parquet(index.to_parquet(fragment), "x") == fragment


def test_parquet_keeps_everything_and_is_deterministic(tmp_path: Path) -> None:
    content = [*CONTENT, ("k0.mp4", b"A"), ("n.json", b'{"\xc3\xbc": 1}'), ("k1.jpg", b"B"), ("../../e.mp4", b"E")]
    fragment = run(tmp_path / "x.tar", pack(content) + b"junk")
    data = index.to_parquet(fragment)
    assert data == index.to_parquet(dataclasses.replace(fragment))
    assert index.from_parquet(data, "x") == fragment
    assert {s.status for s in fragment.samples} == {"ok", "filtered", "failed"}
    assert pq.read_table(pa.BufferReader(data), columns=["key"]).num_rows == len(fragment.samples) == 9


def test_a_fragment_without_samples(tmp_path: Path) -> None:
    fragment = run(tmp_path / "x.tar", pack([]))
    assert fragment.samples == ()
    assert index.from_parquet(index.to_parquet(fragment), "x") == fragment
    assert fragment.notes == ("the tar holds no files",)


def test_damaged_fragments_are_store_errors_that_name_them(shard_path: Path) -> None:
    data = index.to_parquet(run(shard_path))
    table = pq.read_table(pa.BufferReader(data))
    metadata = dict(table.schema.metadata)
    edited = {key: value.replace(b'"read": 15', b'"read": 14') for key, value in metadata.items()}
    tables = [
        table.replace_schema_metadata(None),
        table.replace_schema_metadata(edited),
        table.slice(1),
        table.drop_columns(["status"]),
    ]
    damaged = [b"", data[:-1], data[: len(data) // 2], b"\0" * len(data)]
    for other in tables:
        sink = pa.BufferOutputStream()
        pq.write_table(other, sink)
        damaged.append(bytes(sink.getvalue()))
    num_surely = len(damaged)
    damaged += [data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] for at in range(4, len(data), 37)]
    for broken in damaged:
        try:
            same = index.from_parquet(broken, "index/x.parquet")
        except StoreError as error:
            assert "index/x.parquet" in str(error)  # noqa: PT017
            assert "delete it and run index again" in str(error)  # noqa: PT017
        else:
            assert same == index.from_parquet(data, "")
    for broken in damaged[:num_surely]:
        with pytest.raises(StoreError, match="damaged"):
            index.from_parquet(broken, "index/x.parquet")


def test_another_format_version_is_refused(shard_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragment = run(shard_path)
    with monkeypatch.context() as patch:
        patch.setattr(index, "FORMAT_VERSION", 99)
        data = index.to_parquet(fragment)
    with pytest.raises(StoreError, match=r"index/x\.parquet has format version 99, not 1: delete"):
        index.from_parquet(data, "index/x.parquet")


def test_each_version_of_a_shard_is_indexed_once(tmp_path: Path, shard_path: Path, storage: LocalStorage) -> None:
    other = tmp_path / "train-001.tar"
    other.write_bytes(pack(CONTENT[:3]))

    def build() -> list[index.ShardRef]:
        shards = [identify(url) for url in expand([f"{tmp_path}/train-{{000..001}}.tar"])]
        missing = index.missing_fragments(storage, shards)
        for shard in missing:
            assert index.write_fragment(storage, index_shard(shard, probe))
        return missing

    first = build()
    assert [shard.url for shard in first] == [str(shard_path), str(other)]
    assert build() == []
    other.write_bytes(pack(CONTENT[:6]))
    assert build() == [identify(str(other))]
    ids = index.list_fragments(storage)
    assert ids == sorted({shard.shard_id for shard in (*first, identify(str(other)))})
    assert storage.list("index/") == [f"index/{shard_id}.parquet" for shard_id in ids]
    assert index.read_fragment(storage, first[0].shard_id) == index_shard(first[0], probe)


def test_a_fragment_is_written_once(shard_path: Path, storage: LocalStorage) -> None:
    fragment = run(shard_path)
    assert index.write_fragment(storage, fragment)
    assert not index.write_fragment(storage, dataclasses.replace(fragment, notes=("later",)))
    assert index.read_fragment(storage, fragment.shard.shard_id).notes == ()


def test_a_fragment_that_is_missing_or_that_of_another_shard(shard_path: Path, storage: LocalStorage) -> None:
    with pytest.raises(StoreError, match=r"nothing-0.*run index first"):
        index.read_fragment(storage, "nothing-0")
    storage.put(index.fragment_name("nothing-0"), index.to_parquet(run(shard_path)))
    with pytest.raises(StoreError, match=r"that of shard .*train-000\.tar"):
        index.read_fragment(storage, "nothing-0")


def test_summary(shard_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(shard_path)
    cut = run(shard_path, TAR[: TAR.index(b"k2.mp4") + 600])
    odd = dataclasses.replace(
        whole, samples=(Sample("x", status="filtered", reason="no_video_or_image"),), notes=("a", "b", "c")
    )
    monkeypatch.setattr(index, "_MAX_SUMMARY_NOTES", 2)
    summary = summarise([whole, cut, odd])
    assert summary.statuses == {
        ("ok", ""): 7,
        ("failed", "truncated_member"): 1,
        ("filtered", "no_video_or_image"): 1,
    }
    url = whole.shard.url
    assert summary.lines() == [
        "shards: 3",
        "samples: 9 = 7 ok + 1 filtered + 1 failed",
        "  failed truncated_member: 1",
        "  filtered no_video_or_image: 1",
        "members: 37 promised = 36 read + 0 other + 1 lost",
        "media: 0.000 GB, 10500 frames, 1050.0 seconds",
        f"note: {url}: no end-of-archive blocks: the tar may have been cut between two members",
        f"note: {url}: a",
        "note: 2 more notes",
    ]


def test_real_shards() -> None:
    folder = Path(os.environ.get("LATENTMILL_DATA", Path(__file__).parents[2] / "../shared/data")) / "shards"
    if not folder.is_dir():
        pytest.skip(f"no real shards in {folder}")

    def count_bytes(source: MediaSource) -> MediaInfo:
        return MediaInfo(source.kind, "any", "any", 8, 6, 0, 10.0, source.size_bytes, 1.0, "any", 1)

    for url in expand([f"{folder}/real-*.tar"]):
        fragment = index_shard(identify(url), count_bytes)
        with tarfile.open(url) as tar:
            sizes = {info.name: (info.offset_data, info.size) for info in tar}
        assert fragment.members == MemberCounts(len(sizes), len(sizes), 0)
        ok = [sample for sample in fragment.samples if sample.status == "ok"]
        assert all((sample.offset, sample.size_bytes) == sizes[sample.member] for sample in ok)
        assert all(sample.caption and "source" in sample.metadata for sample in ok)
        assert [sample.reason for sample in fragment.samples[len(ok) :]] == ["no_video_or_image"]
