"""The user's feature network: what it is shown, and which files and clips are refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UsageError
from pipeline.video_features import VideoFeatures


class Means(torch.nn.Module):
    """The mean of each channel, and the last frame's; three frames at least, as if it had strides."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if x.shape[2] < 3:
            raise RuntimeError("kernel size is greater than the input")
        assert rescale
        assert resize
        assert return_features
        return torch.cat([x.mean(dim=(2, 3, 4)), x[:, :, -1].mean(dim=(2, 3))], dim=1)


class Classes(torch.nn.Module):
    """No FVD network: it takes no options."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Broken(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        return x.mean(dim=(2, 3, 4)) / 0.0


def save_torchscript(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_it_sees_the_clip_from_0_to_255(tmp_path: Path) -> None:
    features = VideoFeatures(save_torchscript(Means(), tmp_path / "means.pt"))
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    found = features(clip)
    expected = np.concatenate([clip.mean(axis=(0, 1, 2)), clip[-1].mean(axis=(0, 1))])
    assert found.shape == (1, 6)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_clips_that_it_does_not_take(tmp_path: Path) -> None:
    features = VideoFeatures(save_torchscript(Means(), tmp_path / "means.pt"))
    with pytest.raises(UsageError, match=r"means.pt: does not take clips of T x H x W = \(2, 8, 6\).*greater than"):
        features(np.zeros((2, 8, 6, 3), np.uint8))


def test_files_that_are_no_such_network(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its forward lacks rescale, resize, return_features"):
        VideoFeatures(save_torchscript(Classes(), tmp_path / "classes.pt"))
    (tmp_path / "text.pt").write_text("not a module")
    with pytest.raises(UsageError, match=r"text\.pt: is no TorchScript file"):
        VideoFeatures(tmp_path / "text.pt")
    with pytest.raises(UsageError, match=r"none\.pt: is no TorchScript file"):
        VideoFeatures(tmp_path / "none.pt")


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    features = VideoFeatures(save_torchscript(Broken(), tmp_path / "broken.pt"))
    with pytest.raises(UsageError, match="infinite or NaN features of a clip of 4 frames"):
        features(np.ones((4, 8, 6, 3), np.uint8))
