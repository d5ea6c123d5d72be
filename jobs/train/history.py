"""What a training has seen: the draws of every step that led to its last checkpoint, and which of them failed.

In:   the batches of one rank; a Storage at RUN.
Out:  RUN/history/<step>/rank-<r>.jsonl, written with the checkpoint of that step: a line per step since the one before.
Cost: some tens of bytes per clip.
Errors: those of the storage.

Steps that a resumed training makes again replace their lines: what was written after the checkpoint is dropped first.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.storage import Storage
from pipeline.training_clips import ClipBatch

_PREFIX = "history/"


@dataclasses.dataclass
class History:
    """One rank's lines since the last checkpoint."""

    storage: Storage
    rank: int
    _lines: list[str] = dataclasses.field(default_factory=list)

    def add(self, batch: ClipBatch) -> None:
        """Note a step's draws: stage, epoch and number of each in the order of clips, and its key."""
        draws = [[batch.stage, draw.epoch, draw.number, draw.source.key] for draw in batch.draws]
        self._lines.append(json.dumps({"step": batch.step, "draws": draws, "failed": batch.failed}))

    def write(self, step: int) -> None:
        """Write the lines down, before the checkpoint of that step counts."""
        data = "".join(f"{line}\n" for line in self._lines).encode()
        self.storage.put(f"{_PREFIX}{step:08d}/rank-{self.rank}.jsonl", data)
        self._lines.clear()


def drop_after(storage: Storage, step: int) -> None:
    """Forget what was written after the checkpoint of that step."""
    for name in storage.list(_PREFIX):
        if int(name.split("/")[1]) > step:
            storage.delete(name)


def read_history(storage: Storage) -> Iterator[dict[str, Any]]:
    """Every line of every rank, by checkpoint."""
    for name in storage.list(_PREFIX):
        for line in storage.read(name).decode().splitlines():
            yield json.loads(line)


def failed_clips(storage: Storage) -> Counter[str]:
    """The clips that could not be decoded, by reason, over all ranks and attempts."""
    return Counter(reason for line in read_history(storage) for reason in line["failed"])
