"""Generated clips that a model can learn in seconds: a disc and a box, or a square, over a ground."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.pixels import to_pixels


def moving_shapes(seed: int = 0, batch: int = 4, frames: int = 5, side: int = 32) -> Iterator[Tensor]:
    """Endless batches of uint8 clips, B T H W 3."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.stack([_clip(generator, frames, side) for _ in range(batch)])


def shapes_pixels(seed: int = 0, batch: int = 4, frames: int = 5, side: int = 32) -> Tensor:
    """One batch as a model sees it, B 3 T H W in [-1, 1]."""
    return to_pixels(next(moving_shapes(seed, batch, frames, side)), "cpu")


def moving_squares(seed: int = 0) -> Iterator[Tensor]:
    """Endless batches of uint8 clips, 2 x 5 x 16 x 16 x 3: a coloured square moves over a plain ground."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        frames = torch.empty(2, 5, 16, 16, 3, dtype=torch.uint8)
        for clip in frames:
            ground, colour = torch.randint(0, 256, (2, 3), generator=generator, dtype=torch.uint8)
            top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
            clip[:] = ground
            for t in range(5):
                clip[t, top : top + 6, left + t // 2 : left + t // 2 + 6] = colour
        yield frames


def squares_pixels(seed: int = 0) -> Iterator[Tensor]:
    """The same as a model sees them, 2 x 3 x 5 x 16 x 16 in [-1, 1]."""
    for frames in moving_squares(seed):
        yield to_pixels(frames, "cpu")


def _clip(generator: torch.Generator, frames: int, side: int) -> Tensor:
    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    slope = (random(2) - 0.5) / side
    shade = 0.5 + slope[0] * (rows - side / 2) + slope[1] * (columns - side / 2)
    clip = (shade[..., None] * (0.6 + 0.8 * random(3))).expand(frames, -1, -1, -1).clone()
    for shape in ("disc", "box"):
        colour, radius = random(3), side * (0.12 + 0.12 * random(1))
        start, velocity = side * random(2), side * (random(2) - 0.5) / 10
        for frame in range(frames):
            down, right = rows - start[0] - frame * velocity[0], columns - start[1] - frame * velocity[1]
            distance = torch.hypot(down, right) if shape == "disc" else torch.maximum(down.abs(), right.abs())
            clip[frame] = clip[frame].lerp(colour, (radius - distance + 0.5).clamp(0, 1)[..., None])
    return (clip.clamp(0, 1) * 255).round().to(torch.uint8)
