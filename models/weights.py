"""What can be said of a safetensors file without loading it into a framework: its table, its tensors' sha256.

In:   the path of a safetensors file.
Out:  TensorEntry per name; a fingerprint over kind, config, and the weights' names, dtypes, shapes and bytes.
Cost: one sequential read for a fingerprint, a megabyte at a time; the header alone for a table.
Errors: CheckpointError names the file and what is wrong with it.

The format (github.com/huggingface/safetensors): eight bytes of header length, a JSON table, then the tensors' bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its bytes are [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_table(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, checked against the file's size."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file (a header of {header_bytes} bytes)")
            table = json.loads(file.read(header_bytes))
        entries = {
            name: TensorEntry(
                entry["dtype"], tuple(entry["shape"]), *(8 + header_bytes + at for at in entry["data_offsets"])
            )
            for name, entry in table.items()
            if name != "__metadata__"
        }
        _check_table(path, entries, 8 + header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors table is damaged: {error!r}") from error
    return entries


def _check_table(path: Path, entries: Mapping[str, TensorEntry], data_start: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        wanted = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if entry.start != position or entry.end - entry.start != wanted:
            raise CheckpointError(f"{path}: the safetensors table is damaged at tensor {name!r}")
        position = entry.end
    size = path.stat().st_size
    if size != position:
        raise CheckpointError(f"{path}: has {size} bytes where its table says {position}; it is cut short or padded")


def fingerprint(kind: str, config: Mapping[str, Any], weights: Path, without: Collection[str] = ()) -> str:
    """sha256 over kind, config, and every tensor's name, dtype, shape and bytes, in the order of names.

    The file's layout and metadata do not enter. `without` names tensors that do not either, such as a normaliser's.
    """
    digest = hashlib.sha256(_canonical({"kind": kind, "config": config}))
    entries = read_table(weights)
    with weights.open("rb") as file:
        for name in sorted(entries.keys() - set(without)):
            entry = entries[name]
            digest.update(_canonical({"name": name, "dtype": entry.dtype, "shape": entry.shape}))
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                piece = file.read(min(READ_BYTES, left))
                if not piece:
                    raise CheckpointError(f"{weights}: ends inside tensor {name!r}")
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def document_sha256(document: Mapping[str, Any]) -> str:
    """sha256 of a JSON document, the same however it is laid out."""
    return hashlib.sha256(_canonical(document)).hexdigest()


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
