"""The released, full-size configs of the supported classes: what a bench builds with random weights.

In:   nothing; this module is data.
Out:  name -> (class name, constructor arguments).
Cost: none; imports neither torch nor diffusers.
Errors: none.

What is left out is the constructor's default, which in diffusers 0.42 is the released value. A normaliser's numbers do
not matter to a bench: where a class has no default for them, they are neutral here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Released = tuple[str, Mapping[str, Any]]

WAN_21: Released = ("AutoencoderKLWan", {})  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers

WAN_22: Released = (  # Wan-AI/Wan2.2-TI2V-5B-Diffusers
    "AutoencoderKLWan",
    {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
)

QWEN_IMAGE: Released = ("AutoencoderKLQwenImage", {})  # Qwen/Qwen-Image

LTX_09: Released = ("AutoencoderKLLTXVideo", {})  # Lightricks/LTX-Video

LTX_095: Released = (  # Lightricks/LTX-Video-0.9.5
    "AutoencoderKLLTXVideo",
    {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (4, 6, 6, 2, 2),
        "spatio_temporal_scaling": (True,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5,) * 4,
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2,) * 3,
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
)

LTX_2: Released = (  # Lightricks/LTX-2
    "AutoencoderKLLTX2Video",
    {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
)

VIDTOK_KL: Released = ("AutoencoderVidTok", {})  # converted from microsoft/VidTok, vidtok_kl_causal_488_4chn

VIDTOK_FSQ: Released = (  # converted from microsoft/VidTok, vidtok_fsq_causal_488_262144
    "AutoencoderVidTok",
    {"z_channels": 6, "double_z": False, "regularizer": "fsq", "codebook_size": 262144},
)

MAGVIT: Released = ("AutoencoderKLMagvit", {})  # alibaba-pai/EasyAnimateV5.1-12b-zh

HUNYUAN: Released = ("AutoencoderKLHunyuanVideo", {})  # hunyuanvideo-community/HunyuanVideo

HUNYUAN_15: Released = (  # hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v
    "AutoencoderKLHunyuanVideo15",
    {},
)

COGVIDEOX_2B: Released = ("AutoencoderKLCogVideoX", {})  # THUDM/CogVideoX-2b

COSMOS: Released = ("AutoencoderKLCosmos", {})  # nvidia/Cosmos-1.0-Tokenizer-CV8x8x8

MOCHI: Released = ("AutoencoderKLMochi", {})  # genmo/mochi-1-preview

FLUX: Released = (  # black-forest-labs/FLUX.1-dev
    "AutoencoderKL",
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)

SD: Released = (  # stabilityai/sd-vae-ft-mse
    "AutoencoderKL",
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 256,
    },
)

DC_F32: Released = (  # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers
    "AutoencoderDC",
    {
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
)

_CONFIGS: Mapping[str, Released] = MappingProxyType(
    {
        "wan-2.1": WAN_21,
        "wan-2.2": WAN_22,
        "qwen-image": QWEN_IMAGE,
        "ltx-0.9": LTX_09,
        "ltx-0.9.5": LTX_095,
        "ltx-2": LTX_2,
        "vidtok-kl": VIDTOK_KL,
        "vidtok-fsq": VIDTOK_FSQ,
        "easyanimate": MAGVIT,
        "hunyuanvideo": HUNYUAN,
        "hunyuanvideo-1.5": HUNYUAN_15,
        "cogvideox-2b": COGVIDEOX_2B,
        "cosmos-cv8x8x8": COSMOS,
        "mochi-1": MOCHI,
        "flux": FLUX,
        "sd": SD,
        "dc-ae-f32": DC_F32,
    }
)


def real_configs() -> Mapping[str, Released]:
    """The released configs by a short name: the class's name in diffusers and its constructor's arguments."""
    return _CONFIGS
