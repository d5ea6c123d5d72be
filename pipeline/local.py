"""The in-process engine: one encode worker, decode processes, no Ray.

In:   an encoder, the plan, the store.
Out:  the events of pipeline.engine.
Cost: one process, its decode processes, one window of frames.
Errors: whatever ends a thread of the worker is raised by `wait`, with its cause.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from models.spec import VideoEncoder
from pipeline.decode_requests import Decoders
from pipeline.engine import Event, UnitDone, UnitFailed, WorkerReady
from pipeline.errors import JobError, LatentmillError
from pipeline.plan import Plan, Unit
from pipeline.storage import Storage
from pipeline.unit_job import UnitReport
from pipeline.worker import EncodeWorker

_NAME = "local"


class LocalEngine:
    """Runs units in this process."""

    def __init__(
        self,
        encoder: VideoEncoder,
        decoders: Decoders,
        storage: Storage,
        plan: Plan,
        window_bytes: int,
        encode_threads: int = 1,
    ) -> None:
        self._events: queue.Queue[Event | BaseException] = queue.Queue()
        self._worker = EncodeWorker(encoder, decoders, storage, plan, window_bytes, self._events.put, encode_threads)

    def start_worker(self) -> str:
        self._events.put(WorkerReady(_NAME))
        return _NAME

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        return {_NAME: {"pid": os.getpid()}}

    def submit(self, worker: str, unit: Unit) -> None:
        self._worker.submit(unit).add_done_callback(lambda future: self._on_done(worker, unit, future))

    def _on_done(self, worker: str, unit: Unit, future: Future[UnitReport]) -> None:
        if future.cancelled():
            return  # The worker stops: at `close`, or for an error that `wait` raises.
        error = future.exception()
        if isinstance(error, LatentmillError):
            self._events.put(UnitFailed(worker, unit, error))
        else:
            self._events.put(UnitDone(worker, future.result()))

    def wait(self, timeout_seconds: float) -> Sequence[Event]:
        events: list[Event] = []
        try:
            events.append(self._checked(self._events.get(timeout=timeout_seconds)))
            while True:
                events.append(self._checked(self._events.get_nowait()))
        except queue.Empty:
            return events

    @staticmethod
    def _checked(event: Event | BaseException) -> Event:
        if isinstance(event, BaseException):
            raise event
        return event

    def kill_worker(self, worker: str) -> None:
        raise JobError(
            f"the {worker} worker reports nothing for --unit-timeout-seconds per unit that it holds, and a thread of "
            "this process cannot be killed: give it more seconds, or run without --local"
        )

    def close(self) -> None:
        self._worker.close(finish=False)
