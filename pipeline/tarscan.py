"""What a tar holds, counted: a walk over its headers that loses nothing without saying so.

In:   a seekable file of a plain tar (ustar, GNU or PAX) and its size.
Out:  a TarScan: every member with its byte range, and every stretch of bytes that could not be understood.
Cost: one small read per member; payloads are skipped. A damaged stretch is read through, a megabyte at a time, until
      the next header. Memory is a record per member, at most MAX_MEMBERS.
Errors: ShardError for a compressed file, or one with too many members. Damage is a result, not an error.

The standard library's tarfile stops in silence at a bad header or a hole of zeros, and so does every reader built on
it. Here a bad header starts a search for the next good one, at any byte. When the header of a member that is itself
a tar is lost, the search finds the members inside it: the Damage just before them tells. Two losses leave no trace in
a tar: changed bytes inside a payload, and zeros over its last 10 kB, which look like its padding.
"""

from __future__ import annotations

import dataclasses
import tarfile
from typing import IO, NamedTuple

from pipeline.errors import ShardError

MAX_MEMBERS = 1_000_000
MAX_EXTENDED_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_END_BYTES = 2 * _BLOCK
# Every tar tool pads to a record of 10240 bytes, so a whole tar ends in at most this many zeros.
_MAX_TAIL_BYTES = tarfile.RECORDSIZE - _BLOCK + _END_BYTES
_CHUNK = 1 << 20
_MAGIC_OFFSET = 257
_VERSIONS = (b"\x0000", b"  \x00")
_EXTENDED_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *(b"x", b"X", b"g"))
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.DIRTYPE: "directory",
    tarfile.FIFOTYPE: "fifo",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A regular file: `size_bytes` at `offset` by its header, of which the tar holds `found_bytes`."""

    name: str
    offset: int
    size_bytes: int
    found_bytes: int

    @property
    def truncated(self) -> bool:
        """Whether the tar ends inside this member."""
        return self.found_bytes < self.size_bytes


class OtherMember(NamedTuple):
    """A link, directory, device or the like: counted, never read."""

    name: str
    kind: str


class Damage(NamedTuple):
    """Bytes [offset, offset + size_bytes) are no part of a sound tar; members may have been lost there.

    reason: empty_file, bad_header, truncated_header, bad_extended_header, zero_hole or garbage_after_end.
    """

    offset: int
    size_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class TarScan:
    """Everything in a tar, in the order of its bytes.

    `notes` are remarks that are no damage. `cut_at` is the size of a tar that stops without its closing blocks.
    """

    members: tuple[Member, ...]
    other_members: tuple[OtherMember, ...]
    damages: tuple[Damage, ...]
    notes: tuple[str, ...] = ()
    cut_at: int | None = None

    @property
    def promised(self) -> int:
        """How many members the headers speak of; each damage stands for one that cannot be read."""
        return len(self.members) + len(self.other_members) + len(self.damages)

    @property
    def found(self) -> int:
        """How many members are there whole."""
        return sum(not member.truncated for member in self.members) + len(self.other_members)


def scan(file: IO[bytes], size_bytes: int, url: str = "the shard") -> TarScan:
    """Walk over all headers of a tar of size_bytes; `url` is for messages.

    Raises:
        ShardError: the file is compressed, or holds more than MAX_MEMBERS members.
    """
    return _Walk(file, size_bytes, url).run()


class _Extended(NamedTuple):
    """What extended headers say of the member that follows them."""

    offset: int
    name: str | None = None
    size_bytes: int | None = None
    sparse: bool = False
    broken: bool = False


class _Walk:
    """The state of one scan. Every step takes the offset of a block and gives the offset of the next."""

    def __init__(self, file: IO[bytes], size_bytes: int, url: str) -> None:
        self._file, self._size, self._url = file, size_bytes, url
        self._members: list[Member] = []
        self._others: list[OtherMember] = []
        self._damages: list[Damage] = []
        self._extended: _Extended | None = None
        self._end_bytes = 0

    def run(self) -> TarScan:
        position = 0
        while position < self._size:
            header = _parse(self._read(position, _BLOCK))
            if header is not None:
                position = self._take(header, position)
            else:
                self._refuse_compressed(position)
                position = self._resynchronise(position)
            if len(self._members) + len(self._others) > MAX_MEMBERS:
                raise ShardError(f"{self._url} holds more than {MAX_MEMBERS} members: split it into smaller shards")
        if self._extended is not None:
            self._damage(self._size, "truncated_header")
        if self._size == 0:
            self._damages.append(Damage(0, 0, "empty_file"))
        return self._result()

    def _result(self) -> TarScan:
        notes = []
        cut = self._size > 0 and self._end_bytes < _END_BYTES
        if cut:
            notes.append("no end-of-archive blocks: the tar may have been cut between two members")
        if self._size and not self._members:
            notes.append("the tar holds no files")
        cut_at = self._size if cut else None
        return TarScan(tuple(self._members), tuple(self._others), tuple(self._damages), tuple(notes), cut_at)

    def _read(self, offset: int, size_bytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(min(size_bytes, self._size - offset))

    def _refuse_compressed(self, position: int) -> None:
        start = self._read(0, 8) if position == 0 else b""
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise ShardError(
                    f"{self._url} is {name}-compressed: decompress it, byte ranges of members need a plain tar"
                )

    def _take(self, header: tarfile.TarInfo, position: int) -> int:
        if header.type in _EXTENDED_TYPES:
            return self._take_extended(header, position)
        extended, self._extended = self._extended or _Extended(position), None
        name = header.name if extended.name is None else extended.name
        size = header.size if extended.size_bytes is None else extended.size_bytes
        offset = position + _BLOCK
        has_payload = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        end = offset + (_padded(size) if has_payload else 0)
        if extended.broken:
            self._extended = extended
            self._damage(min(end, self._size), "bad_extended_header")
        elif extended.sparse or header.type == tarfile.GNUTYPE_SPARSE or not header.isreg():
            kind = "sparse file" if extended.sparse else _KINDS.get(header.type, f"type {header.type!r}")
            self._others.append(OtherMember(name, kind))
        else:
            self._members.append(Member(name, offset, size, max(0, min(size, self._size - offset))))
        return end

    def _take_extended(self, header: tarfile.TarInfo, position: int) -> int:
        end = position + _BLOCK + header.size
        if header.size > MAX_EXTENDED_BYTES:
            return self._resynchronise(position)
        before = self._extended or _Extended(position)
        if end > self._size:
            self._extended = before
            return self._size
        payload = self._read(position + _BLOCK, header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self._extended = before._replace(name=_text(payload.split(b"\0", 1)[0]))
        elif header.type in (b"x", b"X"):
            self._extended = _apply_pax(before, payload)
        return position + _BLOCK + _padded(header.size)

    def _resynchronise(self, position: int) -> int:
        """Report the bytes up to the next header, unless they are the zeros that end a tar."""
        found = self._find_header(position + 1)
        end = self._size if found is None else found
        zeros = self._leading_zeros(position, end)
        if found is None:
            self._end_bytes = zeros
            if zeros == end - position and zeros <= _MAX_TAIL_BYTES and self._extended is None:
                return end
        if self._extended is None:
            self._extended = _Extended(position)
        if found is None and _END_BYTES <= zeros < end - position:
            self._damage(end, "garbage_after_end")
        elif zeros >= _BLOCK:
            self._damage(end, "zero_hole")
        else:
            self._damage(end, "truncated_header" if found is None and end - position < _BLOCK else "bad_header")
        return end

    def _damage(self, end: int, reason: str) -> None:
        """Report everything from the pending extended header on; it belongs to a member that is lost."""
        assert self._extended is not None
        self._damages.append(Damage(self._extended.offset, end - self._extended.offset, reason))
        self._extended = None

    def _find_header(self, start: int) -> int | None:
        """The first offset at or after start with a header whose magic and checksum are right."""
        for position in range(start, self._size, _CHUNK):
            chunk = self._read(position, _CHUNK + _BLOCK)
            at = chunk.find(b"ustar", _MAGIC_OFFSET)
            while at >= 0:
                header = at - _MAGIC_OFFSET
                if chunk[at + 5 : at + 8] in _VERSIONS and _parse(chunk[header : header + _BLOCK]) is not None:
                    return position + header
                at = chunk.find(b"ustar", at + 1)
        return None

    def _leading_zeros(self, start: int, end: int) -> int:
        for position in range(start, end, _CHUNK):
            rest = self._read(position, min(_CHUNK, end - position)).lstrip(b"\0")
            if rest:
                return min(position + _CHUNK, end) - len(rest) - start
        return end - start


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block, or None when its checksum or a number in it is wrong, or it is all zeros."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def _apply_pax(before: _Extended, payload: bytes) -> _Extended:
    """Take over path and size from records of `LENGTH KEY=VALUE` and a newline; other keys mean nothing here."""
    position, extended = 0, before
    while position < len(payload):
        space = payload.find(b" ", position, position + 10)
        digits = payload[position:space]
        end = position + int(digits) if space > 0 and digits.isdigit() else -1
        key, equals, value = payload[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(payload) or not equals or payload[end - 1 : end] != b"\n":
            return before._replace(broken=True)
        if key == b"path":
            extended = extended._replace(name=_text(value))
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                return before._replace(broken=True)
            extended = extended._replace(size_bytes=int(value))
        elif key.startswith(b"GNU.sparse."):
            extended = extended._replace(sparse=True)
        position = end
    return extended


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK) * _BLOCK
