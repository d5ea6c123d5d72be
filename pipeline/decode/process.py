"""A decoder that can be killed: one warm child process, its time limit, and whom to blame when it dies.

In:   DecodeRequests, several in one message where they are small; MediaSources, one at a time.
Out:  outcomes whose arrays are theirs for as long as anything refers to them; MediaInfo.
Cost: per message two JSON lines, and no copy of the frames: their memory is used again when they are dropped; per child
    about 0.3 s to start.
Errors: bad media is a DecodeError outcome: `crash`, `timeout` or `out_of_memory` for a window that ended two processes.
    ShardError and UnitError from storage, and UnitError when no child can be started, are raised.

Native decoders crash, and hang while they hold the GIL (dmlc/decord#373), where no signal handler or thread in the
same process helps. The child is a fresh interpreter, never a fork of this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import NoReturn

from pipeline.decode.backend import damage, pieces_of
from pipeline.decode.child_process import ChildLost, ChildProcess
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest, MediaInfo, MediaSource
from pipeline.decode.wire import Json, error_from_json, outcomes_from_json, requests_to_json
from pipeline.errors import DecodeError, UnitError

_STRIKES = 2
# A film that hangs everywhere, of which hundreds of windows are wanted, would hold its unit up for hours.
_MOST_HANGS = 3


class DecodeProcess:
    """One child at a time, started when first needed and replaced when it is lost or has served its number of clips.

    Threads may share it and are served in turn. `child_module` is run with `python -m`.
    """

    def __init__(self, limits: DecodeLimits, child_module: str = "pipeline.decode.child") -> None:
        self._limits, self._child_module = limits, child_module
        self._child: ChildProcess | None = None
        self._lets_others_first = False
        self._state = threading.Lock()  # guards _child and _closed, never held for long
        self._busy = threading.Lock()  # held while a request is served
        self._closed = False

    def __enter__(self) -> DecodeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, when there is one."""
        return self._child.pid if self._child else None

    def let_others_first(self) -> None:
        """Have the child, and those that replace it, run where nobody else wants a core."""
        with self._state:
            self._lets_others_first = True
            self._apply_scheduling()

    def _apply_scheduling(self) -> None:
        if self._lets_others_first and self._child is not None:
            # Not a niceness: Ray's workers have one of 15 themselves. A child that has ended is found out later.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(self._child.pid, os.SCHED_IDLE, os.sched_param(0))

    def start(self) -> None:
        """Begin to start the child, so that the first request need not wait for all of it.

        Raises:
            UnitError: the system has no process, memory or descriptor for it.
        """
        with self._state:
            if self._child is None and not self._closed:
                try:
                    self._child = ChildProcess(self._child_module, self._limits)
                except OSError as error:
                    raise UnitError(f"cannot start {self._child_module}: {error}") from error
                self._apply_scheduling()

    def probe(self, source: MediaSource) -> MediaInfo:
        """What the media is.

        Raises:
            DecodeError: it is none, or its probe ended two processes.
        """
        message = {"probe": dataclasses.asdict(source)}
        seconds = self._limits.probe_seconds(source)
        with self._busy:
            try:
                return MediaInfo(**self._exchange(message, seconds)["info"])
            except ChildLost:
                pass
            try:
                return MediaInfo(**self._exchange(message, seconds)["info"])
            except ChildLost as lost:
                raise _blame(source, lost) from lost

    def decode(self, *requests: DecodeRequest) -> tuple[DecodeOutcome, ...]:
        """One outcome per window, in order, of requests that go in one message: many small ones then cost less.

        Where the child is lost, every window is decoded by itself, so that its outcome depends on no other. A window
        that hangs takes two time limits; once three of a request have, its others are taken to hang as well.

        Raises:
            ShardError: a source is not there.
            UnitError: it cannot be read at the moment, or no child can be started.
        """
        requests = tuple(request for request in requests if request.windows)
        if not requests:
            return ()
        with self._busy:
            try:
                return self._attempt(requests)
            except ChildLost as lost:
                if sum(len(request.windows) for request in requests) == 1:
                    return (self._decode_single(requests[0], lost),)
            return tuple(itertools.chain.from_iterable(map(self._decode_by_window, requests)))

    def stream(self, request: DecodeRequest, piece_frames: int) -> Generator[DecodedClip, None, None]:
        """The one window of a request as consecutive clips of `piece_frames` frames; the last one may be shorter.

        Together they are what `decode` gives. The time limit holds for each by itself; a child that is lost, or that
        served another thread in between, goes on from the piece that is wanted. Memory is that of one piece.

        Raises:
            DecodeError: the rest cannot be decoded; clips that came before are good.
            ValueError: the request has not exactly one window. ShardError, UnitError: as `decode`.
        """
        (window,) = request.windows
        for piece in pieces_of(window, piece_frames):
            # No variable holds the frames: they would stay until the next ones come.
            yield self._decode_piece(dataclasses.replace(request, windows=(piece,)), window.start + window.num_frames)

    def close(self) -> None:
        """Kill the child; a request that another thread waits for ends with UnitError."""
        with self._state:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        with self._busy:
            self._discard_child()

    def _decode_by_window(self, request: DecodeRequest) -> Iterator[DecodeOutcome]:
        hangs: list[DecodeError] = []
        for window in request.windows:
            if len(hangs) == _MOST_HANGS:
                yield hangs[-1]
                continue
            outcome = self._decode_single(dataclasses.replace(request, windows=(window,)))
            if isinstance(outcome, DecodeError) and outcome.reason == "timeout":
                hangs.append(outcome)
            yield outcome

    def _decode_piece(self, request: DecodeRequest, stream_stop: int) -> DecodedClip:
        with self._busy:
            outcome = self._decode_single(request, stream_stop=stream_stop)
        if isinstance(outcome, DecodeError):
            raise outcome
        return outcome

    def _decode_single(
        self, request: DecodeRequest, lost: ChildLost | None = None, stream_stop: int | None = None
    ) -> DecodeOutcome:
        """One window, until it is decoded or has ended two processes, `lost` being the first."""
        for _ in range(_STRIKES - (lost is not None)):
            try:
                return self._attempt((request,), stream_stop)[0]
            except ChildLost as now:
                lost = now
        assert lost is not None
        return _blame(request.source, lost)

    def _attempt(self, requests: Sequence[DecodeRequest], stream_stop: int | None = None) -> tuple[DecodeOutcome, ...]:
        child = self._running_child()
        frames, offsets = child.memory.lend_all([shape for request in requests for shape in request.frame_shapes])
        child.clips_served += len(frames)
        message: Json = {"decode": requests_to_json(requests), "offsets": offsets}
        # Requests that share a message are small. Should they take longer together, each gets its time by itself.
        seconds = max(map(self._limits.decode_seconds, requests))
        reply = self._exchange(message | {"stream_stop": stream_stop}, seconds)
        outcomes = outcomes_from_json(reply, frames)
        if child.clips_served >= self._limits.clips_per_process:
            self._discard_child()
        return outcomes

    def _exchange(self, message: Json, seconds: float) -> Json:
        child = self._running_child()
        try:
            with self._discarding_on_error():
                reply = child.exchange(message | {"seconds": seconds}, seconds)
        except ChildLost:
            if self._closed:
                self._raise_closed()
            raise
        if "out_of_memory" in reply:
            self._discard_child()
            raise ChildLost("out_of_memory", f"needs more than {self._limits.memory_bytes} bytes")
        if "error" in reply:
            raise error_from_json(reply)
        return reply

    def _running_child(self) -> ChildProcess:
        self.start()
        with self._state:
            child = self._child
        if child is None or self._closed:
            self._raise_closed()
        if not child.ready:
            try:
                with self._discarding_on_error():
                    child.wait_until_ready()
            except ChildLost as lost:
                raise UnitError(f"cannot start {self._child_module}: {lost.text}; see its stderr") from lost
        return child

    @contextlib.contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        """Whatever breaks a wait off, Ctrl-C too: the reply that is still to come would answer the next request."""
        try:
            yield
        except BaseException:
            self._discard_child()
            raise

    def _discard_child(self) -> None:
        with self._state:
            child, self._child = self._child, None
        if child is not None:
            child.release()

    def _raise_closed(self) -> NoReturn:
        raise UnitError("the decode process was closed")


def _blame(source: MediaSource, lost: ChildLost) -> DecodeError:
    return damage(source, lost.reason, f"{lost.text}, {_STRIKES} times")
