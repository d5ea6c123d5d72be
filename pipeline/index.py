"""The index: for every shard one parquet fragment that says where each sample lies and what its media is.

In:   ShardRefs, a Storage, and a probe that says what the video or image at a byte range is.
Out:  `index/<shard_id>.parquet`, immutable; `summarise` counts over any number of fragments.
Cost: a header read and a probe per sample, text members of at most a megabyte each; one shard in memory at a time.
Errors: ShardError for a shard that cannot be read or that changed; StoreError for a fragment that is damaged or of
      another format version. A bad sample is a row with a status, never an error.

A fragment's name holds the shard's url, size and version as a hash: an unchanged shard is never indexed twice, a
changed one gets another name. Equal input gives equal bytes (with one version of pyarrow).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from pipeline import parquet
from pipeline.decode.records import MediaInfo, MediaSource
from pipeline.errors import DecodeError, ShardError, StoreError
from pipeline.samples import Sample, SampleParts, damage_sample, describe, group, media_kind
from pipeline.shards import ShardRef, identify
from pipeline.storage import Storage, open_range
from pipeline.tarscan import TarScan, scan

Probe = Callable[[MediaSource], MediaInfo]
FORMAT_VERSION = 1
_HEADER_KEY, _DIGEST_KEY = b"latentmill.index", b"latentmill.index.blake2b"
_PREFIX = "index/"
_MAX_SUMMARY_NOTES = 20
_TEXT, _INTEGER, _REAL = pa.string(), pa.int64(), pa.float64()
# fmt: off
_MEDIA = pa.struct([
    ("kind", _TEXT), ("container", _TEXT), ("codec", _TEXT), ("width", _INTEGER), ("height", _INTEGER),
    ("rotation_degrees", _INTEGER), ("fps", _REAL), ("num_frames", _INTEGER), ("duration_seconds", _REAL),
    ("pixel_format", _TEXT), ("num_video_streams", _INTEGER), ("interlaced", pa.bool_()),
])
SCHEMA = pa.schema([
    ("key", _TEXT), ("offset", _INTEGER), ("size_bytes", _INTEGER), ("member", _TEXT), ("media", _MEDIA),
    ("status", _TEXT), ("reason", _TEXT), ("detail", _TEXT), ("caption", _TEXT), ("metadata", _TEXT),
    ("other_members", pa.list_(_TEXT)),
])
# fmt: on


@dataclasses.dataclass(frozen=True)
class MemberCounts:
    """What became of a tar's members: promised = read + other + lost.

    promised: headers, and one for each damage. read: whole members of samples. other: links, directories, files
    without a key. lost: truncated members and damages.
    """

    promised: int
    read: int
    other: int

    @property
    def lost(self) -> int:
        """Members that the tar speaks of and does not hold."""
        return self.promised - self.read - self.other


@dataclasses.dataclass(frozen=True)
class IndexFragment:
    """One shard's part of the index; samples stand in the order of their bytes."""

    shard: ShardRef
    samples: tuple[Sample, ...]
    members: MemberCounts
    notes: tuple[str, ...] = ()


def index_shard(shard: ShardRef, probe: Probe) -> IndexFragment:
    """Scan a shard, read its captions and metadata, and probe each video and image.

    Raises:
        ShardError: the shard cannot be read, is compressed, or is not the version that `shard` names.
    """
    _check_unchanged(shard)
    try:
        with open_range(shard.url) as file:
            tar = scan(file, shard.size_bytes, shard.url)
            parts = group(tar)
            texts = [_texts(file, part) for part in parts]
    except OSError as error:
        raise ShardError(f"cannot read shard {shard.url}: {error}") from error
    rows = [(damage.offset, damage_sample(damage)) for damage in tar.damages]
    for part, text in zip(parts, texts, strict=True):
        rows.append((part.position, describe(part, text, _probe(shard, part, probe))))
    _check_unchanged(shard)
    samples = tuple(sample for _, sample in sorted(rows, key=lambda row: row[0]))
    return IndexFragment(shard, samples, _count(tar, parts), _notes(tar))


def _check_unchanged(shard: ShardRef) -> None:
    now = identify(shard.url)
    if now != shard:
        raise ShardError(
            f"shard {shard.url} changed: it had {shard.size_bytes} bytes (version {shard.version}) and now has "
            f"{now.size_bytes} ({now.version}); run index again when nothing writes to it"
        )


def _texts(file: IO[bytes], parts: SampleParts) -> dict[str, bytes]:
    texts = {}
    for member in parts.text_members:
        file.seek(member.offset)
        texts[member.name] = file.read(member.size_bytes)
    return texts


def _probe(shard: ShardRef, parts: SampleParts, probe: Probe) -> MediaInfo | DecodeError | None:
    media = parts.media
    kind = media_kind(media.name) if media else None
    if parts.verdict or media is None or kind is None:
        return None
    try:
        return probe(MediaSource(shard.url, media.offset, media.size_bytes, kind, parts.key))
    except DecodeError as error:
        return error


def _count(tar: TarScan, parts: Sequence[SampleParts]) -> MemberCounts:
    read = sum(not member.truncated for part in parts for member in part.members)
    return MemberCounts(promised=tar.promised, read=read, other=tar.found - read)


def _notes(tar: TarScan) -> tuple[str, ...]:
    kinds = collections.Counter(member.kind for member in tar.other_members)
    return (*tar.notes, *(f"{count} x {kind}, not read" for kind, count in sorted(kinds.items())))


def to_parquet(fragment: IndexFragment) -> bytes:
    """The fragment as a parquet file; equal fragments give equal bytes."""
    header = {
        "version": FORMAT_VERSION,
        "shard": dataclasses.asdict(fragment.shard),
        "members": dataclasses.asdict(fragment.members),
        "num_samples": len(fragment.samples),
        "notes": fragment.notes,
    }
    text = json.dumps(header, sort_keys=True).encode()
    schema = SCHEMA.with_metadata({_HEADER_KEY: text, _DIGEST_KEY: _digest(text)})
    rows = [vars(sample) | {"media": sample.media and vars(sample.media)} for sample in fragment.samples]
    table = pa.Table.from_pylist(rows, schema=schema)
    return parquet.to_bytes(table)


def from_parquet(data: bytes, name: str) -> IndexFragment:
    """The fragment in a parquet file; `name` is for messages.

    Raises:
        StoreError: the file is damaged, is no index fragment, or has another format version.
    """
    try:
        schema, table = parquet.from_bytes(data)
        header = _header(schema.metadata or {})
        if header["version"] == FORMAT_VERSION:
            return _decode(table, header)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"index fragment {name} is damaged: {type(error).__name__} {error}; delete it and run index again"
        ) from error
    problem = f"format version {header['version']}, not {FORMAT_VERSION}"
    raise StoreError(f"index fragment {name} has {problem}: delete it and run index again")


def _header(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The file's header; parquet checks the sums of its pages, not those of its metadata."""
    if metadata[_DIGEST_KEY] != _digest(metadata[_HEADER_KEY]):
        raise ValueError("the checksum of its header differs")
    return dict(json.loads(metadata[_HEADER_KEY]))


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()


def _decode(table: pa.Table, header: dict[str, Any]) -> IndexFragment:
    if not table.schema.equals(SCHEMA) or table.num_rows != header["num_samples"]:
        raise ValueError(f"other columns, or {table.num_rows} rows where {header['num_samples']} were written")
    samples = []
    for row in table.to_pylist():
        media = row["media"] and MediaInfo(**row["media"])
        samples.append(Sample(**{**row, "media": media, "other_members": tuple(row["other_members"])}))
    members = MemberCounts(**header["members"])
    return IndexFragment(ShardRef(**header["shard"]), tuple(samples), members, tuple(header["notes"]))


def fragment_name(shard_id: str) -> str:
    """Where a shard's fragment lies in the store."""
    return f"{_PREFIX}{shard_id}.parquet"


def list_fragments(storage: Storage) -> list[str]:
    """The ids of all shards that are indexed, sorted."""
    return sorted(PurePosixPath(name).stem for name in storage.list(_PREFIX) if name.endswith(".parquet"))


def missing_fragments(storage: Storage, shards: Iterable[ShardRef]) -> list[ShardRef]:
    """The shards that are not indexed yet, in this version of theirs."""
    indexed = set(list_fragments(storage))
    return [shard for shard in shards if shard.shard_id not in indexed]


def write_fragment(storage: Storage, fragment: IndexFragment) -> bool:
    """Commit a fragment; False when one was there already, which then stays."""
    return storage.put_if_absent(fragment_name(fragment.shard.shard_id), to_parquet(fragment))


def read_fragment(storage: Storage, shard_id: str) -> IndexFragment:
    """One shard's fragment.

    Raises:
        StoreError: it is not there, is damaged, or is that of another shard.
    """
    name = fragment_name(shard_id)
    try:
        data = storage.read(name)
    except FileNotFoundError as error:
        raise StoreError(f"the store {storage.url} has no index fragment {name}: run index first") from error
    fragment = from_parquet(data, name)
    if fragment.shard.shard_id != shard_id:
        raise StoreError(f"index fragment {name} is that of shard {fragment.shard.url}: delete it and run index again")
    return fragment


@dataclasses.dataclass(frozen=True)
class IndexSummary:
    """Counts over fragments: rows by (status, reason), the media of ok rows, and the first `notes` of `num_notes`."""

    num_shards: int
    statuses: dict[tuple[str, str], int]
    members: MemberCounts
    media_bytes: int
    num_frames: int
    duration_seconds: float
    notes: tuple[str, ...]
    num_notes: int

    def lines(self) -> list[str]:
        """The summary as plain text, for people."""
        members, more = self.members, self.num_notes - len(self.notes)
        ok, filtered, failed = (
            sum(count for (status, _), count in self.statuses.items() if status == wanted)
            for wanted in ("ok", "filtered", "failed")
        )
        return [
            f"shards: {self.num_shards}",
            f"samples: {ok + filtered + failed} = {ok} ok + {filtered} filtered + {failed} failed",
            *(f"  {status} {reason}: {n}" for (status, reason), n in sorted(self.statuses.items()) if reason),
            f"members: {members.promised} promised = {members.read} read + {members.other} other + {members.lost} lost",
            f"media: {self.media_bytes / 1e9:.3f} GB, {self.num_frames} frames, {self.duration_seconds:.1f} seconds",
            *(f"note: {note}" for note in self.notes),
            *([f"note: {more} more notes"] if more else []),
        ]


def summarise(fragments: Iterable[IndexFragment]) -> IndexSummary:
    """Count over fragments, one in memory at a time."""
    statuses, totals = collections.Counter[tuple[str, str]](), collections.Counter[str]()
    duration_seconds, notes = 0.0, list[str]()
    for fragment in fragments:
        totals.update(dataclasses.asdict(fragment.members), shards=1, notes=len(fragment.notes))
        room = _MAX_SUMMARY_NOTES - len(notes)
        notes.extend(f"{fragment.shard.url}: {note}" for note in fragment.notes[:room])
        for sample in fragment.samples:
            statuses[sample.status, sample.reason] += 1
            if sample.status == "ok" and sample.media is not None:
                totals.update(media_bytes=sample.size_bytes, frames=sample.media.num_frames)
                duration_seconds += sample.media.duration_seconds
    return IndexSummary(
        num_shards=totals["shards"],
        statuses=dict(statuses),
        members=MemberCounts(totals["promised"], totals["read"], totals["other"]),
        media_bytes=totals["media_bytes"],
        num_frames=totals["frames"],
        duration_seconds=duration_seconds,
        notes=tuple(notes),
        num_notes=totals["notes"],
    )
