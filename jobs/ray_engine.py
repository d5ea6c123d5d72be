"""The Ray engine: encode workers as actors.

In:   the flags of a job; a store that holds plan and header.
Out:  the events of pipeline.engine.
Cost: a unit costs the driver two small messages.
Errors: JobError for a worker that cannot be set up or started; losses of workers are events.

Ray retries nothing: the controller decides about units and workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import queue
import sys
import traceback
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from jobs.flags import EngineFlags
from jobs.ray_cluster import NodeShare
from jobs.ray_decode import RayDecoders
from jobs.rehearsal import is_rehearsal
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pool import ProcessPool
from pipeline.decode_requests import Decoders
from pipeline.engine import Event, UnitDone, UnitFailed, WorkerLost, WorkerReady
from pipeline.errors import JobError, LatentmillError, UnitError
from pipeline.heap import HEAP_ENVIRONMENT
from pipeline.plan import Unit, load_plan
from pipeline.storage import open_storage
from pipeline.store import open_header
from pipeline.unit_job import UnitReport

if TYPE_CHECKING:
    from pipeline.worker import EncodeWorker  # needs torch, which the driver does without

_CAUSE_CHARACTERS = 600


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """All that an encode worker needs; it reads plan and recipe from the store. window_mb 0: by the plan."""

    store_url: str
    encoder_source: str
    device: str
    encode_threads: int
    share: NodeShare
    window_mb: int
    limits: DecodeLimits


class EncodeActor:
    """An encode worker in a Ray actor: setup once, encode units, several in flight."""

    def __init__(self, spec: WorkerSpec) -> None:
        for name in HEAP_ENVIRONMENT:
            os.environ.pop(name, None)  # read by now; decode processes have settings of their own
        self._spec = spec
        self._worker: EncodeWorker | None = None

    def node(self) -> str:
        """Where the worker is, be it set up or not."""
        return ray.get_runtime_context().get_node_id()

    def setup(self) -> dict[str, Any]:
        """Load the encoder and start the threads; where the worker lives."""
        import torch

        from jobs.prepare import ready_encoder
        from pipeline.feed import default_window_bytes
        from pipeline.worker import EncodeWorker

        torch.set_num_threads(self._spec.encode_threads)
        decoders = self._decoders()
        storage = open_storage(self._spec.store_url)
        plan = load_plan(storage, open_header(storage).recipe)
        window_bytes = self._spec.window_mb << 20 or default_window_bytes(plan, self._spec.share.decode_processes or 0)
        encoder = ready_encoder(self._spec.encoder_source, self._spec.device, plan, window_bytes)
        self._worker = EncodeWorker(encoder, decoders, storage, plan, window_bytes, _die, self._spec.encode_threads)
        gc.freeze()  # as jobs.encode does
        return {"pid": os.getpid(), "node": self.node(), "decode_processes": self._spec.share.decode_processes}

    def _decoders(self) -> Decoders:
        if self._spec.share.decode_processes is None:
            return RayDecoders(self._spec.limits)
        pool = ProcessPool(self._spec.share.decode_processes, self._spec.limits)
        pool.start()  # while the encoder loads; they end with this process
        if self._spec.device == "cpu" and not is_rehearsal(self._spec.encoder_source):
            pool.let_others_first()
        return pool

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
            num_cpus=spec.share.cpus,
            runtime_env={} if on_gpu else {"env_vars": HEAP_ENVIRONMENT},
            # As node_share has counted; packed, a node's workers could decode with more than its --decode-workers.
            scheduling_strategy="DEFAULT" if spec.share.decode_processes is None else "SPREAD",
            max_restarts=0,
            max_task_retries=0,
        )(EncodeActor)
        self._concurrency = flags.units_in_flight + 2
        self._unit_timeout_seconds = flags.unit_timeout_seconds
        self._actors: dict[str, Any] = {}
        self._killed: set[str] = set()  # those of them that hung
        self._nodes: dict[str, str] = {}  # of those that live, which have one before they are ready
        self._places: dict[str, dict[str, Any]] = {}
        self._pending: dict[Any, tuple[str, Unit | None]] = {}
        self._completed: queue.SimpleQueue[Any] = queue.SimpleQueue()  # references among the pending

    def start_worker(self) -> str:
        name = f"encode-{uuid.uuid4().hex[:8]}"
        actor = self._actor_type.options(name=name, max_concurrency=self._concurrency).remote(self._spec)
        self._actors[name] = actor
        actor.node.remote().future().add_done_callback(functools.partial(self._learn_node, name))
        self._await(actor.setup.remote(), name, None)
        return name

    def _learn_node(self, worker: str, told: Future[str]) -> None:
        if told.exception() is None:
            self._nodes[worker] = told.result()

    def submit(self, worker: str, unit: Unit) -> None:
        reference = self._actors[worker].encode.options(name=f"encode {unit.name}").remote(unit)
        self._await(reference, worker, unit)

    def _await(self, reference: Any, worker: str, unit: Unit | None) -> None:
        """Ray tells when it is there: `ray.wait` would look at all that are pending, at every turn."""
        self._pending[reference] = (worker, unit)
        reference.future().add_done_callback(lambda _: self._completed.put(reference))

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        """Process id and node of every ready worker, for the run log."""
        return dict(self._places)

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        references = []
        with contextlib.suppress(queue.Empty):
            references.append(self._completed.get(timeout=timeout_seconds))
            while True:
                references.append(self._completed.get_nowait())
        return [event for reference in references if (event := self._settle(reference)) is not None]

    def _settle(self, reference: Any) -> Event | None:
        worker, unit = self._pending.pop(reference)
        if worker not in self._actors:
            return None  # One of several units that a lost worker held.
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, LatentmillError) else None
            if unit is not None and cause is not None:
                return UnitFailed(worker, unit, cause)
            if isinstance(cause, UnitError):  # while it was set up: another one may be luckier
                ray.kill(self._actors.pop(worker))
                return WorkerLost(worker, str(cause))
            raise cause or JobError(f"an encode worker failed: {error}") from error
        except (RayActorError, OutOfMemoryError) as error:
            return self._lose(worker, error)
        except RayError as error:
            raise JobError(f"an encode worker cannot run on this cluster: {short_cause(error)}") from error
        if unit is None:
            self._places[worker] = value
            return WorkerReady(worker)
        return UnitDone(worker, value)

    def _lose(self, worker: str, error: RayError) -> WorkerLost:
        ray.kill(self._actors.pop(worker))  # One that cannot be reached may still live.
        self._places.pop(worker, None)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        gone = self._nodes.pop(worker, None) not in {None, *alive}
        return WorkerLost(worker, self._cause(worker, error), gone or bool(getattr(error, "preempted", False)))

    def _cause(self, worker: str, error: RayError) -> str:
        if worker not in self._killed:
            return short_cause(error)
        self._killed.discard(worker)
        return f"killed: silent for longer than --unit-timeout-seconds {self._unit_timeout_seconds:g} per unit it held"

    def kill_worker(self, worker: str) -> None:
        self._killed.add(worker)
        ray.kill(self._actors[worker])

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()


def short_cause(error: RayError) -> str:
    """Ray's message on one line, without the names of the actor, which say nothing to a user. Pure."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    text = " ".join(lines)
    half = _CAUSE_CHARACTERS // 2
    return text if len(text) <= _CAUSE_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
