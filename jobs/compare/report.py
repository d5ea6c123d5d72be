"""What a comparison leaves behind: comparison.md for people, comparison.json for programs.

In:   the command and what became of each recipe.
Out:  the two files.
Cost: milliseconds.
Errors: UsageError when the directory cannot be written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.compare.config import Compare
from models.config import ModelConfig
from pipeline.errors import UsageError
from pipeline.evaluation import Evaluation
from pipeline.store import library_versions

FORMAT_VERSION = 1

_LEGEND = """\
Latent: strides in time, height and width, and values per position, as a store keeps them. Bits: of the stored values,
or of the codes at a fixed length. PSNR, SSIM and temporal PSNR (of the changes from frame to frame) are means over the
held-out clips. Codes: those that the held-out clips used, of those there are, and the perplexity of their use, one
pair per codebook. PCA and bicubic: PSNR of PCA of patches at the same strides, fitted to the tars trained on, and of
making every frame small and large again, both with at least as many bits. Seconds: of training, on the machine as
busy as it was."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One recipe: why there is no model that could be judged; or the model, what it took, and how good it is."""

    name: str
    failure: str | None = None
    config: ModelConfig | None = None
    steps: int | None = None
    seconds: float | None = None
    evaluation: Evaluation | None = None

    def to_tree(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            **{name: getattr(self, name) for name in ("name", "failure", "steps", "seconds")},
            "config": self.config.as_json() if self.config else None,
            "evaluation": self.evaluation.to_tree() if self.evaluation else None,
        }


def write_comparison(
    command: Compare, shards: Sequence[str], held_out: Sequence[str], results: Sequence[Compared]
) -> tuple[Path, Path]:
    """Write the two files and return their paths. `shards` and `held_out` are the urls of tars."""
    document = {
        "format_version": FORMAT_VERSION,
        "shards": list(shards),
        "held_out": list(held_out),
        "settings": {**dataclasses.asdict(command.settings), "threads": command.threads},
        "libraries": library_versions(),
        "recipes": [result.to_tree() for result in results],
    }
    paths = command.output / "comparison.md", command.output / "comparison.json"
    try:
        paths[0].write_text("\n".join(markdown(results, len(shards), len(held_out))) + "\n", encoding="utf-8")
        paths[1].write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {command.output} cannot be written: {error}") from error
    return paths


def markdown(results: Sequence[Compared], num_shards: int, num_held_out: int) -> Iterator[str]:
    """The table, best PSNR first, what failed, and what the columns are."""
    judged = [(result, result.evaluation) for result in results if result.evaluation is not None]
    judged.sort(key=lambda pair: -pair[1].codecs[0].scores.psnr)
    clips = max((len(evaluation.clips) for _, evaluation in judged), default=0)
    yield f"{len(results)} recipes, trained on {num_shards} tars and judged on {clips} clips of {num_held_out} others."
    rows = [_row(result, evaluation) for result, evaluation in judged]
    if rows:
        yield ""
        yield f"| {' | '.join(rows[0])} |"
        yield f"|{'|'.join('---' if name in ('recipe', 'kind', 'latent') else '---:' for name in rows[0])}|"
        yield from (f"| {' | '.join(row.values())} |" for row in rows)
        yield from ("", _LEGEND)
    failed = [result for result in results if result.failure is not None]
    if failed:
        yield ""
        yield from (f"- **{result.name} failed**: {result.failure}" for result in failed)


def _row(result: Compared, evaluation: Evaluation) -> dict[str, str]:
    assert result.config is not None
    own, geometry = evaluation.codecs[0], result.config.geometry
    baselines = {codec.name: codec.scores.psnr for codec in evaluation.codecs[1:]}
    codes = evaluation.latent.codes
    stride = geometry.spatial_stride
    return {
        "recipe": result.name,
        "kind": result.config.kind,
        "latent": f"{geometry.temporal_stride}x{stride}x{stride}, {geometry.channels}",
        "bits / px": f"{own.rate.bits_per_pixel:.3f}",
        "steps": _or_none(result.steps, ".0f"),
        "seconds": _or_none(result.seconds, ".0f"),
        "PSNR dB": f"{own.scores.psnr:.2f}",
        "SSIM": f"{own.scores.ssim:.3f}",
        "temporal PSNR dB": _or_none(own.scores.temporal_psnr, ".2f"),
        "codes (perplexity)": ", ".join(f"{code.used}/{code.codebook_size} ({code.perplexity:.0f})" for code in codes),
        "PCA dB": _or_none(baselines.get("PCA"), ".2f"),
        "bicubic dB": _or_none(baselines.get("bicubic"), ".2f"),
    }


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
