"""AutoencoderKLLTXVideo and AutoencoderKLLTX2Video (LTX-Video 0.9 to LTX-2), their encoders streamed exactly.

In:   a diffusers directory and its config, or a loaded module.
Out:  the classes' rules; a Backend whose encoder works chunk by chunk.
Cost: one chunk's activations; the state holds each causal convolution's last kernel - stride input frames.
Errors: CheckpointError for a config that is not causal, or weights without the normaliser's tensors.

diffusers encodes a clip of these models whole, or in overlapping pieces that it blends, which changes the latents. Here
each causal convolution of the encoder gets the frames that lie before its chunk from the stream's state. The result is
the whole clip's to about 5e-6 of the latents' standard deviation. The layers find the state on a tape of which each
thread has its own, so threads may share the encoder.
"""

from __future__ import annotations

import importlib
import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.causal import State, space_to_depth
from models.errors import CheckpointError
from models.pretrained.rules import LOGVAR_RANGE, Config, EncoderRule, channel_normaliser
from models.spec import Geometry, Normaliser, Posterior
from models.weights import read_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NORMALISER_FIELDS = frozenset({"scaling_factor"})
NORMALISER_TENSORS = frozenset({"latents_mean", "latents_std"})
BLOCK_095 = "LTXVideo095DownBlock3D"
STRIDES = {"conv": (2, 2), "spatiotemporal": (2, 2), "spatial": (1, 2), "temporal": (2, 1)}


def ltx_geometry(config: Config) -> Geometry:
    """The product of the blocks' strides. The config's own compression ratios are left out or wrong in places."""
    _check_causal(config)
    kinds = config.get("down_block_types") or ["LTXVideoDownBlock3D"] * len(config["block_out_channels"])
    num_blocks = len(config["block_out_channels"]) - (kinds[-1] == BLOCK_095)
    downs = [config["downsample_type"][index] if kinds[index] == BLOCK_095 else "conv" for index in range(num_blocks)]
    return _geometry(config, downs)


def ltx2_geometry(config: Config) -> Geometry:
    """The product of the blocks' strides; every block has a type of its own."""
    _check_causal(config)
    return _geometry(config, config["downsample_type"][: len(config["block_out_channels"])])


def _check_causal(config: Config) -> None:
    if not config.get("encoder_causal", True) or config.get("patch_size_t", 1) != 1:
        raise CheckpointError(
            f"only a causal LTX encoder with patch_size_t 1 is supported, got "
            f"encoder_causal={config.get('encoder_causal')} patch_size_t={config.get('patch_size_t')}"
        )


def _geometry(config: Config, downs: Sequence[str]) -> Geometry:
    scaling = config["spatio_temporal_scaling"]
    scaled = [scaling] * len(downs) if isinstance(scaling, bool) else scaling[: len(downs)]
    strides = [STRIDES[down] for down, active in zip(downs, scaled, strict=True) if active]
    return Geometry(
        temporal_stride=math.prod(temporal for temporal, _ in strides),
        spatial_stride=config["patch_size"] * math.prod(spatial for _, spatial in strides),
        channels=config["latent_channels"],
    )


def ltx_normaliser(config: Config, weights: Path) -> Normaliser:
    """(z - latents_mean) * scaling_factor / latents_std; the two vectors are buffers among the weights."""
    from safetensors import safe_open

    missing = NORMALISER_TENSORS - read_table(weights).keys()
    if missing:
        raise CheckpointError(f"{weights}: lacks the tensors {', '.join(sorted(missing))}")
    with safe_open(weights, framework="pt") as file:
        mean, std = (file.get_tensor(name).double().tolist() for name in ("latents_mean", "latents_std"))
    formula = "(latent - mean) / std, weights' latents_mean and latents_std / scaling_factor"
    return channel_normaliser(mean, std, float(config.get("scaling_factor", 1.0)), formula)


class _Tape(threading.local):
    """The state of the stream whose chunk this thread encodes; the encoder's layers read and write it."""

    def __init__(self) -> None:
        self.state: State = {}


class _StreamedConv(nn.Module):
    """A causal convolution that takes the frames before its chunk from the tape."""

    def __init__(self, name: str, conv: nn.Conv3d, tape: _Tape) -> None:
        super().__init__()
        self.name = name
        self.conv = conv
        self.tape = tape
        self.tail_frames = conv.kernel_size[0] - conv.stride[0]

    @property
    def starts_clip(self) -> bool:
        return self.name not in self.tape.state

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        assert causal  # LTX-2 passes it to every layer; a config that says otherwise was refused
        if self.starts_clip:
            past = x[:, :, :1].expand(-1, -1, self.conv.kernel_size[0] - 1, -1, -1)
        else:
            past = self.tape.state[self.name]
        x = torch.cat([past, x], dim=2)
        self.tape.state[self.name] = x[:, :, x.shape[2] - self.tail_frames :].clone()
        output: Tensor = self.conv(x)
        return output


class _StreamedDownsample(nn.Module):
    """Space-to-depth with a group-mean shortcut, where only a clip's first chunk repeats its first frame."""

    def __init__(self, conv: _StreamedConv, strides: tuple[int, int, int], group_size: int) -> None:
        super().__init__()
        self.conv = conv
        self.strides = strides[:2]  # height and width shrink alike
        self.group_size = group_size

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        assert causal
        first = self.conv.starts_clip
        groups = torch.unflatten(space_to_depth(x, *self.strides, first=first), 1, (-1, self.group_size))
        return space_to_depth(self.conv(x), *self.strides, first=first) + groups.mean(dim=2)


class LtxBackend:
    """An LTX autoencoder whose encoder was made to stream; the decoder is left as it is."""

    one_at_a_time = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.tape = _Tape()
        self.decoder_lock = threading.Lock()  # the random generator is the process's
        _make_streamed(vae.encoder, importlib.import_module(type(vae).__module__), self.tape)

    def encode_chunk(self, pixels: Tensor, state: State | None) -> tuple[Posterior, State]:
        self.tape.state = following = dict(state or {})
        try:
            mean, logvar = self.vae.encoder(pixels).chunk(2, dim=1)
        finally:
            self.tape.state = {}
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), following

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """The whole latent at once: this decoder looks ahead. Timestep 0 and fixed noise where it wants them."""
        conditioned = self.vae.config.timestep_conditioning
        timestep = latents.new_zeros(latents.shape[0]) if conditioned else None
        devices = [latents.device] if latents.device.type == "cuda" else []
        with self.decoder_lock, torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            pixels = self.vae.decode(latents, timestep, return_dict=False)[0]
        yield pixels

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        nn.Module.to(self.vae, device, dtype)  # diffusers' own `to` logs a needless warning


def _make_streamed(encoder: nn.Module, code: Any, tape: _Tape) -> None:
    """Put streamed layers in the place of the encoder's temporal ones; weights stay the same tensors.

    `code` is the module of diffusers that defines the encoder's layers.
    """
    version = "LTX2Video" if hasattr(code, "LTX2VideoCausalConv3d") else "LTXVideo"
    convolution, downsampler = (getattr(code, version + layer) for layer in ("CausalConv3d", "Downsampler3d"))
    modules: list[tuple[str, Any]] = list(encoder.named_modules())
    for name, module in modules:
        if isinstance(module, convolution):
            encoder.set_submodule(name, _StreamedConv(name, module.conv, tape))
        elif isinstance(module, downsampler):
            conv = _StreamedConv(f"{name}.conv", module.conv.conv, tape)
            encoder.set_submodule(name, _StreamedDownsample(conv, module.stride, module.group_size))


LTX, LTX2 = (
    EncoderRule(
        geometry,
        ltx_normaliser,
        streamed=LtxBackend,
        normaliser_fields=NORMALISER_FIELDS,
        normaliser_tensors=NORMALISER_TENSORS,
    )
    for geometry in (ltx_geometry, ltx2_geometry)
)
