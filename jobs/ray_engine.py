"""The Ray engine: encode workers as actors, decoding as tasks, indexing as tasks. All Ray of the project is here.

In:   the flags of a job; a store that holds plan and header.
Out:  the events of pipeline.engine; index fragments.
Cost: starting a cluster on this machine takes 8 to 17 s; a unit costs the driver two small messages.
Errors: JobError for a cluster that cannot run the job; losses of workers are events.

Nothing is retried by Ray itself: the controller decides about units and workers, `RayDecoders` about decode tasks, so
that blame is exact. The decode task holds a killable decode process, as --local does, so both fail a clip alike.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import traceback
import uuid
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from jobs.flags import ClusterFlags, EngineFlags
from pipeline.decode.backend import pieces_of
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest, Window
from pipeline.engine import Event, UnitDone, UnitFailed, WorkerLost, WorkerReady
from pipeline.errors import DecodeError, JobError, LatentmillError, UnitError
from pipeline.index import index_shard, write_fragment
from pipeline.plan import Unit, load_plan
from pipeline.shards import ShardRef
from pipeline.storage import open_storage
from pipeline.store import open_header
from pipeline.unit_job import UnitReport

if TYPE_CHECKING:
    from pipeline.worker import EncodeWorker  # needs torch, which decode tasks and the driver do without

_MEGABYTE = 1 << 20
_TASKS_PER_PROCESS = 500  # decoders leak a little; a fresh process is cheap at this rate
_LOST_TRIES = 20  # losses by the cluster are nobody's fault, but not for ever
_STRIKES = 2
_PIECES_AHEAD = 2  # of a long clip, decoded and not yet taken by the encode worker
_SUSPECT = (WorkerCrashedError, OutOfMemoryError)
_INFRASTRUCTURE = (NodeDiedError, ObjectLostError)


def connect(flags: ClusterFlags) -> None:
    """Join a cluster, or start one on this machine that is large enough for the flags."""
    if ray.is_initialized():
        return
    address = flags.ray_address or os.environ.get("RAY_ADDRESS")
    # Of workers, too: without a dashboard Ray Train warns every second that it cannot ask it.
    own: dict[str, Any] = {"logging_config": ray.LoggingConfig(log_level="ERROR")}
    if not address:
        own |= {
            "num_cpus": flags.cluster_cpus,
            "object_store_memory": flags.object_store_mb * _MEGABYTE,
            "include_dashboard": False,
        }
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, configure_logging=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error


def cluster_resource(name: str) -> float:
    """How much of a resource ("CPU", "GPU") the cluster has."""
    return float(ray.cluster_resources().get(name, 0.0))  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """All that an encode worker needs; it reads plan and recipe from the store."""

    store_url: str
    encoder_source: str
    device: str
    compute_dtype: str
    encode_threads: int
    window_bytes: int
    limits: DecodeLimits


# decode tasks


_process: DecodeProcess | None = None


def _decode_process(limits: DecodeLimits) -> DecodeProcess:
    """This Ray worker's decode process, started at its first task."""
    global _process  # noqa: PLW0603 (one process per Ray worker process, kept warm between tasks)
    if _process is None:
        _process = DecodeProcess(limits)
    return _process


def _decode(request: DecodeRequest, limits: DecodeLimits) -> tuple[DecodeOutcome, ...]:
    return _decode_process(limits).decode(request)


def _stream(request: DecodeRequest, piece_frames: int, limits: DecodeLimits) -> Iterator[DecodedClip | DecodeError]:
    try:
        yield from _decode_process(limits).stream(request, piece_frames)
    except DecodeError as error:
        yield error


def _index(shard: ShardRef, store_url: str, limits: DecodeLimits) -> None:
    fragment = index_shard(shard, _decode_process(limits).probe)
    write_fragment(open_storage(store_url), fragment)


_decode_task = ray.remote(num_cpus=1, max_retries=0, max_calls=_TASKS_PER_PROCESS)(_decode)
_stream_task = ray.remote(num_cpus=1, max_retries=0, max_calls=_TASKS_PER_PROCESS)(_stream)
_index_task = ray.remote(num_cpus=1, max_retries=2, max_calls=_TASKS_PER_PROCESS)(_index)


class _RayDecode:
    """A decode task under way, and what follows when it is lost."""

    def __init__(self, request: DecodeRequest, limits: Any) -> None:
        self._request, self._limits = request, limits
        self._reference = self._start(request)

    def _start(self, request: DecodeRequest) -> Any:
        return _decode_task.options(name="decode", enable_task_events=False).remote(request, self._limits)

    def result(self) -> tuple[DecodeOutcome, ...]:
        """Wait; a crash of the Ray worker splits the request into single windows, and one that crashes again failed."""
        try:
            return self._get(self._reference, self._request)
        except _SUSPECT:
            outcomes: list[DecodeOutcome] = []
            for window in self._request.windows:
                single = dataclasses.replace(self._request, windows=(window,))
                try:
                    outcomes += self._get(self._start(single), single)
                except _SUSPECT:
                    outcomes.append(DecodeError("crash", "the decoder's process died twice"))
            return tuple(outcomes)

    def _get(self, reference: Any, request: DecodeRequest) -> tuple[DecodeOutcome, ...]:
        for _ in range(_LOST_TRIES):
            try:
                outcomes: tuple[DecodeOutcome, ...] = ray.get(reference)
            except _INFRASTRUCTURE:
                reference = self._start(request)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, LatentmillError) else error from None
            else:
                return outcomes
        raise UnitError(f"decoding {request.source.key} was lost {_LOST_TRIES} times with nodes of the cluster")


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
                outcome = self._piece(piece.start)
                if isinstance(outcome, DecodeError):
                    raise outcome
                is_last = piece.start + piece.num_frames == self._window.start + self._window.num_frames
                yield outcome
                del outcome  # Or its frames would stay in the object store while the next ones are waited for.
        except GeneratorExit:
            if not is_last:  # Else the task would wait for ever. Its decode process may be in mid-reply: by force.
                ray.cancel(self._task, force=True)
            raise

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

    def submit(self, request: DecodeRequest) -> _RayDecode:
        return _RayDecode(request, self._limits)

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        return _RayStream(request, piece_frames, self._limits).pieces()


# encode workers


class EncodeActor:
    """An encode worker in a Ray actor: setup once, encode units, several in flight."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: EncodeWorker | None = None

    def setup(self) -> dict[str, Any]:
        """Load the encoder and start the threads; where the worker lives."""
        import torch

        from jobs.prepare import open_encoder
        from pipeline.worker import EncodeWorker

        torch.set_num_threads(self._spec.encode_threads)
        encoder = open_encoder(self._spec.encoder_source, self._spec.device, self._spec.compute_dtype)
        storage = open_storage(self._spec.store_url)
        plan = load_plan(storage, open_header(storage).recipe)
        decoders = RayDecoders(self._spec.limits)
        self._worker = EncodeWorker(encoder, decoders, storage, plan, self._spec.window_bytes, _die)
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def encode(self, unit: Unit) -> UnitReport:
        """Encode and commit one unit."""
        assert self._worker is not None
        return self._worker.submit(unit).result()


def _die(error: BaseException) -> None:
    """End the process: a worker with a dead stage must not look alive."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(13)


class RayEngine:
    """Runs units on actors of a Ray cluster."""

    def __init__(self, spec: WorkerSpec, flags: EngineFlags) -> None:
        self._spec = spec
        on_gpu = spec.device.startswith("cuda")
        self._actor_type: Any = ray.remote(
            num_gpus=1 if on_gpu else 0,
            num_cpus=1 if on_gpu else spec.encode_threads,
            max_restarts=0,
            max_task_retries=0,
        )(EncodeActor)
        self._concurrency = flags.units_in_flight + 2
        self._actors: dict[str, Any] = {}
        self._places: dict[str, dict[str, Any]] = {}
        self._pending: dict[Any, tuple[str, Unit | None]] = {}
        self._lost: list[Event] = []

    def start_worker(self) -> str:
        name = f"encode-{uuid.uuid4().hex[:8]}"
        actor = self._actor_type.options(name=name, max_concurrency=self._concurrency).remote(self._spec)
        self._actors[name] = actor
        self._pending[actor.setup.remote()] = (name, None)
        return name

    def submit(self, worker: str, unit: Unit) -> None:
        reference = self._actors[worker].encode.options(name=f"encode {unit.name}").remote(unit)
        self._pending[reference] = (worker, unit)

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        """Process id and node of every ready worker, for the run log."""
        return dict(self._places)

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        if not self._pending:
            return []
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_seconds)
        if ready:
            ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        events = [event for reference in ready if (event := self._settle(reference)) is not None]
        lost, self._lost = self._lost, []
        return [*events, *lost]

    def _settle(self, reference: Any) -> Event | None:
        worker, unit = self._pending.pop(reference)
        if worker not in self._actors:
            return None  # One of several units that a lost worker held.
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, LatentmillError) else None
            if unit is None or cause is None:
                raise cause or JobError(f"an encode worker failed: {error}") from error
            return UnitFailed(worker, unit, cause)
        except RayActorError as error:
            return self._lose(worker, error)
        if unit is None:
            self._places[worker] = value
            return WorkerReady(worker)
        return UnitDone(worker, value)

    def _lose(self, worker: str, error: RayActorError) -> WorkerLost:
        del self._actors[worker]
        place = self._places.pop(worker, {})
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        gone = bool(place) and place["node"] not in alive
        cause = str(error).strip().splitlines()[0]
        return WorkerLost(worker, cause, infrastructure=gone or bool(getattr(error, "preempted", False)))

    def kill_worker(self, worker: str) -> None:
        ray.kill(self._actors[worker])

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()


def index_on_ray(store_url: str, shards: Sequence[ShardRef], limits: DecodeLimits) -> None:
    """Index shards as tasks, a bounded number of them under way.

    Raises:
        JobError: a shard cannot be indexed.
    """
    waiting = list(reversed(shards))
    pending: list[Any] = []
    bound = 4 * max(1, int(cluster_resource("CPU")))
    while waiting or pending:
        while waiting and len(pending) < bound:
            pending.append(_index_task.options(name="index").remote(waiting.pop(), store_url, limits))
        done, pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(done)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, LatentmillError) else JobError(str(error)) from error
        except RayError as error:
            raise JobError(f"indexing was lost with its worker: {error}") from error
