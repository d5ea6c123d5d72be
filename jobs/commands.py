"""The commands, by the words that call them: their flags, and the function that runs them.

In:   nothing.
Out:  COMMANDS.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: none.
"""

from __future__ import annotations

import dataclasses
import importlib

from jobs.bench.config import BenchDecode, BenchEncode, BenchModel, BenchScale, BenchTrain
from jobs.compare.config import Compare
from jobs.evaluate.config import Evaluate
from jobs.flags import ConfigFile
from jobs.generate_config import Interpolate, Sample, Synthesize
from jobs.store_config import Encode, Index, PlanCommand, Reconstruct, Status, Verify
from jobs.train.config import Train, TrainPrior


@dataclasses.dataclass(frozen=True)
class Command:
    """A command's flags, and its `module:function`, imported when it runs and no sooner."""

    flags: type[ConfigFile]
    runner: str


COMMANDS = {
    "index": Command(Index, "jobs.index:run_index"),
    "plan": Command(PlanCommand, "jobs.prepare:run_plan"),
    "encode": Command(Encode, "jobs.encode:run_encode"),
    "status": Command(Status, "jobs.inspect_store:run_status"),
    "verify": Command(Verify, "jobs.inspect_store:run_verify"),
    "reconstruct": Command(Reconstruct, "jobs.inspect_store:run_reconstruct"),
    "sample": Command(Sample, "jobs.generate:run_sample"),
    "interpolate": Command(Interpolate, "jobs.generate:run_interpolate"),
    "train": Command(Train, "jobs.train.command:run_train"),
    "evaluate": Command(Evaluate, "jobs.evaluate.command:run_evaluate"),
    "compare": Command(Compare, "jobs.compare.command:run_compare"),
    "train prior": Command(TrainPrior, "jobs.train.prior:run_train_prior"),
    "synthesize": Command(Synthesize, "jobs.synthesize:run_synthesize"),
    "bench decode": Command(BenchDecode, "jobs.bench.decode:run_bench_decode"),
    "bench encode": Command(BenchEncode, "jobs.bench.encode:run_bench_encode"),
    "bench model": Command(BenchModel, "jobs.bench.model:run_bench_model"),
    "bench scale": Command(BenchScale, "jobs.bench.scale:run_bench_scale"),
    "bench train": Command(BenchTrain, "jobs.bench.train:run_bench_train"),
}


def run(flags: ConfigFile) -> int:
    """Run the command that these flags belong to; returns the exit code."""
    runner = next(command.runner for command in COMMANDS.values() if command.flags is type(flags))
    module, _, function = runner.partition(":")
    code: int = getattr(importlib.import_module(module), function)(flags)
    return code
