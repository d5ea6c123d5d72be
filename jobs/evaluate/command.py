"""`evaluate`: what an autoencoder loses on clips that it was not trained on, beside baselines of its rate.

In:   held-out tars, one or more encoders, and the tars that baselines are fitted to.
Out:  Evaluations; evaluation.json, evaluation.md and contact_sheet.png.
Cost: per clip and encoder one encode and decode, and the metrics: about 10 ms a 256 x 256 frame for each codec.
Errors: UsageError for flags that cannot be; FailureLimitError when no clip is left to judge.
"""

from __future__ import annotations

import sys
import tempfile
import time

import torch

from jobs.device import local_device
from jobs.evaluate.clip_codecs import open_codec
from jobs.evaluate.clips import IndexedShards, decode_clips, spread
from jobs.evaluate.config import Evaluate, EvaluateSettings
from jobs.evaluate.judge import Fitted, Judge
from jobs.evaluate.report import write_report
from jobs.flags import RecipeFlags
from jobs.prepare import describe_encoder, make_recipe
from pipeline.decode.pool import ProcessPool
from pipeline.decode_requests import Decoders
from pipeline.errors import UsageError
from pipeline.evaluation import Evaluation
from pipeline.recipe import EncodeConfig
from pipeline.storage import LocalStorage

SHOWN_CLIPS = 8
_PROGRESS_SECONDS = 10.0


def run_evaluate(command: Evaluate) -> int:
    """`latentmill evaluate SHARDS... --encoder DIR... --output DIR`."""
    if not command.shards or not command.encoder:
        raise UsageError("evaluate needs SHARDS, the held-out tars, and at least one --encoder")
    if command.output.exists():
        raise UsageError(f"--output {command.output} exists already: name a new directory, or remove it")
    for source in command.encoder:  # before minutes are spent on the first
        flags = _recipe_flags(source, command.settings)
        make_recipe(flags, describe_encoder(flags)[0])
    torch.set_num_threads(command.threads)
    decode = command.engine
    with tempfile.TemporaryDirectory() as scratch, ProcessPool(decode.decode_processes, decode.decode_limits) as pool:
        storage = LocalStorage(scratch)
        held_out = IndexedShards.index(storage, command.shards, decode)
        baseline = IndexedShards.index(storage, command.baseline_shards, decode) if command.baseline_shards else None
        evaluations = []
        for source in command.encoder:
            print(f"evaluate: {source}", file=sys.stderr, flush=True)
            evaluations.append(evaluate_encoder(source, held_out, pool, command.settings, baseline))
    paths = write_report(command.output, command, held_out.urls, baseline.urls if baseline else (), evaluations)
    for evaluation in evaluations:
        scores = evaluation.codecs[0].scores
        print(f"{evaluation.encoder}: {scores.psnr:.2f} dB, SSIM {scores.ssim:.4f}, {len(evaluation.clips)} clips")
    print(f"evaluate: {', '.join(map(str, paths))}")
    return 0


def evaluate_encoder(
    source: str,
    held_out: IndexedShards,
    decoders: Decoders,
    settings: EvaluateSettings,
    baseline: IndexedShards | None = None,
) -> Evaluation:
    """Judge one encoder, whatever `encode --encoder` takes, on every held-out clip, one at a time.

    PCA and ELBO need `baseline`, the clips they are fitted to. The same arguments give the same record.

    Raises:
        UsageError: the encoder or a network cannot be loaded, or the flags do not fit it. FailureLimitError: no
            held-out clip could be judged; the message says why.
    """
    device = local_device(settings.device)
    codec = open_codec(source, settings.dtype, device, settings.compute_dtype)
    recipe = make_recipe(_recipe_flags(source, settings), codec.encoder.card)
    fitted = Fitted.to(baseline, held_out, codec, recipe, decoders, settings.baseline_clips)
    num_clips, told = held_out.count(recipe), time.monotonic()
    judge = Judge(codec, fitted, settings, device, spread(num_clips, SHOWN_CLIPS))
    for number, (clip, frames) in enumerate(decode_clips(held_out.clips(recipe), recipe, decoders), start=1):
        judge.take(clip, frames)
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"evaluate: {number} of {num_clips} clips", file=sys.stderr, flush=True)
    return judge.result(source, held_out, recipe)


def _recipe_flags(source: str, settings: EvaluateSettings) -> RecipeFlags:
    encode = EncodeConfig(dtype=settings.dtype, compute_dtype=settings.compute_dtype, batch_size=1)
    return RecipeFlags(source, settings.sampling, settings.buckets, settings.filters, encode, settings.decoder)
