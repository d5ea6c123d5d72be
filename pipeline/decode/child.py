"""The program that runs in a decode process: `python -m pipeline.decode.child <arena fd> <limits as JSON>`.

In:   JSON lines on stdin: {"probe": source} or {"decode": request}, each with "seconds", the time allowed.
Out:  JSON lines on stdout: {"ready": true} once, then one reply per line; frames go into the arena.
Cost: one decode at a time, in an address space of its own with a limit.
Errors: LatentmillErrors travel as replies, and so does want of memory, after which the owner replaces the process.
    Anything else ends the process with a traceback, and the owner decides whom to blame.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import resource
import sys
from typing import IO

import av.logging

from pipeline.decode.arena import Arena
from pipeline.decode.backend import decode_windows, probe_media
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import MediaSource
from pipeline.decode.wire import Json, error_to_json, outcome_to_json, request_from_json
from pipeline.errors import LatentmillError

# The owner kills at the time allowed. This is for a child whose owner has died while it hangs.
_GRACE_SECONDS = 5.0


def serve(arena: Arena, limits: DecodeLimits) -> None:
    """Answer requests until the owner closes the pipe."""
    replies = _private_stdout()
    av.logging.set_level(None)
    logging.disable()  # Pillow's complaints about broken files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(replies, {"ready": True})
    for line in sys.stdin.buffer:
        message = json.loads(line)
        _limit_memory(limits.memory_bytes + arena.size_bytes)
        faulthandler.dump_traceback_later(message["seconds"] + _GRACE_SECONDS, exit=True)
        reply = answer(message, arena, limits)
        faulthandler.cancel_dump_traceback_later()
        _send(replies, reply)


def answer(message: Json, arena: Arena, limits: DecodeLimits) -> Json:
    """The reply to one message."""
    try:
        if "probe" in message:
            return {"info": dataclasses.asdict(probe_media(MediaSource(**message["probe"]), limits))}
        request = request_from_json(message["decode"])
        outcomes = decode_windows(request, limits, arena.frames(request))
        return {"outcomes": [outcome_to_json(outcome) for outcome in outcomes]}
    except LatentmillError as error:
        return error_to_json(error)
    except MemoryError:
        return {"out_of_memory": True}


def _private_stdout() -> IO[bytes]:
    """The reply pipe, moved away from descriptor 1, so that a native library's chatter cannot break the protocol."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _limit_memory(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _send(replies: IO[bytes], reply: Json) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def main() -> None:
    """Entry point of the decode process."""
    serve(Arena(int(sys.argv[1])), DecodeLimits(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
