"""A bound on bytes under way between threads: decoded frames that are asked for and not yet encoded.

In:   sizes to acquire and to release, from any thread.
Out:  a wait until they fit; the peak.
Cost: one lock per call.
Errors: none; a closed window refuses.
"""

from __future__ import annotations

import threading

LEAST_WINDOW_MB = 512
"""Unless a user says otherwise."""


class ByteWindow:
    """At most `limit_bytes` acquired and not yet released; `peak_bytes` is the most that ever were."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._used_bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, num_bytes: int, at_least_bytes: int = 0) -> bool:
        """Wait until the bytes fit under the limit, or under `at_least_bytes` if that is more. False once closed."""
        limit_bytes = max(self.limit_bytes, at_least_bytes, num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._used_bytes + num_bytes <= limit_bytes)
            if self._closed:
                return False
            self._used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._used_bytes)
            return True

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._used_bytes -= num_bytes
            self._changed.notify_all()

    def wait_until_empty(self) -> None:
        """Wait until nothing is acquired, or the window is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._used_bytes)

    def close(self) -> None:
        """Let every waiter go, and take nobody any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
