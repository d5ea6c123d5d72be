"""The command that judges autoencoders.

In:   nothing.
Out:  frozen dataclasses that tyro turns into flags.
Cost: must import neither torch nor ray: `--help` answers at once.
Errors: UsageError from a record that cannot be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from jobs.cores import usable_cores
from jobs.flags import ConfigFile, DecodeFlags, Device, Shards, require_positive
from pipeline.buckets import BucketConfig
from pipeline.decode.records import DecoderName
from pipeline.filters import FilterConfig
from pipeline.recipe import ComputeDtype, StoreDtype
from pipeline.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Which clips, and what is measured of them."""

    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    filters: FilterConfig = FilterConfig()
    decoder: DecoderName = "auto"
    """auto takes the decoder that is right for the file."""
    dtype: StoreDtype = "float16"
    """Latents are rounded to this type, as a store keeps them, before they are decoded; rates count its bits."""
    compute_dtype: ComputeDtype = "float32"
    """Type the encoder computes in."""
    device: Device = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    baseline_clips: int = 256
    """Fit PCA and the ELBO's likelihood to so many clips of --baseline-shards, evenly over them."""
    elbo_samples: int = 1
    """Samples of the posterior per clip."""
    lpips_weights: Path | None = None
    """Safetensors file of VGG16 or AlexNet with LPIPS weights (models/lpips.py says which); none: no LPIPS."""
    fvd_weights: Path | None = None
    """TorchScript file of I3D for the Fréchet video distance (pipeline/video_features.py); none: no rFVD."""

    def __post_init__(self) -> None:
        require_positive(self, "baseline_clips", "elbo_samples")


@dataclasses.dataclass(frozen=True)
class Evaluate(ConfigFile):
    """Judge autoencoders on held-out tars: reconstruction, rate, latent, beside PCA and bicubic at the same rate."""

    shards: Shards = ()
    """Held-out tars: paths, globs, {000..012} braces, @lists."""
    encoder: tuple[str, ...] = ()
    """Directories of trained models, or hub ids of diffusers models: one or more, in one table."""
    output: Path = tyro.MISSING
    """New directory for evaluation.json, evaluation.md and contact_sheet.png."""
    baseline_shards: tuple[str, ...] = ()
    """Tars to fit PCA and the ELBO's likelihood to: the training tars. None: neither is given."""
    settings: EvaluateSettings = EvaluateSettings()
    threads: int = dataclasses.field(default_factory=usable_cores)
    """CPU threads of the networks. The number changes the last bits of a latent on a CPU."""
    engine: DecodeFlags = DecodeFlags()

    def __post_init__(self) -> None:
        require_positive(self, "threads")
