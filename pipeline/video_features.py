"""Features of whole clips from a network that the user brings, for the Fréchet video distance.

In:   a TorchScript file of the calling convention that I3D files for FVD have: module(video, rescale=True, resize=True,
      return_features=True), video float B 3 T H W from 0 to 255; it scales and resizes by itself. Then uint8 clips.
Out:  features 1 x D of a clip.
Cost: the network, once per clip.
Errors: UsageError for a file that is no such module, and for clips that it does not take.

A TorchScript file holds a program: take it from where you trust. It is not unpickled as Python objects are.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import UsageError

OPTIONS = {"rescale": True, "resize": True, "return_features": True}


class VideoFeatures:
    """The network of a file, frozen, on a device."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device
        try:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.export, and still the one form in which I3D for FVD is published.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{path}: is no TorchScript file: {_first_line(error)}") from error
        accepted = {argument.name for argument in self._module.forward.schema.arguments}
        missing = sorted(OPTIONS.keys() - accepted)
        if missing:
            raise UsageError(f"{path}: its forward lacks {', '.join(missing)}, which I3D files for FVD take")

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Features 1 x D, float32, of a clip uint8 T H W 3."""
        video = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(3, 0, 1, 2)[None].float()
        try:
            with torch.inference_mode():
                features = self._module(video, **OPTIONS)
        except (RuntimeError, torch.jit.Error) as error:
            raise UsageError(
                f"{self.path}: does not take clips of T x H x W = {tuple(frames.shape[:3])}; I3D needs ten frames or "
                f"more: {_first_line(error)}"
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim < 2 or len(features) != 1:
            raise UsageError(f"{self.path}: gave no features of one clip, B x D")
        if not bool(features.isfinite().all()):
            raise UsageError(f"{self.path}: gave infinite or NaN features of a clip of {len(frames)} frames")
        return features.flatten(1).float().cpu().numpy()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
