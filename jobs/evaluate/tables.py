"""Evaluations as tables in Markdown: the set, the latents, the clips, and what could not be judged.

In:   Evaluations.
Out:  lines.
Cost: none; pure.
Errors: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from pipeline.evaluation import ClipResult, Evaluation, FailedClip, Scores

MAX_CLIP_LINES = 100
MAX_FAILED_LINES = 50
MAX_SHARDS = 5

Row = dict[str, str | None]

_TEXT_COLUMNS = ("", "clip, worst first", "T x H x W")
_LEGEND = """\
A clip's PSNR and SSIM (Gaussian window of 11, sigma 1.5, on 8-bit RGB) are means over its frames, a set's over its
clips. Temporal PSNR is that of the changes from frame to frame. Flicker is by how many 8-bit levels a pixel changes
more than in the source. Rate counts what is kept: values as they are stored, or codes at a fixed length; the ratio is
against 24 bits per pixel. A baseline keeps as many values per latent position as the encoder; of codes, the fewest
whose bits are not below theirs. PCA is of patches at the encoder's strides; bicubic makes every frame small and large
again, at the next size up."""
_FVD_LEGEND = "rFVD is of the whole set. It is biased upwards in small ones: compare it over equal sets only."
_POSTERIOR_LEGEND = """\
KL is against a unit Gaussian. ELBO is a lower bound on the log-density of a clip's pixels, and its bits an upper bound
on theirs, under a Gaussian around the decoded frames, whose std (of pixels in [-1, 1]) was fitted to the baseline."""


def markdown(held_out: Sequence[str], baseline: Sequence[str], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """The whole report. `held_out` and `baseline` are the urls of tars."""
    yield "# Evaluation"
    yield ""
    yield f"Held out: {_shards(held_out)}. Baselines fitted to: {_shards(baseline) if baseline else 'no tars'}."
    for evaluation in evaluations:
        yield ""
        yield from _summary(evaluation)
    yield from _section("Reconstruction", _codec_table(evaluations))
    yield ""
    yield _LEGEND
    if any(codec.frechet_distance is not None for evaluation in evaluations for codec in evaluation.codecs):
        yield _FVD_LEGEND
    yield from _section("Posteriors", _posterior_table(evaluations))
    yield from _section("Codes", _code_table(evaluations))
    for evaluation in evaluations:
        name = f"{_text(evaluation.encoder)} {evaluation.fingerprint[:12]}"
        yield from _section(f"Clips: {name}", _clips(evaluation))
        yield from _section(f"Not judged: {name}", _not_judged(evaluation))


def _summary(evaluation: Evaluation) -> Iterator[str]:
    clips, failed, filtered = len(evaluation.clips), len(evaluation.failed), sum(evaluation.filtered.values())
    name = f"{_text(evaluation.encoder)} {evaluation.fingerprint[:12]} ({_text(evaluation.source)})"
    yield f"{name}: clips judged {clips}, failed {failed}, samples filtered {filtered}."
    fitted = evaluation.baseline
    if fitted is None:
        yield "No --baseline-shards: no PCA, no ELBO."
        return
    yield f"PCA: clips fitted to {fitted.clips}, failed {fitted.failed}."
    if fitted.held_out_shards:
        yield f"**It was fitted to held-out tars as well, which flatters it: {_shards(fitted.held_out_shards)}.**"


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    """A headline and its lines; nothing where there are none."""
    body = list(lines)
    if body:
        yield from ("", f"## {title}", "", *body)


def _codec_table(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    return _table([row for evaluation in evaluations for row in _codec_rows(evaluation)])


def _codec_rows(evaluation: Evaluation) -> Iterator[Row]:
    for number, codec in enumerate(evaluation.codecs):
        name, rate, scores = _text(codec.name), codec.rate, codec.scores
        yield {
            "": name if number else f"**{name}** {evaluation.fingerprint[:12]}",
            "values / px": _number(rate.numbers_per_pixel, 4),
            "bits / px": _number(rate.bits_per_pixel, 4),
            "ratio": _number(rate.compression_ratio, 1),
            **_score_cells(scores),
            "rFVD": _number(codec.frechet_distance, 1),
        }


def _score_cells(scores: Scores) -> Row:
    return {
        "PSNR dB": _number(scores.psnr, 2),
        "SSIM": _number(scores.ssim, 4),
        "temporal PSNR dB": _number(scores.temporal_psnr, 2),
        "flicker": _number(scores.flicker, 2),
        "LPIPS": _number(scores.lpips, 4),
    }


def _posterior_table(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    rows: list[Row] = [
        {
            "": _text(evaluation.encoder),
            "KL, nats per latent value": _number(latent.kl, 4),
            "ELBO, nats per clip": _number(latent.elbo, 1),
            "bits per pixel value": _number(latent.elbo_bits_per_dimension, 3),
            "likelihood std": _number(latent.likelihood_scale, 4),
        }
        for evaluation in evaluations
        if (latent := evaluation.latent).kl is not None
    ]
    if rows:
        yield from (*_table(rows), "", _POSTERIOR_LEGEND)


def _code_table(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    return _table(
        [
            {
                "": _text(evaluation.encoder),
                "codebook": str(number),
                "codes": str(codes.codebook_size),
                "ids seen": str(codes.seen),
                "codes used": str(codes.used),
                "usage": f"{codes.usage:.1%}",
                "perplexity": _number(codes.perplexity, 1),
            }
            for evaluation in evaluations
            for number, codes in enumerate(evaluation.latent.codes)
        ]
    )


def _clips(evaluation: Evaluation) -> Iterator[str]:
    worst_first = sorted(evaluation.clips, key=lambda clip: clip.scores[0].psnr)
    baselines = [codec.name for codec in evaluation.codecs[1:]]
    yield from _table([_clip_row(clip, baselines) for clip in worst_first[:MAX_CLIP_LINES]])
    if len(worst_first) > MAX_CLIP_LINES:
        yield ""
        yield f"The {MAX_CLIP_LINES} worst of {len(worst_first)} by PSNR; evaluation.json has all."


def _clip_row(clip: ClipResult, baselines: Sequence[str]) -> Row:
    own, *others = clip.scores
    return {
        "clip, worst first": _clip_name(clip),
        "T x H x W": clip.bucket,
        **_score_cells(own),
        **{f"{name} dB": _number(scores.psnr, 2) for name, scores in zip(baselines, others, strict=True)},
        "KL": _number(clip.kl, 3),
        "bits per value": _number(clip.elbo_bits_per_dimension, 3),
    }


def _clip_name(clip: ClipResult | FailedClip) -> str:
    return _text(f"{PurePosixPath(clip.shard).name}:{clip.key}" + (f" window {clip.window}" if clip.window else ""))


def _not_judged(evaluation: Evaluation) -> Iterator[str]:
    for reason, count in evaluation.filtered.items():
        yield f"- filtered, {reason}: {count} samples"
    for clip in evaluation.failed[:MAX_FAILED_LINES]:
        detail = f": {_text(clip.detail)}" if clip.detail else ""
        yield f"- failed, {clip.reason}: {_clip_name(clip)}{detail}"
    if len(evaluation.failed) > MAX_FAILED_LINES:
        yield f"- and {len(evaluation.failed) - MAX_FAILED_LINES} more, which evaluation.json names"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of one set of columns; a column without a single value is left out."""
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]
    if columns:
        yield f"| {' | '.join(columns)} |"
        yield f"|{'|'.join('---' if name in _TEXT_COLUMNS else '---:' for name in columns)}|"
    for row in rows:
        yield f"| {' | '.join(row[name] or 'none' for name in columns)} |"


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _shards(urls: Sequence[str]) -> str:
    named = ", ".join(_text(url) for url in urls[:MAX_SHARDS])
    return named + (f" and {len(urls) - MAX_SHARDS} more" if len(urls) > MAX_SHARDS else "")


def _text(text: str) -> str:
    """Text that stays inside its cell: keys may hold anything."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
