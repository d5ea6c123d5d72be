"""What an evaluation leaves behind: evaluation.json for programs, evaluation.md and contact_sheet.png for people.

In:   the command and its Evaluations.
Out:  the three files in a new directory.
Cost: milliseconds, and the drawing of the sheet.
Errors: UsageError when the directory cannot be written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jobs.evaluate.config import Evaluate
from jobs.evaluate.tables import markdown
from pipeline.contact_sheet import contact_sheet
from pipeline.errors import UsageError
from pipeline.evaluation import Evaluation
from pipeline.store import library_versions

FORMAT_VERSION = 1


def write_report(
    output: Path,
    command: Evaluate,
    held_out: Sequence[str],
    baseline: Sequence[str],
    evaluations: Sequence[Evaluation],
) -> tuple[Path, Path, Path]:
    """Write the three files and return their paths."""
    document = {
        "format_version": FORMAT_VERSION,
        "held_out": list(held_out),
        "baseline": list(baseline),
        "settings": {**dataclasses.asdict(command.settings), "threads": command.threads},
        "libraries": library_versions(),
        "evaluations": [evaluation.to_tree() for evaluation in evaluations],
    }
    paths = output / "evaluation.json", output / "evaluation.md", output / "contact_sheet.png"
    try:
        output.mkdir(parents=True, exist_ok=True)
        contact_sheet(evaluations).save(paths[2])
        paths[1].write_text("\n".join(markdown(held_out, baseline, evaluations)) + "\n", encoding="utf-8")
        paths[0].write_text(_to_json(document), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error}") from error
    return paths


def _to_json(document: object) -> str:
    return json.dumps(document, indent=1, allow_nan=False, default=str) + "\n"  # what is no JSON value is a path
