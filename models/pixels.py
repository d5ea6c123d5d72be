"""Between stored frames and what a model sees: uint8 B T H W 3 and float B 3 T H W in a pixel range.

In:   uint8 RGB frames on any device, or a model's output.
Out:  pixels on the wanted device; or uint8 frames on the CPU.
Cost: the bus carries one byte per value; the float copy is made on the device.
Errors: GeometryError for anything but uint8 B T H W 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.spec import GeometryError


def to_pixels(
    frames_BTHWC: Tensor,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    pixel_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """uint8 0..255, B T H W 3, to `pixel_range`, B 3 T H W. Scaled in float32 first: a cast before loses precision."""
    if frames_BTHWC.dtype != torch.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[4] != 3:
        raise GeometryError(f"frames are uint8 B T H W 3, got {frames_BTHWC.dtype} {tuple(frames_BTHWC.shape)}")
    low, high = pixel_range
    pixels = frames_BTHWC.to(device).permute(0, 4, 1, 2, 3).float()
    return (pixels * ((high - low) / 255.0) + low).to(dtype)


def to_frames(pixels: Tensor, pixel_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """B 3 T H W in `pixel_range` to uint8 B T H W 3 on the CPU, clamped and rounded."""
    low, high = pixel_range
    levels = (pixels.float() - low) * (255.0 / (high - low))
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()
