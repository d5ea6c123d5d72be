"""Threads in a row, each with a bounded hand-over to the next, that end together and never look alive when one is dead.

In:   per stage: what handles an item, the queue that items come by, the queue of the stage behind it.
Out:  one running thread per stage.
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
        handle: Callable[[Any], None],
        inbox: queue.Queue[Any],
        outbox: queue.Queue[Any] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Start a stage. A None in `inbox` ends it: then `at_end`, and a None into `outbox`."""
        arguments = (handle, inbox, outbox, at_end)
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
        if at_end is not None:
            at_end()
        if outbox is not None:
            outbox.put(None)
