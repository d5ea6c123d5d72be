"""LPIPS: how different two pictures look to an image classifier. Zhang et al., arXiv:1801.03924.

In:   a safetensors file of weights, which the user brings; then two batches of clips, B 3 T H W in [-1, 1].
Out:  Lpips, a frozen module; its value is a mean over clips and frames, 0 for equal pictures.
Cost: VGG16 or AlexNet once per frame and side, and its gradient: more than a small autoencoder itself.
Errors: CheckpointError for a file that holds neither network, names what is missing; ValueError for pictures too small.

The file holds the convolutions of VGG16 or AlexNet under the names that torchvision gives them
("features.0.weight", "features.0.bias", ...) and, per compared layer k, the published weights of its C channels,
1 C 1 1, as "lin<k>.model.1.weight": the two state dictionaries, put together, without the classifier.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import CheckpointError
from models.weights import read_table

if TYPE_CHECKING:
    from pathlib import Path

MIN_SIDE = 32
# The classifiers' mean and standard deviation of pixels, for pixels in [-1, 1] (published with LPIPS).
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with its place in torchvision's list, channels, kernel, stride and padding.

    pool: kernel of a max-pool of stride 2 before it, or 0. compared: whether LPIPS looks at its rectified output.
    """

    index: int
    channels: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


VGG16 = (
    Conv(0, 64),
    Conv(2, 64, compared=True),
    Conv(5, 128, pool=2),
    Conv(7, 128, compared=True),
    Conv(10, 256, pool=2),
    Conv(12, 256),
    Conv(14, 256, compared=True),
    Conv(17, 512, pool=2),
    Conv(19, 512),
    Conv(21, 512, compared=True),
    Conv(24, 512, pool=2),
    Conv(26, 512),
    Conv(28, 512, compared=True),
)
ALEXNET = (
    Conv(0, 64, kernel_size=11, stride=4, padding=2, compared=True),
    Conv(3, 192, kernel_size=5, padding=2, pool=3, compared=True),
    Conv(6, 384, pool=3, compared=True),
    Conv(8, 256, compared=True),
    Conv(10, 256, compared=True),
)
NETWORKS = {"VGG16": VGG16, "AlexNet": ALEXNET}


class Lpips(nn.Module):
    """The distance, frozen. Fill `parameters_by_name` with weights; they start at random."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: tuple[Conv, ...]) -> None:
        super().__init__()
        self.network = network
        widths = (3, *(conv.channels for conv in network))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, conv.channels, conv.kernel_size, conv.stride, conv.padding)
            for width, conv in zip(widths, network, strict=False)
        )
        self.layer_weights = nn.ParameterList(torch.rand(1, conv.channels, 1, 1) for conv in network if conv.compared)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(requires_grad=False)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The weights under the names that a file gives them."""
        convs = [
            (f"features.{conv.index}.{name}", weight)
            for conv, module in zip(self.network, self.convs, strict=True)
            for name, weight in module.named_parameters()
        ]
        layers = [(f"lin{k}.model.1.weight", weight) for k, weight in enumerate(self.layer_weights)]
        return dict(convs + layers)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """The mean distance over all frames of B 3 T H W; the gradient reaches the reconstruction alone."""
        if reconstruction.shape != target.shape or min(target.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"LPIPS compares equal shapes B 3 T H W of at least {MIN_SIDE} pixels a side, "
                f"got {tuple(reconstruction.shape)} and {tuple(target.shape)}"
            )
        with torch.no_grad():
            wanted = self._directions(target)
        distances = [
            ((found - layer) ** 2 * weight).sum(dim=1).mean()
            for found, layer, weight in zip(self._directions(reconstruction), wanted, self.layer_weights, strict=True)
        ]
        return torch.stack(distances).sum()

    def _directions(self, pixels: Tensor) -> list[Tensor]:
        """Of each compared layer, the features of every position scaled to length 1."""
        x = (pixels.transpose(1, 2).flatten(0, 1) - self.shift) / self.scale
        layers = []
        for conv, module in zip(self.network, self.convs, strict=True):
            if conv.pool:
                x = F.max_pool2d(x, conv.pool, stride=2)
            x = F.relu(module(x))
            if conv.compared:
                layers.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return layers


def load_lpips(path: Path) -> Lpips:
    """LPIPS with the weights of a file, on the CPU; the network is known by its tensors.

    Raises:
        CheckpointError: the file cannot be read, or lacks a tensor, or has one too many or of another shape.
    """
    from safetensors.torch import load_file

    table = read_table(path)
    found = {name: entry.shape for name, entry in table.items()}
    name = "VGG16" if "features.28.weight" in found else "AlexNet"
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        model = Lpips(NETWORKS[name])
    weights = model.parameters_by_name()
    wanted = {key: tuple(weight.shape) for key, weight in weights.items()}
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"{path}: is no LPIPS network; read as {name}, the nearest, it is wrong at {', '.join(wrong[:4])} "
            f"({len(wrong)} in all). models/lpips.py says which tensors it must hold"
        )
    for key, weight in load_file(path).items():
        weights[key].copy_(weight)
    return model
