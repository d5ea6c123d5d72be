"""AutoencoderKLMagvit of diffusers (EasyAnimate, Xu et al., arXiv:2405.18991), streamed exactly both ways.

In:   a diffusers config, or a loaded module.
Out:  the class's rule; a StreamingBackend.
Cost: one chunk's activations; the state holds two frames per causal convolution.
Errors: CheckpointError for a model whose GroupNorm crosses time.

diffusers encodes the first frame and then 4 frames at a time; any multiple of 4 gives the same latents. Its layers keep
the past on themselves, and a call that fails leaves it there for the next one: here every call gets its state from
the caller and leaves the layers clean. Threads may share the encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.causal import State
from models.errors import CheckpointError
from models.pretrained.lent_state import LentState
from models.pretrained.rules import LOGVAR_RANGE, SCALING_FACTOR, Config, EncoderRule, scaling_factor_normaliser
from models.spec import Geometry, Posterior

if TYPE_CHECKING:
    from torch import Tensor


def magvit_geometry(config: Config) -> Geometry:
    """Each block but the last halves H and W; the spatio-temporal ones among them halve T as well."""
    if not config["spatial_group_norm"]:
        raise CheckpointError("spatial_group_norm=False lets later frames into earlier latents and is not supported")
    downs = config["down_block_types"][: len(config["block_out_channels"]) - 1]
    return Geometry(
        temporal_stride=2 ** sum(kind == "SpatialTemporalDownBlock3D" for kind in downs),
        spatial_stride=2 ** len(downs),
        channels=config["latent_channels"],
    )


class MagvitBackend:
    """An AutoencoderKLMagvit; the state of a stream is a dictionary that comes in and goes out."""

    one_at_a_time = True

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.encoder_layers = LentState(vae.encoder, "prev_features")
        self.decoder_layers = LentState(vae.decoder, "prev_features")

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        with self.encoder_layers.lend(state or {}) as following:
            features = self.vae.encoder(pixels)
        mean, logvar = self.vae.quant_conv(features).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), following

    def decode_chunk(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Latent frames one by one: the decoder takes more than one at a time for something else."""
        following, pixels = state or {}, []
        for latent in self.vae.post_quant_conv(latents).split(1, dim=2):
            with self.decoder_layers.lend(following) as following:
                pixels.append(self.vae.decoder(latent))
        return torch.cat(pixels, dim=2), following

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, dtype)  # diffusers' own `to` logs a needless warning


MAGVIT = EncoderRule(
    magvit_geometry, scaling_factor_normaliser, streamed=MagvitBackend, normaliser_fields=SCALING_FACTOR
)
