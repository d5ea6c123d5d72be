"""The entry point: `latentmill COMMAND ...`, also `python -m jobs COMMAND ...`.

In:   sys.argv.
Out:  an exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C (143 by SIGTERM); the same command goes on.
Cost: imports what the command needs, no more.
Errors: none; they are printed in one sentence. Errors that nobody foresaw keep their traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import parse
from jobs.commands import run
from pipeline.errors import LatentmillError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except LatentmillError as error:
        print(f"latentmill: {type(error).__name__}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("latentmill: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
