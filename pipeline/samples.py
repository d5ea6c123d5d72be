"""From tar members to samples, by WebDataset's key rule; every sample ends up ok, filtered or failed.

In:   a TarScan, and the bytes of the small text members.
Out:  SampleParts (which members belong together) and Samples, the rows of the index.
Cost: pure; memory in proportion to the members of one shard.
Errors: ValueError from a Sample that cannot be. What is wrong with a sample is in its status, reason and detail.

Keys come from the tar and are kept verbatim, `../` included: they are identifiers, and no path is ever made of one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pipeline.decode.records import MediaInfo, MediaKind
from pipeline.errors import DecodeError
from pipeline.tarscan import Damage, Member, TarScan

Status = Literal["ok", "filtered", "failed"]
# fmt: off
VIDEO_EXTENSIONS = frozenset((
    "mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mts", "mpg", "mpeg", "wmv", "flv", "ogv", "3gp", "gif",
    "mxf",
))
IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "heic", "ppm"))
# fmt: on
CAPTION_FIELDS = ("caption", "text")
MAX_TEXT_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row of the index.

    `offset` and `size_bytes` are those of the media member in the shard, 0 when there is none. `metadata` is a JSON
    object with sorted keys. `other_members` names the sample's members that are neither its media nor its texts.
    `detail` says more about a status, or what is odd about an ok sample.
    """

    key: str
    offset: int = 0
    size_bytes: int = 0
    member: str = ""
    media: MediaInfo | None = None
    status: Status = "ok"
    reason: str = ""
    detail: str = ""
    caption: str = ""
    metadata: str = "{}"
    other_members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in ("ok", "filtered", "failed") or (self.status == "ok") != (not self.reason):
            raise ValueError(f"a sample is ok, or has a reason, got {self.status=} {self.reason=} {self.key=}")
        if self.status == "ok" and self.media is None:
            raise ValueError(f"an ok sample has been probed, got {self.key=} without media")


@dataclasses.dataclass(frozen=True)
class SampleParts:
    """The members of one sample, in tar order.

    duplicate: a member of this key and extension came before, in another sample. damage: bytes next to one of the
    members that could not be understood; more members may lie there. (No bytes, where the tar just stops.)
    """

    key: str
    members: tuple[Member, ...]
    duplicate: bool = False
    damage: Damage | None = None

    @functools.cached_property
    def media(self) -> Member | None:
        """The first video, or else the first image."""
        candidates = [member for member in self.members if media_kind(member.name)]
        return min(candidates, key=lambda member: media_kind(member.name) != "video", default=None)

    @functools.cached_property
    def caption_member(self) -> Member | None:
        """The member `key.txt`, or else the first whose extension ends so."""
        candidates = [member for member in self.members if _suffix(member.name) == "txt"]
        return min(candidates, key=lambda member: _extension(member.name) != "txt", default=None)

    @property
    def metadata_members(self) -> tuple[Member, ...]:
        """All .json members."""
        return tuple(member for member in self.members if _suffix(member.name) == "json")

    @property
    def text_members(self) -> tuple[Member, ...]:
        """The members whose bytes `describe` wants: whole, and of at most MAX_TEXT_BYTES."""
        texts = (*self.metadata_members, *([self.caption_member] if self.caption_member else []))
        return tuple(text for text in texts if not text.truncated and text.size_bytes <= MAX_TEXT_BYTES)

    @property
    def position(self) -> int:
        """Where the sample stands in the order of the shard, in bytes."""
        return (self.media or self.members[0]).offset

    @property
    def verdict(self) -> tuple[Status, str, str] | None:
        """Status, reason and detail where the members alone decide; None for a sample to be probed."""
        media = self.media
        if self.duplicate:
            return "failed", "duplicate_key", f"{self.members[0].name} is in the shard more than once"
        if media is None:
            return ("failed", "tar_damaged", "") if self.damage else ("filtered", "no_video_or_image", "")
        if media.truncated:
            detail = f"{media.name} holds {media.found_bytes} of {media.size_bytes} bytes"
            return "failed", "truncated_member", detail
        return None


@functools.lru_cache(maxsize=256)  # a sample's names are asked for again and again while it is described
def split_name(name: str) -> tuple[str, str] | None:
    """Key (directory and base name up to its first dot) and extension, in lower case; None for a name without."""
    base = name.rpartition("/")[2]
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return name[: len(name) - len(extension) - 1], extension.lower()


def media_kind(name: str) -> MediaKind | None:
    """Video or image, by the last part of a member's extension."""
    suffix = _suffix(name)
    if suffix in VIDEO_EXTENSIONS:
        return "video"
    return "image" if suffix in IMAGE_EXTENSIONS else None


def _extension(name: str) -> str:
    return (split_name(name) or ("", ""))[1]


def _suffix(name: str) -> str:
    return _extension(name).rpartition(".")[2]


def group(scan: TarScan) -> list[SampleParts]:
    """The samples of a shard, in tar order. Members of a sample may be interleaved with those of others.

    A repeated (key, extension) starts a second sample of that key, marked as duplicate. Members without a key (no
    extension, or hidden) belong to no sample.
    """
    samples: list[tuple[str, list[Member], bool]] = []
    latest: dict[str, tuple[list[Member], set[str]]] = {}
    for member in scan.members:
        name = split_name(member.name)
        if name is None:
            continue
        key, extension = name
        members, extensions = latest.get(key, ([], set()))
        if not members or extension in extensions:
            duplicate = bool(members)
            members, extensions = latest[key] = ([], set())
            samples.append((key, members, duplicate))
        members.append(member)
        extensions.add(extension)
    damaged = _next_to_damage(scan)
    parts = []
    for key, members, duplicate in samples:
        damage = next((damaged[member.offset] for member in members if member.offset in damaged), None)
        parts.append(SampleParts(key, tuple(members), duplicate, damage))
    return sorted(parts, key=lambda part: part.position)


def _next_to_damage(scan: TarScan) -> dict[int, Damage]:
    """The offsets of the members right before and right after each damage, and before a cut."""
    neighbours: dict[int, Damage] = {}
    events: list[Member | Damage] = [*scan.members, *scan.damages]
    if scan.cut_at is not None:
        events.append(Damage(scan.cut_at, 0, "cut"))
    events.sort(key=lambda event: event.offset)
    for first, second in itertools.pairwise(events):
        if isinstance(first, Member) and isinstance(second, Damage):
            neighbours[first.offset] = second
        elif isinstance(first, Damage) and isinstance(second, Member):
            neighbours[second.offset] = first
    return neighbours


def damage_sample(damage: Damage) -> Sample:
    """The row that stands for bytes which could not be understood; its key is empty."""
    detail = f"{damage.reason}: {damage.size_bytes} bytes at offset {damage.offset}"
    return Sample(key="", status="failed", reason="tar_damaged", detail=detail)


def describe(
    parts: SampleParts,
    texts: Mapping[str, bytes],
    probed: MediaInfo | DecodeError | None,
) -> Sample:
    """The row of a sample.

    `texts` holds the bytes of `parts.text_members` by name; `probed` is what became of the media member, None where
    `parts.verdict` made probing needless. The caption is the .txt member; else the metadata's
    "caption" or "text".
    """
    notes = list(_remarks(parts))
    metadata = _metadata(parts, texts, notes)
    caption = _caption(parts, texts, metadata, notes)
    status, reason, detail = parts.verdict or ("ok", "", "")
    if isinstance(probed, DecodeError):
        status, reason, detail = "failed", probed.reason, probed.detail
    media = parts.media
    known = (media, parts.caption_member, *parts.metadata_members)
    return Sample(
        key=parts.key,
        offset=media.offset if media else 0,
        size_bytes=media.size_bytes if media else 0,
        member=media.name if media else "",
        media=probed if isinstance(probed, MediaInfo) else None,
        status=status,
        reason=reason,
        detail="; ".join([detail, *notes] if detail else notes),
        caption=caption,
        metadata=json.dumps(metadata, sort_keys=True, allow_nan=False),
        other_members=tuple(member.name for member in parts.members if member not in known),
    )


def _remarks(parts: SampleParts) -> Iterator[str]:
    media = parts.media
    if parts.damage:
        yield f"next to {parts.damage.size_bytes} damaged bytes at offset {parts.damage.offset}: members may be missing"
    for member in parts.members:
        if member is not media and member.truncated:
            yield f"truncated_member: {member.name} holds {member.found_bytes} of {member.size_bytes} bytes"
    for text in (parts.caption_member, *parts.metadata_members):
        if text and text.size_bytes > MAX_TEXT_BYTES:
            yield f"text_too_large: {text.name} has {text.size_bytes} bytes, at most {MAX_TEXT_BYTES} are read"


def _metadata(parts: SampleParts, texts: Mapping[str, bytes], notes: list[str]) -> dict[str, Any]:
    """The objects of all .json members in one; NaN becomes null, for JSON knows none."""
    merged: dict[str, Any] = {}
    for member in parts.metadata_members:
        if member.name not in texts:
            continue
        try:
            document = json.loads(texts[member.name].decode("utf-8-sig"), parse_constant=lambda _: None)
            json.dumps(document, allow_nan=False)
        except (ValueError, RecursionError) as error:
            notes.append(f"json_error: {member.name}: {error}")
            continue
        if isinstance(document, dict):
            merged.update(document)
        else:
            notes.append(f"json_error: {member.name}: not an object but a {type(document).__name__}")
    return merged


def _caption(parts: SampleParts, texts: Mapping[str, bytes], metadata: dict[str, Any], notes: list[str]) -> str:
    written = ""
    member = parts.caption_member
    if member and member.name in texts:
        try:
            written = texts[member.name].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            notes.append(f"text_error: {member.name}: {error}")
            written = texts[member.name].decode("utf-8-sig", "replace")
    fields = [metadata.get(name) for name in CAPTION_FIELDS]
    choices = [written, *(text for text in fields if isinstance(text, str))]
    # A JSON string may hold half of a surrogate pair, which no UTF-8 column takes.
    stripped = [text.encode("utf-8", "replace").decode().strip() for text in choices]
    return next((text for text in stripped if text), "")
