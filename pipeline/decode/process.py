"""A decoder that can be killed: one warm child process, its time limit, and whom to blame when it dies.

In:   DecodeRequests and MediaSources, one at a time.
Out:  outcomes whose arrays own their memory; MediaInfo.
Cost: per request two JSON lines and one copy of the frames; per child about 0.3 s to start.
Errors: bad media is a DecodeError outcome: `crash`, `timeout` or `out_of_memory` for a window that ended two processes.
    ShardError and UnitError from storage, and UnitError when no child can be started, are raised.

Native decoders crash, and hang while they hold the GIL (dmlc/decord#373), where no signal handler or thread in the
same process helps. The child is a fresh interpreter, never a fork of this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from pipeline.decode.arena import Arena
from pipeline.decode.backend import damage
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import DecodeOutcome, DecodeRequest, MediaInfo, MediaSource
from pipeline.decode.wire import Json, error_from_json, outcomes_from_json, request_to_json
from pipeline.errors import DecodeError, UnitError

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_STRIKES = 2
_START_SECONDS = 120.0  # imports from a cold network file system


class _ChildLost(Exception):  # noqa: N818 (an event, told to the caller as a DecodeError)
    """The child ended, or must end, before it replied."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text


class DecodeProcess:
    """One child at a time, started when first needed and replaced when it is lost or has served its number of clips.

    Threads may share it and are served in turn. `child_module` is run with `python -m`.
    """

    def __init__(self, limits: DecodeLimits, child_module: str = "pipeline.decode.child") -> None:
        self._limits, self._child_module = limits, child_module
        self._child: _Child | None = None
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
            except _ChildLost:
                pass
            try:
                return MediaInfo(**self._exchange(message, seconds)["info"])
            except _ChildLost as lost:
                raise _blame(source, lost) from lost

    def decode(self, request: DecodeRequest) -> tuple[DecodeOutcome, ...]:
        """One outcome per window, in the request's order.

        Raises:
            ShardError: the source cannot be opened.
            UnitError: reading it broke off, or no child can be started.
        """
        if not request.windows:
            return ()
        with self._busy:
            try:
                return self._attempt(request)
            except _ChildLost as lost:
                if len(request.windows) == 1:
                    return (self._decode_single(request, lost),)
            outcomes = dict(self._decode_singles(request))
        return tuple(outcomes[position] for position in range(len(request.windows)))

    def close(self) -> None:
        """Kill the child; a request that another thread waits for ends with UnitError."""
        with self._state:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        with self._busy:
            self._discard_child()

    def _decode_singles(self, request: DecodeRequest) -> Iterator[tuple[int, DecodeOutcome]]:
        """Each window by itself, by the end of the window: a later one decodes all that an earlier one did.

        So once a window has run out of time twice, those after it need not be tried.
        """
        windows = request.windows
        timeout: DecodeError | None = None
        for position in sorted(range(len(windows)), key=lambda k: windows[k].start + windows[k].num_frames):
            outcome: DecodeOutcome = timeout or self._decode_single(
                dataclasses.replace(request, windows=(windows[position],))
            )
            if isinstance(outcome, DecodeError) and outcome.reason == "timeout":
                timeout = outcome
            yield position, outcome

    def _decode_single(self, request: DecodeRequest, lost: _ChildLost | None = None) -> DecodeOutcome:
        """One window, until it is decoded or has ended two processes, `lost` being the first."""
        for _ in range(_STRIKES - (lost is not None)):
            try:
                return self._attempt(request)[0]
            except _ChildLost as now:
                lost = now
        assert lost is not None
        return _blame(request.source, lost)

    def _attempt(self, request: DecodeRequest) -> tuple[DecodeOutcome, ...]:
        child = self._running_child()
        child.arena.grow(request.decoded_bytes)
        child.clips_served += len(request.windows)
        reply = self._exchange({"decode": request_to_json(request)}, self._limits.decode_seconds(request))
        outcomes = outcomes_from_json(reply["outcomes"], child.arena.frames(request))
        if child.clips_served >= self._limits.clips_per_process:
            self._discard_child()
        return outcomes

    def _exchange(self, message: Json, seconds: float) -> Json:
        child = self._running_child()
        try:
            reply = child.exchange(message | {"seconds": seconds}, seconds)
        except _ChildLost:
            self._discard_child()
            if self._closed:
                self._raise_closed()
            raise
        if "out_of_memory" in reply:
            self._discard_child()
            raise _ChildLost("out_of_memory", f"needs more than {self._limits.memory_bytes} bytes")
        if "error" in reply:
            raise error_from_json(reply)
        return reply

    def _running_child(self) -> _Child:
        with self._state:
            if self._closed:
                self._raise_closed()
            if self._child is None:
                self._child = _Child(self._child_module, self._limits)
            child = self._child
        if not child.ready:
            try:
                child.wait_until_ready()
            except _ChildLost as lost:
                self._discard_child()
                raise UnitError(f"cannot start {self._child_module}: {lost.text}; see its stderr") from lost
        return child

    def _discard_child(self) -> None:
        with self._state:
            child, self._child = self._child, None
        if child is not None:
            child.release()

    def _raise_closed(self) -> NoReturn:
        raise UnitError("the decode process was closed")


class _Child:
    """A running child program with its pipes and its arena."""

    def __init__(self, module: str, limits: DecodeLimits) -> None:
        self.arena = Arena.create()
        self.ready = False
        self.clips_served = 0
        command = [sys.executable, "-P", "-m", module, str(self.arena.fd), json.dumps(dataclasses.asdict(limits))]
        paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self.arena.fd,),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.pid = self._process.pid

    def wait_until_ready(self) -> None:
        """Raises _ChildLost when the program does not come up."""
        self._read(_START_SECONDS)
        self.ready = True

    def exchange(self, message: Json, seconds: float) -> Json:
        """Send one message and wait for its reply; the child is killed when the time is over.

        Raises:
            _ChildLost: it ended, by itself or by the limit.
        """
        return self._read(seconds, json.dumps(message).encode() + b"\n")

    def _read(self, seconds: float, line: bytes = b"") -> Json:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        # Killing ends any wait on the pipes, in either direction.
        timer = threading.Timer(seconds, expire)
        timer.start()
        try:
            _write(self._pipe(self._process.stdin), line)
            reply = self._pipe(self._process.stdout).readline()
        finally:
            timer.cancel()
        if expired.is_set():
            raise _ChildLost("timeout", f"not done after {seconds:.0f} seconds")
        if not reply.endswith(b"\n"):
            raise _ChildLost("crash", f"the decode process ended with {_ending(self._process.wait())}")
        fields: Json = json.loads(reply)
        return fields

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def kill(self) -> None:
        """End the program; whoever waits for its reply is told."""
        self._process.kill()

    def release(self) -> None:
        """End the program and give its pipes, its memory and its process entry back."""
        self.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()
        self.arena.close()


def _write(pipe: IO[bytes], line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # reading the reply will tell
        pipe.write(line)
        pipe.flush()


def _ending(return_code: int) -> str:
    return f"exit code {return_code}" if return_code >= 0 else signal.Signals(-return_code).name


def _blame(source: MediaSource, lost: _ChildLost) -> DecodeError:
    return damage(source, lost.reason, f"{lost.text}, {_STRIKES} times")
