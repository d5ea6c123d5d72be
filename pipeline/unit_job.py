"""A unit on its way through the encode worker, and the report that it ends with.

In:   a unit; what the worker's threads make of its clips.
Out:  Future[UnitReport].
Cost: the unit's rows, and the frames that are decoded and not yet in a batch.
Errors: none; `settle` puts them into the future, without their tracebacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

import numpy as np

from pipeline.commit import CommitReport, RowResult
from pipeline.decode.records import DecodedClip, DecodeOutcome
from pipeline.errors import LatentmillError, SampleError
from pipeline.placement import Clip
from pipeline.plan import Unit

if TYPE_CHECKING:
    from pipeline.encode import StreamedClip  # needs torch, which the driver of a cluster does without

_FAILURES_TOLD = 20


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """What one unit cost and what became of it.

    failed: clips by reason. failures: (key, reason, detail) of the first of them. sample_bytes: of the samples that the
    clips are from, of which decoders may read less. won: False when another worker had committed the unit already.
    Wall seconds of the encode stage, the mean over its threads: `encode_seconds` in the encoder, `copy_seconds` putting
    rows of long clips away, `starved_seconds` waiting for frames, `blocked_seconds` for the threads behind it to take
    what came before. Of the threads beside it: `batch_seconds` putting batches together,
    `rows_seconds` making stored rows, `write_seconds` (checksums, Zarr, both puts). Of the decode processes, for the
    clips that came out: `decode_seconds` at work, `read_seconds` waiting for bytes or for a core. `start_seconds`: the
    wait of each thread of the encode stage for its very first frames.
    """

    unit: Unit
    written: int
    failed: dict[str, int]
    failures: tuple[tuple[str, str, str], ...]
    frames: int
    sample_bytes: int
    bytes_written: int
    won: bool
    encode_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0
    write_seconds: float = 0.0
    copy_seconds: float = 0.0
    batch_seconds: float = 0.0
    rows_seconds: float = 0.0
    start_seconds: float = 0.0
    decode_seconds: float = 0.0
    read_seconds: float = 0.0


@dataclasses.dataclass
class UnitJob:
    """A unit on its way through the threads, each with fields of its own; future and seconds are for any.

    The feed thread sets clips and rows; `outcomes` are decoded and not yet in a batch, `batched_clips` are; `streams`
    are the long clips under way. `results` go by the clip's place in `clips`.
    """

    unit: Unit
    future: Future[UnitReport]
    clips: list[Clip] = dataclasses.field(default_factory=list)
    rows: np.ndarray = dataclasses.field(init=False)
    outcomes: list[DecodeOutcome] = dataclasses.field(default_factory=list)
    streams: dict[int, StreamedClip] = dataclasses.field(default_factory=dict)
    results: dict[int, RowResult] = dataclasses.field(default_factory=dict)
    batched_clips: int = 0
    _seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def spend(self, **seconds: float) -> None:
        """Add to the report's seconds, by their names without `_seconds`."""
        with self._lock:
            for name, more in seconds.items():
                self._seconds[f"{name}_seconds"] = self._seconds.get(f"{name}_seconds", 0.0) + more

    def count(self, outcomes: Sequence[DecodeOutcome]) -> None:
        """Add what decoding cost."""
        decoded = [one for one in outcomes if isinstance(one, DecodedClip)]
        self.spend(decode=sum(one.cpu_seconds for one in decoded), read=sum(one.wait_seconds for one in decoded))

    def settle(self, outcome: UnitReport | LatentmillError) -> None:
        """Resolve the future, unless it was cancelled or another thread came first."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, UnitReport):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(_without_frames(outcome))

    def report(self, committed: CommitReport) -> UnitReport:
        """The whole of it."""
        pairs = [(clip, self.results[place]) for place, clip in enumerate(self.clips)]
        failures = [
            (clip.sample.key, error.reason, error.detail) for clip, error in pairs if isinstance(error, SampleError)
        ]
        sizes = {(clip.shard_url, clip.sample.offset): clip.sample.size_bytes for clip in self.clips}
        return UnitReport(
            unit=self.unit,
            written=committed.written,
            failed=committed.failed,
            failures=tuple(failures[:_FAILURES_TOLD]),
            frames=sum(clip.window.num_frames for clip, result in pairs if not isinstance(result, SampleError)),
            sample_bytes=sum(sizes.values()),
            bytes_written=committed.bytes_written,
            won=committed.won,
            **self._seconds,
        )


def _without_frames(error: LatentmillError) -> LatentmillError:
    """The error, its causes and theirs, without tracebacks.

    Their frames hold the job, which holds the future and so the error: the job, with its rows and what an encoder
    keeps of its long clips, would stay until a full garbage collection.
    """
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error
