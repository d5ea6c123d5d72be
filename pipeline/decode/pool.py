"""Several decode processes behind one queue.

In:   DecodeRequests and MediaSources from any thread.
Out:  futures of outcomes and of MediaInfo.
Cost: one thread and one child process each; children start with their first request.
Errors: as DecodeProcess, through the future; a future that had not begun when the pool closed is cancelled.

The queue has no bound of its own: whoever submits keeps account of bytes (`DecodeRequest.decoded_bytes`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pipeline.decode.limits import DecodeLimits
from pipeline.decode.process import DecodeProcess
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest, MediaInfo, MediaSource

Result = TypeVar("Result")


class ProcessPool:
    """`num_processes` DecodeProcesses in the background. A context manager."""

    def __init__(self, num_processes: int, limits: DecodeLimits, child_module: str = "pipeline.decode.child") -> None:
        self._processes = [DecodeProcess(limits, child_module) for _ in range(num_processes)]
        self._idle: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decode")

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_processes(self) -> int:
        """How many requests are served at a time."""
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """The process ids of the children that run."""
        return [process.pid for process in self._processes if process.pid is not None]

    def start(self) -> None:
        """Begin to start every child; else each starts with its first request."""
        for process in self._processes:
            process.start()

    def let_others_first(self) -> None:
        """Where encoders compute on the same cores: they and decoding then alternate in turns, not in slices of time.

        Each switch costs the caches that both need: a sixth more CPU time of decoding (infra/LOG.md).
        """
        for process in self._processes:
            process.let_others_first()

    def submit(self, *requests: DecodeRequest) -> Future[tuple[DecodeOutcome, ...]]:
        """One outcome per window of all requests, in order; bad media is an outcome, not an exception."""
        return self._threads.submit(self._run, lambda process: process.decode(*requests))

    def probe(self, source: MediaSource) -> Future[MediaInfo]:
        """What the media is; the future raises DecodeError for bad media."""
        return self._threads.submit(self._run, lambda process: process.probe(source))

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        """As DecodeProcess.stream, on one of the processes, which serves nobody else until the iterator ends."""
        with self._borrowed() as process:
            yield from process.stream(request, piece_frames)

    def close(self) -> None:
        """Drop what has not begun, break off the rest, and leave nothing behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()
        self._threads.shutdown(wait=True)

    def _run(self, work: Callable[[DecodeProcess], Result]) -> Result:
        with self._borrowed() as process:
            return work(process)

    @contextmanager
    def _borrowed(self) -> Iterator[DecodeProcess]:
        process = self._idle.get()
        try:
            yield process
        finally:
            self._idle.put(process)
