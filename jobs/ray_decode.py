"""Decoding and indexing as Ray tasks, on any node of the cluster.

In:   decode requests; shards.
Out:  what DecodeProcess gives; index fragments in the store.
Cost: two messages per task, and the frames through the object store.
Errors: those of DecodeProcess; UnitError for a task that is lost with nodes again and again.

Ray itself retries no decode task, so that blame is exact: a lost node is nobody's fault, a process that dies is the
clip's. The task holds a killable decode process, as --local does, so both fail a clip alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from jobs.ray_cluster import cluster_resource
from pipeline.decode.backend import pieces_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest, Window
from pipeline.errors import DecodeError, JobError, LatentmillError, ShardError, UnitError
from pipeline.index import index_shard, write_fragment
from pipeline.shards import ShardRef
from pipeline.storage import open_storage

_LOST_TRIES = 20  # losses by the cluster are nobody's fault, but not for ever
_STRIKES = 2
_PIECES_AHEAD = 2  # of a long clip, decoded and not yet taken by the encode worker
_SUSPECT = (WorkerCrashedError, OutOfMemoryError)
_INFRASTRUCTURE = (NodeDiedError, ObjectLostError)


_process: DecodeProcess | None = None


def _decode_process(limits: DecodeLimits) -> DecodeProcess:
    """This Ray worker's decode process, started at its first task."""
    global _process  # noqa: PLW0603 (one process per Ray worker process, kept warm between tasks)
    if _process is None:
        _process = DecodeProcess(limits)
    return _process


def _decode(requests: Sequence[DecodeRequest], limits: DecodeLimits) -> tuple[DecodeOutcome, ...]:
    return _decode_process(limits).decode(*requests)


def _stream(request: DecodeRequest, piece_frames: int, limits: DecodeLimits) -> Iterator[DecodedClip | DecodeError]:
    try:
        yield from _decode_process(limits).stream(request, piece_frames)
    except DecodeError as error:
        yield error


def _index(shard: ShardRef, store_url: str, limits: DecodeLimits) -> None:
    fragment = index_shard(shard, _decode_process(limits).probe)
    write_fragment(open_storage(store_url), fragment)


_decode_task = ray.remote(num_cpus=1, max_retries=0)(_decode)
_stream_task = ray.remote(num_cpus=1, max_retries=0)(_stream)
_index_task = ray.remote(num_cpus=1, max_retries=2)(_index)


class _RayDecode:
    """A decode task under way, and what follows when it is lost."""

    def __init__(self, requests: Sequence[DecodeRequest], limits: Any) -> None:
        self._requests, self._limits = requests, limits
        self._reference = self._start(requests)

    def _start(self, requests: Sequence[DecodeRequest]) -> Any:
        return _decode_task.options(name="decode", enable_task_events=False).remote(requests, self._limits)

    def result(self) -> tuple[DecodeOutcome, ...]:
        """Wait; a crash of the Ray worker splits requests into single windows, and one that crashes again failed."""
        try:
            return self._get(self._reference, self._requests)
        except _SUSPECT:
            outcomes: list[DecodeOutcome] = []
            for single in self._single_windows():
                try:
                    outcomes += self._get(self._start([single]), [single])
                except _SUSPECT:
                    outcomes.append(DecodeError("crash", "the decoder's process died twice"))
            return tuple(outcomes)

    def _single_windows(self) -> Iterator[DecodeRequest]:
        for request in self._requests:
            yield from (dataclasses.replace(request, windows=(window,)) for window in request.windows)

    def _get(self, reference: Any, requests: Sequence[DecodeRequest]) -> tuple[DecodeOutcome, ...]:
        for _ in range(_LOST_TRIES):
            try:
                outcomes: tuple[DecodeOutcome, ...] = ray.get(reference)
            except _INFRASTRUCTURE:
                reference = self._start(requests)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, LatentmillError) else error from None
            else:
                return outcomes
        raise UnitError(f"decoding {requests[0].source.key} was lost {_LOST_TRIES} times with nodes of the cluster")


class _RayStream:
    """A long clip's decode task, which hands over pieces as they are wanted, and what follows when it is lost.

    Another task then begins at the piece that is wanted; a clip whose task's process dies twice there has failed.
    """

    def __init__(self, request: DecodeRequest, piece_frames: int, limits: Any) -> None:
        (self._window,) = request.windows
        self._request, self._piece_frames, self._limits = request, piece_frames, limits
        self._task: Any = None
        self._lost = 0

    def pieces(self) -> Generator[DecodedClip, None, None]:
        is_last = False
        try:
            for piece in pieces_of(self._window, self._piece_frames):
                is_last = piece.start + piece.num_frames == self._window.start + self._window.num_frames
                # No variable holds the frames: they would stay in the object store until the next ones come.
                yield self._clip(piece.start)
        except GeneratorExit:
            if not is_last:  # Else the task would wait for ever. Its decode process may be in mid-reply: by force.
                ray.cancel(self._task, force=True)
            raise

    def _clip(self, start: int) -> DecodedClip:
        outcome = self._piece(start)
        if isinstance(outcome, DecodeError):
            raise outcome
        return outcome

    def _piece(self, start: int) -> DecodeOutcome:
        deaths = 0
        while deaths < _STRIKES:
            try:
                return self._next(start)
            except _SUSPECT:
                deaths += 1
            except _INFRASTRUCTURE:
                self._count_loss()
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, LatentmillError) else error from None
            self._task = None
        return DecodeError("crash", f"the decoder's process died {_STRIKES} times")

    def _next(self, start: int) -> DecodeOutcome:
        if self._task is None:
            window = Window(start, self._window.start + self._window.num_frames - start)
            options = _stream_task.options(
                name="decode",
                num_returns="streaming",
                _generator_backpressure_num_objects=_PIECES_AHEAD,
                enable_task_events=False,
            )
            rest = dataclasses.replace(self._request, windows=(window,))
            self._task = options.remote(rest, self._piece_frames, self._limits)
        outcome: DecodeOutcome = ray.get(next(self._task))
        return outcome

    def _count_loss(self) -> None:
        self._lost += 1
        if self._lost >= _LOST_TRIES:
            raise UnitError(
                f"decoding {self._request.source.key} was lost {_LOST_TRIES} times with nodes of the cluster"
            )


class RayDecoders:
    """Decode requests as Ray tasks, anywhere in the cluster."""

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = ray.put(limits)

    def submit(self, *requests: DecodeRequest) -> _RayDecode:
        return _RayDecode(requests, self._limits)

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        return _RayStream(request, piece_frames, self._limits).pieces()


def index_on_ray(
    store_url: str, shards: Sequence[ShardRef], limits: DecodeLimits
) -> Iterator[ShardError | UnitError | None]:
    """Index shards as tasks, a bounded number of them under way; of each None, or why it could not be indexed.

    Raises:
        JobError: what is no shard's fault.
    """
    waiting = list(reversed(shards))
    pending: dict[Any, ShardRef] = {}
    bound = 4 * max(1, int(cluster_resource("CPU")))
    while waiting or pending:
        while waiting and len(pending) < bound:
            shard = waiting.pop()
            pending[_index_task.options(name="index").remote(shard, store_url, limits)] = shard
        (done,), _ = ray.wait(list(pending), num_returns=1)
        yield _index_outcome(done, pending.pop(done))


def _index_outcome(reference: Any, shard: ShardRef) -> ShardError | UnitError | None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ShardError | UnitError):
            return error.cause
        raise error.cause if isinstance(error.cause, LatentmillError) else JobError(str(error)) from error
    except RayError as error:
        return UnitError(f"indexing {shard.url} was lost with its worker: {error}")
    return None
