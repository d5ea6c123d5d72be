"""Tiny random autoencoders, ours and of every supported class of diffusers, saved and loaded the way a user does it.

In:   a Case, a directory.
Out:  Saved: the loaded encoder, and the untouched module's plain answers to compare with.
Cost: a few hundredths of a second each.
Errors: none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor

from models.autoencoder import CausalAutoencoder
from models.checkpoint import save_checkpoint
from models.config import BackboneConfig, ModelConfig, Pyramid
from models.encoders import load_encoder
from models.spec import Normaliser


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of diffusers, a tiny config, and what its encoder must turn out to be."""

    class_name: str
    config: dict[str, Any]
    strides: tuple[int, int]
    channels: int = 4
    causality: str = "causal"
    posterior: bool = True


WAN = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True], "z_dim": 4}
WAN_21 = {**WAN, "base_dim": 8, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
WAN_22 = {
    **WAN_21,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "decoder_base_dim": 8,
    "scale_factor_spatial": 16,
}
LTX_09 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (1,) * 5,
    "decoder_block_out_channels": (8, 8, 16, 16),
    "decoder_layers_per_block": (1,) * 5,
    "scaling_factor": 0.5,
}
LTX_095 = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16, 16, 16),
    "layers_per_block": (1,) * 5,
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (True,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
LTX_2 = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": (1,) * 5,
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_causal": False,
    "scaling_factor": 0.5,
}
BLOCKS = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
VIDTOK = {"ch": 8, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": 4}
MOCHI = {
    "latent_channels": 4,
    "encoder_block_out_channels": (32,) * 4,  # its GroupNorm has 32 groups
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 3.0, 4.0],
    "scaling_factor": 0.5,
}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8,) * 4,
    "decode_block_out_channels": (8,) * 4,
    "num_layers": 1,
    "resolution": 512,
    "attention_resolutions": (128,),
}
KL_IMAGE = {
    **BLOCKS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
DC_BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
DC_IMAGE = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "scaling_factor": 0.5,
    **{f"{half}_block_types": DC_BLOCKS for half in ("encoder", "decoder")},
    **{f"{half}_block_out_channels": (8, 8, 16) for half in ("encoder", "decoder")},
    **{f"{half}_layers_per_block": (1, 1, 1) for half in ("encoder", "decoder")},
    **{f"{half}_qkv_multiscales": ((), (), (5,)) for half in ("encoder", "decoder")},
}
HUNYUAN_15 = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16), "layers_per_block": 1}
QWEN_IMAGE = {**WAN, "base_dim": 8, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
VIDTOK_FSQ = {**VIDTOK, "double_z": False, "regularizer": "fsq", "codebook_size": 8**4}

OURS = ModelConfig(
    BackboneConfig(2, ((2, 2), (2, 2)), Pyramid((8, 16, 16), 1), Pyramid((8, 16, 16), 1), latent_channels=4)
)

STREAMED: Mapping[str, Case] = MappingProxyType(
    {
        "wan-2.1": Case("AutoencoderKLWan", WAN_21, (4, 8)),
        "wan-2.2": Case("AutoencoderKLWan", WAN_22, (4, 16)),
        "qwen-image": Case("AutoencoderKLQwenImage", QWEN_IMAGE, (4, 8)),
        "ltx-0.9": Case("AutoencoderKLLTXVideo", LTX_09, (8, 32), channels=8),
        "ltx-0.9.5": Case("AutoencoderKLLTXVideo", LTX_095, (8, 32), channels=8),
        "ltx-2": Case("AutoencoderKLLTX2Video", LTX_2, (8, 32), channels=8),
        "vidtok-kl": Case("AutoencoderVidTok", VIDTOK, (4, 8)),
        "vidtok-fsq": Case("AutoencoderVidTok", VIDTOK_FSQ, (4, 8), posterior=False),
        "vidtok-2x8x8": Case("AutoencoderVidTok", {**VIDTOK, "tempo_ds": [1], "tempo_us": [2]}, (2, 8)),
        "easyanimate": Case("AutoencoderKLMagvit", BLOCKS, (4, 8)),
        "kl-image": Case("AutoencoderKL", KL_IMAGE, (1, 8)),
        "dc-image": Case("AutoencoderDC", DC_IMAGE, (1, 4), posterior=False),
        "ours": Case("ours", {}, (4, 8)),
    }
)
WHOLE: Mapping[str, Case] = MappingProxyType(
    {
        "hunyuanvideo": Case("AutoencoderKLHunyuanVideo", BLOCKS, (4, 8), causality="none"),
        "hunyuanvideo-1.5": Case("AutoencoderKLHunyuanVideo15", HUNYUAN_15, (4, 16), causality="causal-attention"),
        "cogvideox": Case("AutoencoderKLCogVideoX", BLOCKS, (4, 8), causality="none"),
        "cosmos": Case("AutoencoderKLCosmos", COSMOS, (8, 8), causality="causal-attention", posterior=False),
        "mochi": Case("AutoencoderKLMochi", MOCHI, (6, 8), causality="causal-attention"),
    }
)


class Saved:
    """An encoder, the directory it was loaded from, and the untouched module to compare with."""

    def __init__(self, case: Case, directory: Path) -> None:
        torch.manual_seed(0)
        self.case = case
        self.temporal, self.spatial = case.strides
        self.directory = directory
        self.module = self._save_ours() if case.class_name == "ours" else self._save_diffusers()
        self.encoder = load_encoder(str(directory))

    def _save_ours(self) -> torch.nn.Module:
        module = CausalAutoencoder(OURS).eval()
        for weight in module.parameters():
            if weight.ndim == 5:  # layers that start at zero would hide a broken residual block
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        save_checkpoint(self.directory, module, Normaliser((0.0,) * 4, (1.0,) * 4))
        return module

    def _save_diffusers(self) -> torch.nn.Module:
        module = getattr(diffusers, self.case.class_name)(**self.case.config).eval()
        if "LTX" in self.case.class_name:
            module.latents_mean += torch.arange(8.0)
            module.latents_std *= 3.0
        if self.case.config.get("regularizer") == "fsq":
            module.encoder.conv_out.conv.weight.data *= 20  # else every value is of the codebook's middle
        module.save_pretrained(self.directory)
        return module

    def clip(self, latent_frames: int, batch: int = 1) -> Tensor:
        """Noise of two by three latent pixels: decoders that pad by reflection need two."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch, 1 + self.temporal * (latent_frames - 1), 2 * self.spatial, 3 * self.spatial, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def whole(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        """The module's own mean and log-variance, from the pixels as the field scales them: [-1, 1]."""
        pixels = clip.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.inference_mode():
            if self.temporal == 1:
                images = [self._moments(pixels[:, :, index]) for index in range(pixels.shape[2])]
                return tuple(None if one[0] is None else torch.stack(one, dim=2) for one in zip(*images, strict=True))
            if self.case.class_name == "AutoencoderVidTok":
                pixels = torch.cat([pixels[:, :, :1]] * (self.temporal - 1) + [pixels], dim=2)
            return self._moments(pixels)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self.module.encode(pixels)
        if self.case.class_name == "ours":
            return encoded.mean, encoded.logvar
        if isinstance(encoded, tuple):
            return encoded[0], None
        if hasattr(encoded, "latent"):
            return encoded.latent, None
        return encoded.latent_dist.mode(), getattr(encoded.latent_dist, "logvar", None)

    def decoded(self, latents: Tensor) -> Tensor:
        """The module's own pixels, as 0 to 255, B T H W 3, not rounded."""
        with torch.inference_mode():
            if self.temporal == 1:
                images = [self.module.decode(latents[:, :, index]).sample for index in range(latents.shape[2])]
                pixels = torch.stack(images, dim=2)
            else:
                answer = self.module.decode(latents)
                pixels = getattr(answer, "sample", answer)
        return ((pixels + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 4, 1)


def difference_std(actual: Tensor, expected: Tensor) -> float:
    """Root mean square difference, in standard deviations of what was expected."""
    assert actual.shape == expected.shape
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()
