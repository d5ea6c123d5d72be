"""Where a training stands, on disk: checkpoints that are there whole or not at all, and which of them are kept.

In:   a Storage at RUN; the trainer's tensors and the loop's position.
Out:  RUN/checkpoints/<step>/: safetensors files (model, average, optimiser ...), then `checkpoint.json`, with which it
      counts. RUN/train.json: the flags that the training began with. RUN/finished.json: how it ended.
Cost: a checkpoint is four copies of the weights, in memory while it is written or read, in parts of about
      64 MB.
Errors: MismatchError for other flags than the training began with; StoreError for a damaged checkpoint.

One process writes at a time. What a kill leaves without its document is written over or swept with the next checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.epoch import LoaderState
from pipeline.errors import MismatchError, StoreError
from pipeline.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
_FLAGS, _FINISHED = "train.json", "finished.json"
_PART_BYTES = 64 << 20  # what a slow uplink puts in a minute
_PREFIX, _DOCUMENT = "checkpoints/", "checkpoint.json"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a training stands, beside its tensors.

    loader: what the next batches follow from. seconds: trained so far. score: the loss by which the best is known, the
    lower the better; None where none was measured. losses: of the last step, by name.
    """

    step: int = 0
    loader: LoaderState = LoaderState()
    seconds: float = 0.0
    score: float | None = None
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training. `scores` holds those that are there, by step."""

    def __init__(self, storage: Storage, keep_every: int | None = None) -> None:
        self._storage, self._keep_every = storage, keep_every
        steps = (name.split("/")[1] for name in storage.list(_PREFIX) if name.endswith(f"/{_DOCUMENT}"))
        self.scores = {step: self._document(step)["score"] for step in map(int, steps)}

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint; None when there is none."""
        return max(self.scores, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the lowest score, the earlier of equals; None when none has one."""
        scored = {step: score for step, score in sorted(self.scores.items()) if score is not None}
        return min(scored, key=lambda step: scored[step], default=None)

    def commit(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, its document last, and drop those that are not kept."""
        from safetensors.torch import save

        digests = {}
        for part, members in _parts(tensors).items():
            data = save(members)
            digests[part] = hashlib.sha256(data).hexdigest()
            self._storage.put(_part_name(position.step, part), data)
        fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(position), "parts": digests}
        self._storage.put(_document_name(position.step), json.dumps(fields, indent=2).encode())
        self.scores[position.step] = position.score
        self._prune()

    def load(self, step: int) -> tuple[Position, dict[str, Tensor]]:
        """Read a checkpoint back, after checking every byte.

        Raises:
            StoreError: a part is missing or damaged.
        """
        from safetensors.torch import load

        document = self._document(step)
        tensors: dict[str, Tensor] = {}
        for part, digest in document["parts"].items():
            tensors |= load(self._read(step, part, digest))
        fields = {field.name: document[field.name] for field in dataclasses.fields(Position)}
        return Position(**{**fields, "loader": LoaderState.from_json(document["loader"])}), tensors

    def _read(self, step: int, part: str, digest: str) -> bytes:
        name = _part_name(step, part)
        try:
            data = self._storage.read(name)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(
                f"{self._storage.url}/{name} is missing or damaged: remove {_PREFIX}{step:08d}, and the same command "
                "goes on from the checkpoint before it"
            )
        return data

    def _document(self, step: int) -> dict[str, Any]:
        name = _document_name(step)
        return _parse(self._storage, name, self._storage.read(name))

    def _prune(self) -> None:
        """Keep the last, the best, and every `keep_every`-th; of others, the document goes first."""
        keep = {self.last_step, self.best_step}
        for step in sorted(self.scores):
            if step not in keep and not (self._keep_every and step % self._keep_every == 0):
                self._storage.delete(_document_name(step))
                del self.scores[step]
        for name in self._storage.list(_PREFIX):
            if int(name.split("/")[1]) not in self.scores:
                self._storage.delete(name)


def require_same_flags(storage: Storage, flags: Mapping[str, Any]) -> None:
    """Write down what a training begins with, or compare with what it began with.

    Raises:
        MismatchError: names each flag that differs.
    """
    here = json.loads(json.dumps(flags, default=str))
    if storage.put_if_absent(_FLAGS, json.dumps({"format_version": FORMAT_VERSION, "flags": here}, indent=2).encode()):
        return
    there = _parse(storage, _FLAGS, storage.read(_FLAGS))["flags"]
    lines = [
        f"  {name}: it began with {json.dumps(there.get(name))}, this command asks for {json.dumps(here.get(name))}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if lines:
        raise MismatchError(
            f"the training in {storage.url} began with other flags:\n" + "\n".join(lines) + "\n"
            "Give the same values to go on, or begin another training with another --run."
        )


def write_finished(storage: Storage, fields: Mapping[str, Any]) -> None:
    """Write down that, and how, the training ended."""
    storage.put(_FINISHED, json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=2).encode())


def read_finished(storage: Storage) -> dict[str, Any] | None:
    """What `write_finished` was given, or None when the training has not ended."""
    try:
        data = storage.read(_FINISHED)
    except FileNotFoundError:
        return None
    return _parse(storage, _FINISHED, data)


def _parse(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{storage.url}/{name} is damaged ({error}): remove it, or name another --run") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{storage.url}/{name} has format version {version}; this code reads {FORMAT_VERSION}")
    fields: dict[str, Any] = document
    return fields


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part that holds them: of one prefix, and no more than a put of a minute takes."""
    parts: dict[str, dict[str, Tensor]] = {}
    sizes, numbers = Counter[str](), Counter[str]()
    for name, tensor in tensors.items():
        prefix = name.split(".")[0] if "." in name else "numbers"
        if sizes[prefix] and sizes[prefix] + tensor.nbytes > _PART_BYTES:
            numbers[prefix] += 1
            sizes[prefix] = 0
        sizes[prefix] += tensor.nbytes
        parts.setdefault(f"{prefix}-{numbers[prefix]}" if numbers[prefix] else prefix, {})[name] = tensor
    return parts


def _part_name(step: int, part: str) -> str:
    return f"{_PREFIX}{step:08d}/{part}.safetensors"


def _document_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}/{_DOCUMENT}"
