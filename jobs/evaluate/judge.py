"""The judge of one encoder: fits what has to be fitted, takes held-out clips one by one, and keeps their numbers.

In:   an EncoderCodec; training clips; held-out clips, or why they cannot be judged.
Out:  an Evaluation.
Cost: the metrics: about 10 ms a 256 x 256 frame for each codec; one clip, and a line of numbers per clip, in memory.
Errors: UsageError for networks that cannot be loaded or do not take the clips; FailureLimitError without any clip.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from jobs.evaluate.clip_codecs import BicubicCodec, Codec, EncoderCodec, PcaCodec
from jobs.evaluate.clips import IndexedShards, decode_clips, spread
from jobs.evaluate.config import EvaluateSettings
from jobs.evaluate.networks import FrechetDistances, open_lpips
from jobs.evaluate.posterior import PosteriorNumbers, fit_likelihood, judge_posterior
from models.generative.bounds import bits_per_dimension
from models.generative.likelihoods import Gaussian
from pipeline.decode_requests import Decoders
from pipeline.errors import FailureLimitError, SampleError, UsageError
from pipeline.evaluation import (
    Baseline,
    ClipResult,
    CodecResult,
    Evaluation,
    FailedClip,
    LatentResult,
    Rate,
    Scores,
    ShownClip,
    mean_scores,
    score,
)
from pipeline.placement import Clip
from pipeline.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What is fitted to training clips, before the held-out ones are looked at."""

    codecs: tuple[Codec, ...]
    likelihood: Gaussian | None
    baseline: Baseline | None

    @classmethod
    def to(
        cls,
        shards: IndexedShards | None,
        held_out: IndexedShards,
        codec: EncoderCodec,
        recipe: Recipe,
        decoders: Decoders,
        num_clips: int,
    ) -> Fitted:
        """Fitted to `num_clips` clips of the shards, evenly over them; without shards there is bicubic alone.

        Raises:
            UsageError: nothing can be fitted to them.
        """
        if shards is None:
            return cls((BicubicCodec(codec),), None, None)
        failed: Counter[str] = Counter()
        chosen = spread(shards.count(recipe), num_clips)

        def clips() -> Iterator[np.ndarray]:
            failed.clear()
            picked = (clip for number, clip in enumerate(shards.clips(recipe)) if number in chosen)
            for _, frames in decode_clips(picked, recipe, decoders):
                if isinstance(frames, SampleError):
                    failed[frames.reason] += 1
                else:
                    yield frames

        try:
            pca = PcaCodec.fit(codec, clips())
        except ValueError as error:
            raise UsageError(f"--baseline-shards: {error}") from error
        likelihood = fit_likelihood(codec.encoder, clips()) if codec.encoder.card.posterior else None
        shared = tuple(sorted(set(shards.urls) & set(held_out.urls)))
        baseline = Baseline(len(chosen) - failed.total(), failed.total(), shared)
        return cls((pca, BicubicCodec(codec)), likelihood, baseline)


class Judge:
    """Takes held-out clips one by one, and keeps their numbers."""

    def __init__(
        self, codec: EncoderCodec, fitted: Fitted, settings: EvaluateSettings, device: str, shown: frozenset[int]
    ) -> None:
        self.codec, self.fitted, self.settings = codec, fitted, settings
        self.codecs: tuple[Codec, ...] = (codec, *fitted.codecs)
        self.lpips = open_lpips(settings.lpips_weights, device)
        self.distances = FrechetDistances(settings.fvd_weights, device, len(self.codecs))
        self.shown_numbers, self.due, self.taken = shown, 0, 0
        self.shown: list[ShownClip] = []
        self.clips: list[ClipResult] = []
        self.failed: list[FailedClip] = []
        self.rates = [Rate(0, 0.0, 0)] * len(self.codecs)
        self.elbo_nats: list[float] = []
        self.elbo_dimensions = 0

    def take(self, clip: Clip, frames: np.ndarray | SampleError) -> None:
        """Judge one clip, or note why it cannot be."""
        # A clip that fails leaves its place on the sheet to the next one that does not.
        self.due += self.taken in self.shown_numbers
        self.taken += 1
        try:
            if isinstance(frames, SampleError):
                raise frames
            self._judge(clip, frames)
        except SampleError as error:
            place = clip.sample.key, clip.shard_url, clip.window_index
            self.failed.append(FailedClip(*place, error.reason, error.detail))

    def _judge(self, clip: Clip, frames: np.ndarray) -> None:
        posterior = self.codec.encode(frames)
        reconstructions = [self.codec.decode(posterior.mean)]
        reconstructions += [baseline.reconstruct(frames) for baseline in self.fitted.codecs]
        valid = slice(0, clip.window.num_frames)
        scores = tuple(score(frames[valid], made[valid], self.lpips) for made in reconstructions)
        numbers = judge_posterior(
            self.codec.encoder, posterior, frames, self.fitted.likelihood, self.settings.elbo_samples
        )
        self.codec.count_codes(posterior.mean)
        self.distances.update([clip_frames[valid] for clip_frames in (frames, *reconstructions)])
        self.rates = [rate + codec.rate(clip.bucket) for rate, codec in zip(self.rates, self.codecs, strict=True)]
        self.clips.append(self._clip_result(clip, scores, numbers, frames.size))
        if self.due:
            self.due -= 1
            middle = clip.window.num_frames // 2
            pictures = tuple(made[middle].copy() for made in reconstructions)
            place = clip.sample.key, clip.window_index
            self.shown.append(ShownClip(*place, frames[middle].copy(), pictures, scores))

    def _clip_result(
        self, clip: Clip, scores: tuple[Scores, ...], numbers: PosteriorNumbers | None, dimensions: int
    ) -> ClipResult:
        bits = None
        if numbers is not None and numbers.elbo is not None:
            self.elbo_nats.append(numbers.elbo)
            self.elbo_dimensions += dimensions
            bits = _bits_per_dimension(numbers.elbo, dimensions)
        place = clip.sample.key, clip.shard_url, clip.window_index, clip.bucket.name
        return ClipResult(*place, scores, None if numbers is None else numbers.kl, bits)

    def result(self, source: str, held_out: IndexedShards, recipe: Recipe) -> Evaluation:
        """All that was found.

        Raises:
            FailureLimitError: no clip could be judged.
        """
        filtered: Counter[str] = Counter()
        for url, unplaced in held_out.unplaced(recipe):
            if unplaced.status == "filtered":
                filtered[unplaced.reason] += 1
            else:
                self.failed.append(FailedClip(unplaced.sample.key, url, None, unplaced.reason, unplaced.detail))
        if not self.clips:
            raise FailureLimitError(_nothing_judged(source, filtered, self.failed))
        card = self.codec.encoder.card
        return Evaluation(
            source,
            card.name,
            card.fingerprint,
            tuple(self._codec_results()),
            self._latent_result(),
            tuple(self.clips),
            tuple(self.failed),
            dict(sorted(filtered.items())),
            self.fitted.baseline,
            tuple(self.shown),
        )

    def _codec_results(self) -> Iterator[CodecResult]:
        for number, codec in enumerate(self.codecs):
            scores = mean_scores([clip.scores[number] for clip in self.clips])
            yield CodecResult(codec.name, self.rates[number], scores, self.distances.result(number))

    def _latent_result(self) -> LatentResult:
        kl = [clip.kl for clip in self.clips if clip.kl is not None]
        nats, likelihood = math.fsum(self.elbo_nats), self.fitted.likelihood
        codes = tuple(counts.usage() for level in self.codec.counts for counts in level)
        return LatentResult(
            kl=math.fsum(kl) / len(kl) if kl else None,
            elbo=nats / len(self.elbo_nats) if self.elbo_nats else None,
            elbo_bits_per_dimension=_bits_per_dimension(nats, self.elbo_dimensions) if self.elbo_nats else None,
            likelihood_scale=None if likelihood is None else likelihood.scale,
            codes=codes,
        )


def _bits_per_dimension(nats: float, dimensions: int) -> float:
    return float(bits_per_dimension(torch.tensor(nats, dtype=torch.float64), dimensions))


def _nothing_judged(source: str, filtered: Counter[str], failed: Sequence[FailedClip]) -> str:
    reasons = filtered + Counter(clip.reason for clip in failed)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "they hold no samples"
    return (
        f"no clip of the held-out shards could be judged with {source}: {told}. `short_video` is a video of fewer "
        "frames than --frames; `latentmill index` names what cannot be read"
    )
