"""Threads in a row, each with a bounded hand-over to the next, that end together and never look alive when one is dead.

In:   per stage: what handles an item, the queue that items come by, the queue of the stage behind it.
Out:  running threads: one per stage, or several that take items from one queue.
Cost: as many items as the queues hold, and one in each thread.
Errors: a LatentmillError is told to `fail` with its item; anything else is fatal: told to `on_fatal`, and all stop.

A stage never gives up taking what the one before hands over: after a stop it drops it, so that none of them waits for
another that is gone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import LatentmillError


class Stages:
    """The threads. `on_fatal` is called in the thread that broke, before the others are stopped."""

    def __init__(self, fail: Callable[[Any, LatentmillError], None], on_fatal: Callable[[BaseException], None]) -> None:
        self._fail, self._on_fatal = fail, on_fatal
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def stopping(self) -> bool:
        """Whether items are dropped by now."""
        return self._stopping.is_set()

    def start(
        self,
        name: str,
        inbox: queue.Queue[Any],
        *handles: Callable[[Any], None],
        outbox: queue.Queue[Any] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Start a stage, a thread per handle. A None in `inbox` ends it: then `at_end`, and a None into `outbox`."""
        running = _Countdown(len(handles))
        for handle in handles:
            arguments = (handle, inbox, running, outbox, at_end)
            thread = threading.Thread(target=self._run, args=arguments, name=f"latentmill-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Have items dropped from now on."""
        self._stopping.set()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the threads, which end by a None into the first one's inbox; for all of them at most so long."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(
        self,
        handle: Callable[[Any], None],
        inbox: queue.Queue[Any],
        running: _Countdown,
        outbox: queue.Queue[Any] | None,
        at_end: Callable[[], None] | None,
    ) -> None:
        while (item := inbox.get()) is not None:
            try:
                if not self._stopping.is_set():
                    handle(item)
            except LatentmillError as error:
                self._fail(item, error)
            except BaseException as error:  # noqa: BLE001 (a dead stage must never look alive, whatever killed it)
                self._on_fatal(error)
            del item  # Or its frames would stay until the next one comes.
        if not running.is_last():
            inbox.put(None)  # for the next of the stage's threads
            return
        if at_end is not None:
            at_end()
        if outbox is not None:
            outbox.put(None)


class _Countdown:
    """Tells the last of so many threads that it is the last."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, threading.Lock()

    def is_last(self) -> bool:
        """To be asked once by each."""
        with self._lock:
            self._count -= 1
            return not self._count
