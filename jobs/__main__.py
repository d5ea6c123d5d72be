"""The entry point: `latentmill COMMAND ...`, also `python -m jobs COMMAND ...`.

In:   sys.argv.
Out:  an exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C (143 by SIGTERM); the same command goes on;
      141 when what is told has no reader any more, as with `| head`.
Cost: imports what the command needs, no more.
Errors: none; they are printed in one sentence. Errors that nobody foresaw keep their traceback.
"""

from __future__ import annotations

import atexit
import gc
import os
import select
import signal
import sys
from collections.abc import Sequence

from pipeline.heap import keep_freed_memory

keep_freed_memory()  # of torch on CPUs; before numpy's threads have arenas of their own

from jobs.cli import parse  # noqa: E402
from jobs.commands import run  # noqa: E402
from pipeline.errors import LatentmillError, UsageError  # noqa: E402

_STDOUT, _STDERR = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    atexit.register(gc.freeze)  # else Python looks for cycles among all of torch's objects before it ends: 0.4 s
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)  # what is left must not fail after this function
    except BrokenPipeError:
        unread = _unread()
        if not unread:
            raise  # some other pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:
            os.dup2(nowhere, stream)  # Python flushes them once more at its end
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str]) -> int:
    try:
        return run(parse(argv))
    except LatentmillError as error:
        print(f"latentmill: {type(error).__name__}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("latentmill: stopped", file=sys.stderr)
        return 130


def _unread() -> list[int]:
    """The standard streams that are pipes which nobody reads."""
    poll = select.poll()
    for stream in (_STDOUT, _STDERR):
        poll.register(stream, 0)
    return [stream for stream, event in poll.poll(0) if event & select.POLLERR]


if __name__ == "__main__":
    sys.exit(main())
