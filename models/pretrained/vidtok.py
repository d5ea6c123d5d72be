"""AutoencoderVidTok (VidTok, Tang et al., arXiv:2412.13061), causal models, KL and FSQ; its encoder streamed exactly.

In:   a diffusers config, or a loaded module.
Out:  the class's rule; a Backend whose encoder works chunk by chunk.
Cost: one chunk's activations; the state holds each causal layer's last kernel - stride input frames.
Errors: CheckpointError for a model that is not causal.

The encoder maps k * stride frames to k latent frames and pads nothing. As its authors do, stride - 1 copies of the
first frame are put before a clip, so that 1 + stride * k frames become 1 + k; what the decoder makes of them is cut
off. An FSQ model has no posterior: its latent is the quantised one, which is what its decoder takes. The decoder
interpolates over time and so looks one latent frame ahead: it decodes whole. Threads may share the encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.causal import State
from models.errors import CheckpointError
from models.pretrained.lent_state import LentState
from models.pretrained.rules import LOGVAR_RANGE, Config, EncoderRule
from models.spec import Geometry, Normaliser, Posterior

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


def vidtok_geometry(config: Config) -> Geometry:
    """Levels named in `spatial_ds` halve H and W; those of them in `tempo_ds` halve T as well."""
    if not config["is_causal"]:
        raise CheckpointError("only the causal VidTok models are supported, got is_causal=False")
    levels = len(config["ch_mult"])
    spatial = list(range(levels - 1)) if config["spatial_ds"] is None else config["spatial_ds"]
    temporal = [levels - 2, levels - 3] if config["tempo_ds"] is None else config["tempo_ds"]
    return Geometry(2 ** len(set(spatial) & set(temporal)), 2 ** len(spatial), config["z_channels"])


def vidtok_normaliser(config: Config, _weights: Path) -> Normaliser:
    """None: VidTok names no statistics."""
    channels = config["z_channels"]
    return Normaliser((0.0,) * channels, (1.0,) * channels, formula="identity, the model has none")


def has_posterior(config: Config) -> bool:
    """A KL model has one, an FSQ model has not."""
    return bool(config["regularizer"] == "kl")


def vidtok_latent(vae: Any, clip: Tensor) -> Tensor:
    """The untouched module's own latent of pixels B 3 T H W."""
    answer: Any = vae(clip, sample_posterior=False, encoder_mode=True)
    latent: Tensor = answer if has_posterior(vae.config) else answer[0]
    return latent


class _CausalLayers(LentState):
    """VidTok's layers also keep whether a clip starts, and far more frames than they read."""

    def put(self, layer: Any, past: Tensor | None) -> None:
        super().put(layer, past)
        layer.is_first_chunk = past is None

    def kept(self, layer: Any) -> Tensor:
        past = super().kept(layer)
        return past[:, :, past.shape[2] - getattr(layer, "time_pad", 1) :]


class VidTokBackend:
    """A causal AutoencoderVidTok; the state of a stream is a dictionary that comes in and goes out."""

    one_at_a_time = True

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.copies = vidtok_geometry(vae.config).temporal_stride - 1
        self.encoder_layers = _CausalLayers(vae.encoder, "causal_cache")
        self.decoder_layers = _CausalLayers(vae.decoder, "causal_cache")

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        if not state:
            pixels = torch.cat([pixels[:, :, :1].expand(-1, -1, self.copies, -1, -1), pixels], dim=2)
        with self.encoder_layers.lend(state or {}) as following:
            features = self.vae.encoder(pixels)
        if not has_posterior(self.vae.config):
            return Posterior(self.vae.regularization(features)[0], None), following
        mean, logvar = features.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), following

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        with self.decoder_layers.lend({}):
            pixels = self.vae.decoder(latents)
        yield pixels[:, :, self.copies :]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, dtype)  # diffusers' own `to` logs a needless warning


VIDTOK = EncoderRule(
    vidtok_geometry, vidtok_normaliser, streamed=VidTokBackend, reference=vidtok_latent, posterior=has_posterior
)
