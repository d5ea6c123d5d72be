"""The program that runs in a decode process: `python -m pipeline.decode.child <frames' fd> <limits as JSON>`.

In:   JSON lines on stdin: {"probe": source} or {"decode": requests, "offsets": of each window's frames in the shared
    memory}, each with "seconds", the time allowed. With "stream_stop", a position, the only request's only window is a
    piece of a longer one that ends there.
Out:  JSON lines on stdout: {"ready": true} once, then one reply per line; frames go into the shared memory.
Cost: one decode at a time, in an address space of its own with a limit.
Errors: LatentmillErrors travel as replies, and so does want of memory, after which the owner replaces the process.
    Anything else ends the process with a traceback, and the owner decides whom to blame.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

import av.logging
import numpy as np

from pipeline.decode.backend import decode_pieces, decode_windows, probe_media
from pipeline.decode.frame_memory import FrameView
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest, MediaSource, Window
from pipeline.decode.wire import Json, error_to_json, outcome_to_json, requests_from_json
from pipeline.errors import DecodeError, LatentmillError

# The owner kills at the time allowed, of which waiting for a core is no part. This is for a child whose owner has died
# while it hangs: the system ends it at an alarm that nothing handles, though native code may hold the GIL.
_GRACE_SECONDS = 24 * 3600.0
# The encoder's threads go first where cores are short: what they wait for is decoded by then, or else they sleep.
_NICENESS = 5


def serve(memory: FrameView, limits: DecodeLimits) -> None:
    """Answer requests until the owner closes the pipe."""
    replies = _private_stdout()
    os.nice(_NICENESS)
    av.logging.set_level(None)
    logging.disable()  # Pillow's complaints about broken files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = Answers(memory, limits)
    _send(replies, {"ready": True})
    for line in sys.stdin.buffer:
        message = json.loads(line)
        _limit_memory(limits.memory_bytes + memory.size_bytes)
        signal.setitimer(signal.ITIMER_REAL, message["seconds"] + _GRACE_SECONDS)
        reply = answers.to(message)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)
        if not answers.has_stream:
            _drop_cycles()


class Answers:
    """Replies to messages; remembers the stream that is under way."""

    def __init__(self, memory: FrameView, limits: DecodeLimits) -> None:
        self._memory, self._limits = memory, limits
        self._stream: _Stream | None = None

    @property
    def has_stream(self) -> bool:
        """Whether a stream may go on."""
        return self._stream is not None

    def to(self, message: Json) -> Json:
        """The reply to one message."""
        try:
            if "probe" in message:
                return {"info": dataclasses.asdict(probe_media(MediaSource(**message["probe"]), self._limits))}
            return self._decoded(message)
        except LatentmillError as error:
            return error_to_json(error)
        except MemoryError:
            return {"out_of_memory": True}

    def _decoded(self, message: Json) -> Json:
        """Outcomes, and the seconds they took: of the processor, and beside those."""
        requests = list(requests_from_json(message["decode"]))
        offsets, stop = iter(message["offsets"]), message.get("stream_stop")
        cpu, wall = time.process_time(), time.perf_counter()
        outcomes = [outcome_to_json(one) for request in requests for one in self._outcomes(request, offsets, stop)]
        cpu_seconds = time.process_time() - cpu
        wait_seconds = max(0.0, time.perf_counter() - wall - cpu_seconds)
        return {"outcomes": outcomes, "cpu_seconds": cpu_seconds, "wait_seconds": wait_seconds}

    def _outcomes(self, request: DecodeRequest, offsets: Iterator[int], stop: int | None) -> Sequence[DecodeOutcome]:
        frames = [self._memory.array(next(offsets), shape) for shape in request.frame_shapes]
        if stop is None:
            self._stream = None  # nobody asked for its rest
            return decode_windows(request, self._limits, frames)
        stream, self._stream = self._stream, None
        if stream is None or not stream.goes_on(request, stop):
            stream = _Stream(request, stop, self._limits)
        outcome = stream.next_piece(frames[0])
        self._stream = stream if isinstance(outcome, DecodedClip) and stream.position < stop else None
        return [outcome]


class _Stream:
    """A window's frames, piece by piece, up to position `stop`; a request asks for one piece."""

    def __init__(self, request: DecodeRequest, stop: int, limits: DecodeLimits) -> None:
        (piece,) = request.windows
        self._request, self._stop = dataclasses.replace(request, windows=()), stop
        self._num_frames, self.position = piece.num_frames, piece.start
        whole = dataclasses.replace(request, windows=(Window(piece.start, stop - piece.start),))
        self._pieces = decode_pieces(whole, limits, piece.num_frames)

    def goes_on(self, request: DecodeRequest, stop: int) -> bool:
        """Whether the request's piece is the next one."""
        (piece,) = request.windows
        expected = Window(self.position, min(self._num_frames, self._stop - self.position))
        return (dataclasses.replace(request, windows=()), stop, piece) == (self._request, self._stop, expected)

    def next_piece(self, out: np.ndarray) -> DecodeOutcome:
        """The next piece, its frames copied to `out`."""
        try:
            clip = next(self._pieces)
        except DecodeError as error:
            return error
        out[...] = clip.frames
        self.position += len(out)
        return clip


def _drop_cycles() -> None:
    """Free the decoders that are done: PyAV's containers lie in cycles, which keep some 50 MB of frames.

    What is left is imported modules, which need no look the next time.
    """
    gc.collect()
    gc.freeze()


def _private_stdout() -> IO[bytes]:
    """The reply pipe, moved away from descriptor 1, so that a native library's chatter cannot break the protocol."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _limit_memory(size_bytes: int) -> None:
    """As far as the system's own limit (`ulimit -v`) lets us."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = size_bytes if hard == resource.RLIM_INFINITY else min(size_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _send(replies: IO[bytes], reply: Json) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def main() -> None:
    """Entry point of the decode process."""
    serve(FrameView(int(sys.argv[1])), DecodeLimits(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
