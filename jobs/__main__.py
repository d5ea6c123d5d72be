"""The entry point: `latentmill COMMAND ...`, also `python -m jobs COMMAND ...`.

In:   sys.argv.
Out:  an exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C (143 by SIGTERM); the same command goes on.
Cost: imports what the command needs, no more.
Errors: none; they are printed in one sentence. Errors that nobody foresaw keep their traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jobs import config
from jobs.cli import parse
from pipeline.errors import LatentmillError, UsageError

_RUNNERS: dict[type[config.ConfigFile], tuple[str, str]] = {
    config.Index: ("jobs.prepare", "run_index"),
    config.PlanCommand: ("jobs.prepare", "run_plan"),
    config.Encode: ("jobs.encode", "run_encode"),
    config.Status: ("jobs.inspect_store", "run_status"),
    config.Verify: ("jobs.inspect_store", "run_verify"),
    config.Reconstruct: ("jobs.inspect_store", "run_reconstruct"),
    config.Sample: ("jobs.generate", "run_sample"),
    config.Interpolate: ("jobs.generate", "run_interpolate"),
    config.Train: ("jobs.train", "run_train"),
    config.TrainPrior: ("jobs.train_prior", "run_train_prior"),
    config.Synthesize: ("jobs.synthesize", "run_synthesize"),
    config.BenchDecode: ("jobs.bench_decode", "run_bench_decode"),
    config.BenchModel: ("jobs.bench_model", "run_bench_model"),
}


def _run(command: config.ConfigFile) -> int:
    """Import what the command needs, and no more."""
    module, function = _RUNNERS[type(command)]
    code: int = getattr(importlib.import_module(module), function)(command)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        return _run(command)
    except LatentmillError as error:
        print(f"latentmill: {type(error).__name__}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("latentmill: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
