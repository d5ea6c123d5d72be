"""Autoencoders that diffusers saved: which classes, and the probe that holds each to what is written of it.

In:   a directory of config.json and diffusion_pytorch_model.safetensors, and the config's class name.
Out:  an EncoderCard from config and hashes alone; or a loaded VideoEncoder.
Cost: loading runs a probe of 1 + 2 strides frames of two by two latent pixels, twice where the class streams.
Errors: EncoderSourceError for a class that is not in RULES or a missing package; CheckpointError for damaged files;
      EncoderProbeError when the model's latents are not what geometry and streaming promise.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from models.errors import INSTALL_DIFFUSERS, CheckpointError, EncoderProbeError, EncoderSourceError
from models.pretrained import cogvideox, cosmos, hunyuan, images, ltx, magvit, mochi, vidtok, wan
from models.pretrained.rules import Config, EncoderRule
from models.spec import EncoderCard, Geometry, VideoEncoder
from models.streamed import ChunkedEncoder, EncodesChunks
from models.weights import fingerprint, read_table
from models.whole import WholeEncoder

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PROBE_TOLERANCE_STD = 0.05
"""Far above rounding (TF32: about 1e-3 of a standard deviation), far below any real difference (0.2 and more)."""

RULES: Mapping[str, EncoderRule] = MappingProxyType(
    {
        "AutoencoderDC": images.DC_IMAGE,
        "AutoencoderKL": images.KL_IMAGE,
        "AutoencoderKLCogVideoX": cogvideox.COGVIDEOX,
        "AutoencoderKLCosmos": cosmos.COSMOS,
        "AutoencoderKLHunyuanVideo": hunyuan.HUNYUAN,
        "AutoencoderKLHunyuanVideo15": hunyuan.HUNYUAN_15,
        "AutoencoderKLLTX2Video": ltx.LTX2,
        "AutoencoderKLLTXVideo": ltx.LTX,
        "AutoencoderKLMagvit": magvit.MAGVIT,
        "AutoencoderKLMochi": mochi.MOCHI,
        "AutoencoderKLQwenImage": wan.QWEN_IMAGE,
        "AutoencoderKLWan": wan.WAN,
        "AutoencoderVidTok": vidtok.VIDTOK,
    }
)


def describe_diffusers(directory: Path, class_name: str, config: Config) -> EncoderCard:
    """The card of a saved autoencoder; hashes its weights, builds nothing."""
    rule = find_rule(directory, class_name)
    weights = directory / WEIGHTS_FILE
    try:
        geometry = rule.geometry(config)
        normaliser = rule.normaliser(config, weights)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json: not a usable {class_name} config: {error}") from error
    if len(normaliser.mean) != geometry.channels:
        raise CheckpointError(
            f"{directory}: the normaliser has {len(normaliser.mean)} channels, the latent {geometry.channels}"
        )
    identity = {
        name: value for name, value in config.items() if not name.startswith("_") and name not in rule.normaliser_fields
    }
    strides = f"{geometry.temporal_stride}x{geometry.spatial_stride}x{geometry.spatial_stride}"
    return EncoderCard(
        name=f"{class_name}-{strides}x{geometry.channels}",
        kind=class_name,
        geometry=geometry,
        normaliser=normaliser,
        fingerprint=fingerprint(class_name, identity, weights, without=rule.normaliser_tensors),
        posterior=rule.posterior(config),
    )


def load_diffusers(
    directory: Path, class_name: str, config: Config, device: str, compute_dtype: torch.dtype
) -> VideoEncoder:
    """Load in float32, probe, then cast to the compute dtype."""
    card = describe_diffusers(directory, class_name, config)
    vae = _load_module(directory, class_name)
    rule = RULES[class_name]
    probe = _Probe(f"{directory}: {class_name} of diffusers {importlib.metadata.version('diffusers')}", card.geometry)
    if rule.whole is not None:
        whole = rule.whole(vae)
        probe.run("whole", lambda clip: whole.encode(clip).mean)
        return WholeEncoder(card, whole, device, compute_dtype)
    assert rule.streamed is not None
    reference = probe.run("whole", lambda clip: rule.reference(vae, clip))
    backend = rule.streamed(vae)
    streamed = probe.run("in chunks", lambda clip: _encode_streamed(backend, clip, card.geometry.temporal_stride))
    probe.compare(streamed, reference)
    return ChunkedEncoder(card, backend, device, compute_dtype)


class _Probe:
    """A tiny clip on the grid, and what an encoder must make of it."""

    def __init__(self, what: str, geometry: Geometry) -> None:
        side, frames = 2 * geometry.spatial_stride, 1 + 2 * geometry.temporal_stride
        generator = torch.Generator().manual_seed(0)
        self.what = what
        self.clip = torch.rand(1, 3, frames, side, side, generator=generator) * 2 - 1
        self.wanted = (1, *geometry.latent_shape(frames, side, side))

    def run(self, how: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The latent, when it has the shape that the geometry promises."""
        try:
            with torch.inference_mode():
                latent = encode(self.clip)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise EncoderProbeError(f"{self.what} cannot encode {how}: {error}") from error
        if tuple(latent.shape) != self.wanted:
            raise EncoderProbeError(
                f"{self.what}, encoding {how}, makes {tuple(latent.shape)} of a clip of {tuple(self.clip.shape)} "
                f"where its config promises {self.wanted}"
            )
        return latent

    def compare(self, streamed: Tensor, reference: Tensor) -> None:
        """Refuse a stream that changes latents."""
        difference = ((streamed - reference).abs().max() / reference.std()).item()
        if not difference <= PROBE_TOLERANCE_STD:
            raise EncoderProbeError(
                f"{self.what} gives other latents in chunks than whole, by {difference:.3g} of their standard "
                f"deviation; nothing above {PROBE_TOLERANCE_STD} is accepted"
            )


def find_rule(directory: Path, class_name: str) -> EncoderRule:
    """How a class is encoded with.

    Raises:
        EncoderSourceError: we do not know; the message lists those that we do.
    """
    if class_name not in RULES:
        raise EncoderSourceError(
            f"{directory}: {class_name} is not supported; supported are {', '.join(sorted(RULES))}, "
            "and checkpoints that latentmill trained"
        )
    return RULES[class_name]


def _load_module(directory: Path, class_name: str) -> Any:
    read_table(directory / WEIGHTS_FILE)
    try:
        import diffusers
    except ImportError as error:
        raise EncoderSourceError(f"{directory}: {class_name} needs diffusers: {INSTALL_DIFFUSERS}") from error
    if not hasattr(diffusers, class_name):
        raise EncoderSourceError(
            f"{directory}: diffusers {diffusers.__version__} has no {class_name}: {INSTALL_DIFFUSERS} -U"
        )
    vae, report = getattr(diffusers, class_name).from_pretrained(
        str(directory),
        torch_dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{directory}/{WEIGHTS_FILE}: does not fit its config at {wrong[:4]} ({len(wrong)} in all)"
        )
    return vae.eval().requires_grad_(requires_grad=False)


def _encode_streamed(backend: EncodesChunks, clip: Tensor, stride: int) -> Tensor:
    state, means = None, []
    for chunk in (clip[:, :, :1], clip[:, :, 1 : 1 + stride], clip[:, :, 1 + stride :]):
        posterior, state = backend.encode_chunk(chunk, state)
        means.append(posterior.mean)
    return torch.cat(means, dim=2)
