import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline import tarscan
from pipeline.errors import ShardError
from pipeline.tarscan import Damage, Member, TarScan, scan

Content = list[tuple[str, bytes]]
CONTENT: Content = [
    (f"{i:03}.{ext}", bytes([65 + i]) * size) for i in range(6) for ext, size in (("mp4", 1300), ("json", 9))
]
ENDING = 2 * tarfile.BLOCKSIZE


def pack(content: Content, tar_format: int = tarfile.USTAR_FORMAT, **options: object) -> bytes:
    """A tar without the padding after its two closing blocks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, **options) as tar:  # type: ignore[call-overload]
        for name, payload in content:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        end = tar.offset
    return buffer.getvalue()[: end + ENDING]


def run(tar: bytes) -> TarScan:
    return scan(io.BytesIO(tar), len(tar), "x.tar")


def payloads(tar: bytes, members: tuple[Member, ...]) -> Content:
    return [(member.name, tar[member.offset : member.offset + member.size_bytes]) for member in members]


TAR = pack(CONTENT)
MEMBERS = run(TAR).members
HEADERS = [member.offset - 512 for member in MEMBERS]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_is_read_whole(tar_format: int, padded: bool) -> None:
    long = [("d/" * 90 + "long-name.mp4", b"1"), ("ü" * 120 + ".mp4", b"22"), ("000.txt", b"")]
    content = CONTENT + ([] if tar_format == tarfile.USTAR_FORMAT else long)
    tar = pack(content, tar_format) + bytes(9000 if padded else 0)
    result = run(tar)
    assert payloads(tar, result.members) == content
    assert result.promised == result.found == len(content)
    assert result.damages == result.notes == ()


def test_a_ustar_prefix_is_part_of_the_name() -> None:
    name = "directory/" * 12 + "a.mp4"
    assert run(pack([(name, b"1")])).members[0].name == name


def test_pax_and_base_256_sizes() -> None:
    huge = 9 * 2**30
    info = tarfile.TarInfo("a.mp4")
    info.size = huge
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        header = info.tobuf(tar_format)
        member = run(header + b"only this").members[0]
        assert (member.size_bytes, member.found_bytes, member.offset) == (huge, 9, len(header))
        assert member.truncated


def test_negative_base_256_size_is_a_bad_header() -> None:
    block = bytearray(tarfile.TarInfo("a.mp4").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert run(bytes(block) + TAR).damages == (Damage(0, 512, "bad_header"),)


def test_links_directories_and_devices_are_counted_as_others() -> None:
    buffer = io.BytesIO()
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.mp4")
            info.type, info.linkname = kind, "/etc/passwd" * 20
            tar.addfile(info)
    result = run(buffer.getvalue() + b"")
    found = [(member.name.rstrip("/"), member.kind) for member in result.other_members]
    expected = ["symbolic link", "hard link", "directory", "character device", "fifo"]
    assert found == [(f"{number}.mp4", kind) for number, kind in enumerate(expected)]
    assert result.members == result.damages == ()
    assert result.notes == ("the tar holds no files",)


def test_sparse_and_unknown_types_are_others_and_their_payload_is_skipped() -> None:
    blocks = b""
    for name, kind in (("s.mp4", tarfile.GNUTYPE_SPARSE), ("q.mp4", b"Q")):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 700
        blocks += info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    pax = tarfile.TarInfo("p.mp4")
    pax.pax_headers = {"GNU.sparse.major": "1"}
    result = run(blocks + pax.tobuf(tarfile.PAX_FORMAT) + TAR)
    assert [(m.name, m.kind) for m in result.other_members] == [
        ("s.mp4", "sparse file"),
        ("q.mp4", "type b'Q'"),
        ("p.mp4", "sparse file"),
    ]
    assert [member.name for member in result.members] == [name for name, _ in CONTENT]
    assert result.damages == ()


def test_names_that_are_not_utf8_stay_readable_text() -> None:
    tar = pack([("a.mp4", b"1")]).replace(b"a.mp4", b"\xff.mp4", 1)
    block = bytearray(tar)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert run(bytes(block)).members[0].name == "\\xff.mp4"


@pytest.mark.parametrize("header", HEADERS)
def test_a_damaged_header_costs_its_own_member_only(header: int) -> None:
    tar = bytearray(TAR)
    tar[header + 3] ^= 1
    result = run(bytes(tar))
    lost = HEADERS.index(header)
    assert payloads(TAR, result.members) == CONTENT[:lost] + CONTENT[lost + 1 :]
    end = HEADERS[lost + 1] if lost + 1 < len(HEADERS) else len(TAR)
    assert result.damages == (Damage(header, end - header, "bad_header"),)
    assert (result.promised, result.found) == (len(CONTENT), len(CONTENT) - 1)


@pytest.mark.parametrize("first", [0, 1, 4, 7])
@pytest.mark.parametrize("count", [1, 3])
def test_a_hole_of_zeros_is_reported_and_crossed(first: int, count: int) -> None:
    start, end = HEADERS[first], HEADERS[first + count]
    result = run(TAR[:start] + bytes(end - start) + TAR[end:])
    assert payloads(TAR, result.members) == CONTENT[:first] + CONTENT[first + count :]
    assert result.damages == (Damage(start, end - start, "zero_hole"),)


def test_a_long_hole_up_to_the_end_is_damage_and_record_padding_is_not() -> None:
    assert run(TAR + bytes(10752 - ENDING)).damages == ()
    assert run(TAR + bytes(10753 - ENDING)).damages == (Damage(len(TAR) - ENDING, 10753, "zero_hole"),)


def test_concatenated_tars_are_both_read() -> None:
    result = run(TAR + TAR)
    assert payloads(TAR + TAR, result.members) == CONTENT * 2
    assert result.damages == (Damage(len(TAR) - ENDING, ENDING, "zero_hole"),)


def test_garbage_after_the_end() -> None:
    result = run(TAR + b"<html>")
    assert result.damages == (Damage(len(TAR) - ENDING, ENDING + 6, "garbage_after_end"),)
    assert (result.notes, result.cut_at) == ((), None)


@pytest.mark.parametrize("missing", [1, 512, 513, ENDING])
def test_a_whole_tar_without_its_closing_blocks_has_a_note_only(missing: int) -> None:
    result = run(TAR[:-missing])
    assert payloads(TAR, result.members) == CONTENT
    assert result.damages == ()
    assert result.notes == ("no end-of-archive blocks: the tar may have been cut between two members",)
    assert result.cut_at == len(TAR) - missing


@pytest.mark.parametrize("removed", [1, 100, 600])
def test_bytes_missing_inside_a_payload_shift_the_rest_by_any_amount(removed: int) -> None:
    start = MEMBERS[2].offset + 5
    result = run(TAR[:start] + TAR[start + removed :])
    assert [member.name for member in result.members[-8:]] == [name for name, _ in CONTENT[-8:]]
    assert result.damages


@pytest.mark.parametrize("pattern", [b"", b"\0" * 3, b"no tar at all", b"x" * 5000])
def test_a_file_that_is_no_tar(pattern: bytes) -> None:
    result = run(pattern)
    assert result.members == ()
    assert result.notes or result.damages[0][:2] == (0, len(pattern))
    assert (result.damages == (Damage(0, 0, "empty_file"),)) == (not pattern)


@pytest.mark.parametrize(
    "compressed",
    [gzip.compress(TAR), bz2.compress(TAR), lzma.compress(TAR), b"\x28\xb5\x2f\xfd" + TAR],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
def test_compressed_tars_are_refused(compressed: bytes) -> None:
    with pytest.raises(ShardError, match=r"x\.tar is (gzip|bzip2|xz|zstd)-compressed: decompress"):
        run(compressed)


def test_a_member_may_be_called_like_a_magic_number() -> None:
    assert run(pack([("BZh91.mp4", b"1")])).members[0].name == "BZh91.mp4"


def test_long_name_cut_or_orphaned() -> None:
    gnu = pack([("n" * 150 + ".mp4", b"1")], tarfile.GNU_FORMAT)
    assert run(gnu[:600]).damages == (Damage(0, 600, "truncated_header"),)
    assert run(gnu[:1024]).damages == (Damage(0, 1024, "truncated_header"),)
    assert run(gnu[:1024] + bytes(1024)).damages == (Damage(0, 2048, "zero_hole"),)
    damaged = bytearray(gnu)
    damaged[1030] ^= 1
    result = run(bytes(damaged) + TAR)
    assert result.damages == (Damage(0, len(gnu), "bad_header"),)
    assert payloads(bytes(damaged) + TAR, result.members) == CONTENT


@pytest.mark.parametrize(
    "record",
    [b"99 path=x\n", b"path=x\n", b"9 path=xy", b"10 size=-1\n", b"8 pathx\n", b"0 path=x\n", b"11 size=1e3\n"],
)
def test_a_damaged_pax_header_takes_its_member_with_it(record: bytes) -> None:
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    extended = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    result = run(extended + TAR)
    assert result.damages == (Damage(0, MEMBERS[1].offset + 512, "bad_extended_header"),)
    assert payloads(extended + TAR, result.members) == CONTENT[1:]


def test_an_absurd_extended_header_is_not_read() -> None:
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, tarscan.MAX_EXTENDED_BYTES + 1
    assert run(info.tobuf(tarfile.USTAR_FORMAT) + TAR).damages == (Damage(0, 512, "bad_header"),)


def test_global_pax_headers_are_skipped() -> None:
    tar = pack(CONTENT, tarfile.PAX_FORMAT, pax_headers={"comment": "git"})
    assert payloads(tar, run(tar).members) == CONTENT
    assert run(tar).damages == ()


def test_too_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarscan, "MAX_MEMBERS", len(CONTENT) - 1)
    with pytest.raises(ShardError, match="split"):
        run(TAR)


def test_the_next_header_is_found_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (512, 513, 700, 1024):
        monkeypatch.setattr(tarscan, "_CHUNK", chunk)
        for junk in (b"ustar" * 300, b"\x01" * 1234, b"\0" * 1111 + b"ustar\x0000"):
            result = run(TAR[:-ENDING] + junk + TAR)
            assert [member.name for member in result.members] == [name for name, _ in CONTENT * 2]
            assert result.damages[0][:2] == (len(TAR) - ENDING, len(junk))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(TAR) - 1))
@example(HEADERS[3])
@example(MEMBERS[3].offset + 9)
@example(len(TAR) - ENDING)
def test_cut_anywhere(end: int) -> None:
    """What lies before the cut is found as it was; what the cut hit is reported."""
    result = run(TAR[:end])
    whole = [member for member in MEMBERS if member.offset + member.size_bytes <= end]
    assert [member for member in result.members if not member.truncated] == whole
    begun = [header for header in HEADERS if header < end][len(whole) :]
    reported = [member for member in result.members if member.truncated]
    assert len(begun) == len(reported) + len(result.damages) - (end == 0)
    assert all(member.found_bytes == end - member.offset for member in reported)
    assert result.notes or result.damages


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(TAR) - 1), st.integers(1, 255))
def test_flip_anywhere(position: int, mask: int) -> None:
    """A flipped byte costs at most the member whose header it hit, and then the damage covers that byte."""
    tar = bytearray(TAR)
    tar[position] ^= mask
    result = run(bytes(tar))
    hit = [member for member, header in zip(MEMBERS, HEADERS, strict=True) if header <= position < member.offset]
    if result.members != MEMBERS:
        assert result.members == tuple(member for member in MEMBERS if member not in hit)
        assert any(start <= position < start + size for start, size, _ in result.damages)
    assert result.damages or result.members == MEMBERS


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, len(TAR)))
def test_any_bytes_anywhere_never_raise(junk: bytes, position: int) -> None:
    assume(position or not junk.startswith(tuple(tarscan._COMPRESSED)))
    result = run(TAR[:position] + junk + TAR[position:])
    before = [member for member in MEMBERS if member.offset + member.size_bytes <= position]
    assert list(result.members[: len(before)]) == before
    assert all(member.found_bytes >= 0 for member in result.members)
