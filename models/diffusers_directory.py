"""Autoencoders that diffusers saved: what each class promises, and the probe that holds it to it.

In:   a directory of config.json and diffusion_pytorch_model.safetensors, and the config's class name.
Out:  an EncoderCard from config and hashes alone; or a loaded VideoEncoder.
Cost: loading runs a probe of 1 + 2 strides frames of one latent pixel, twice.
Errors: EncoderSourceError for a class that is not in RULES or a missing package; CheckpointError for damaged files;
      EncoderProbeError when the model's latents are not what geometry and streaming promise.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from models import ltx, wan
from models.errors import INSTALL_DIFFUSERS, CheckpointError, EncoderProbeError, EncoderSourceError
from models.spec import EncoderCard, Geometry, Normaliser
from models.streamed import Backend, ChunkedEncoder
from models.weights import fingerprint, read_table

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PROBE_TOLERANCE_STD = 0.05
"""Far above rounding (TF32: about 1e-3 of a standard deviation), far below any real difference (0.2 and more)."""

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class EncoderRule:
    """What is known of one diffusers class. All of them here are strictly causal, and take pixels in [-1, 1].

    `normaliser_fields` and `normaliser_tensors` stay out of the fingerprint: they do not change a latent.
    """

    geometry: Callable[[Config], Geometry]
    normaliser: Callable[[Config, Path], Normaliser]
    backend: Callable[[Any], Backend]
    normaliser_fields: frozenset[str]
    normaliser_tensors: frozenset[str] = frozenset()


RULES: Mapping[str, EncoderRule] = MappingProxyType(
    {
        "AutoencoderKLWan": EncoderRule(wan.wan_geometry, wan.wan_normaliser, wan.WanBackend, wan.NORMALISER_FIELDS),
        "AutoencoderKLLTXVideo": EncoderRule(
            ltx.ltx_geometry, ltx.ltx_normaliser, ltx.LtxBackend, ltx.NORMALISER_FIELDS, ltx.NORMALISER_TENSORS
        ),
    }
)


def describe_diffusers(directory: Path, class_name: str, config: Config) -> EncoderCard:
    """The card of a saved autoencoder; hashes its weights, builds nothing."""
    rule = _rule(directory, class_name)
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
        posterior=True,
    )


def load_diffusers(
    directory: Path, class_name: str, config: Config, device: str, compute_dtype: torch.dtype
) -> ChunkedEncoder:
    """Load in float32, probe, then cast to the compute dtype."""
    card = describe_diffusers(directory, class_name, config)
    vae = _load_module(directory, class_name)
    clip = _probe_clip(card.geometry)
    with torch.inference_mode():
        reference: Tensor = vae.encode(clip).latent_dist.mode()
    backend = RULES[class_name].backend(vae)
    try:
        streamed = _encode_streamed(backend, clip, card.geometry.temporal_stride)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise EncoderProbeError(f"{directory}: {_versions(class_name)} cannot be streamed: {error}") from error
    wanted = (1, *card.geometry.latent_shape(*clip.shape[2:]))
    for how, latent in (("whole", reference), ("in chunks", streamed)):
        if tuple(latent.shape) != wanted:
            raise EncoderProbeError(
                f"{directory}: {_versions(class_name)}, encoding {how}, makes {tuple(latent.shape)} of a clip of "
                f"{tuple(clip.shape)} where its config promises {wanted}"
            )
    difference = ((streamed - reference).abs().max() / reference.std()).item()
    if not difference <= PROBE_TOLERANCE_STD:
        raise EncoderProbeError(
            f"{directory}: {_versions(class_name)} gives other latents in chunks than whole, by {difference:.3g} "
            f"of their standard deviation; nothing above {PROBE_TOLERANCE_STD} is accepted"
        )
    return ChunkedEncoder(card, backend, device, compute_dtype)


def _rule(directory: Path, class_name: str) -> EncoderRule:
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


def _probe_clip(geometry: Geometry) -> Tensor:
    side = 2 * geometry.spatial_stride
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, 1 + 2 * geometry.temporal_stride, side, side, generator=generator) * 2 - 1


def _encode_streamed(backend: Backend, clip: Tensor, stride: int) -> Tensor:
    state, means = None, []
    with torch.inference_mode():
        for chunk in (clip[:, :, :1], clip[:, :, 1 : 1 + stride], clip[:, :, 1 + stride :]):
            posterior, state = backend.encode_chunk(chunk, state)
            means.append(posterior.mean)
    return torch.cat(means, dim=2)


def _versions(class_name: str) -> str:
    return f"{class_name} of diffusers {importlib.metadata.version('diffusers')}"
