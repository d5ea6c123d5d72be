"""Still pictures for the synthetic scenes: walls, a page of text, a painted valley; and the paint they are made of.

In:   a numpy Generator, a size in pixels.
Out:  float32 pictures H W 3 in [0, 255] and masks H W in [0, 1]; the valley as a Pillow image, ready to be cropped.
Cost: 1 to 30 ms a picture of 256 x 144; made once per scene.
Errors: none of its own.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 62, 52),
    "orange": (226, 142, 48),
    "yellow": (224, 200, 74),
    "green": (84, 160, 80),
    "teal": (56, 150, 152),
    "blue": (62, 100, 190),
    "purple": (130, 78, 168),
    "pink": (220, 132, 160),
    "white": (228, 226, 220),
    "dark grey": (62, 64, 70),
}
_TEXT = (
    "the mill turns slowly under a wide sky while rain falls on old stone and new grain waits in the yard for a wind "
    "that never asks who built the wheel or why the river bends twice before it meets the sea at dawn"
)


def paint_wall(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
    """A striped, brick, cloudy or wooden background, H W 3, and its name with its article."""
    kind = str(rng.choice(["striped", "brick", "cloudy", "wooden"]))
    name, first, second = two_colours(rng)
    y, x = pixel_grid(height, width)
    noise = smooth_noise(rng, height, width)
    if kind == "striped":
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.12, 0.25) * min(height, width)
        mix = soft_square(np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period), period)
        return blend(first, second, mix) * (0.85 + 0.2 * noise[..., None]), f"a striped {name} wall"
    if kind == "brick":
        rows, columns = max(6, height // 9), max(10, width // 7)
        mortar = (y % rows < 1.5) | ((x + (y // rows % 2) * columns / 2) % columns < 1.5)
        shade = 0.65 + 0.4 * noise + 0.12 * np.sin(y // rows * 5.1 + (x // columns) * 3.7)
        return np.where(mortar[..., None], 190.0, first * shade[..., None]).astype(np.float32), "a brick wall"
    if kind == "cloudy":
        return blend(rgb(92, 140, 200), rgb(232, 232, 236), noise), "a cloudy sky"
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (y / (0.2 * height) + 3 * noise + 0.3 * x / width))
    return blend(rgb(122, 80, 46), rgb(190, 140, 90), rings), "a wooden board"


def paint_page(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Lines of words in several sizes: a mask H W, 1 where there is ink."""
    sheet = Image.new("L", (width, height))
    draw = ImageDraw.Draw(sheet)
    y = 4
    while y < height - 10:
        size = int(rng.choice([11, 14, 18, 24]))
        words = " ".join(rng.choice(_TEXT.split(), 1 + 2 * width // size // 4))
        draw.text((int(rng.integers(2, 12)), y), words, fill=255, font=ImageFont.load_default(size))
        y += int(size * 1.4)
    return np.asarray(sheet, np.float32) / 255


def paint_valley(rng: np.random.Generator, height: int, width: int, evening: bool) -> Image.Image:
    """Mountains behind each other under a sky with clouds and a sun, and a village in front."""
    picture = Image.fromarray(to_uint8(_paint_mountains(rng, height, width, evening)))
    _build_village(rng, picture)
    return picture


def _paint_mountains(rng: np.random.Generator, height: int, width: int, evening: bool) -> np.ndarray:
    y, x = pixel_grid(height, width)
    high, low = ((86, 78, 130), (236, 160, 104)) if evening else ((78, 130, 200), (200, 218, 228))
    picture = blend(rgb(*high), rgb(*low), np.clip(y / (0.6 * height), 0, 1))
    clouds = np.clip(2 * smooth_noise(rng, height, width) - 0.9, 0, 0.8)
    picture = picture + clouds[..., None] * (238 - picture)
    sun_x, sun_y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.35) * height
    sun = np.clip(0.09 * height - np.hypot(y - sun_y, x - sun_x), 0, 1)
    picture = picture + sun[..., None] * (rgb(250, 232, 170) - picture)
    near, far = rgb(60, 84, 50), 0.5 * rgb(*low) + 50
    texture = 0.8 + 0.4 * smooth_noise(rng, height, width, coarsest=16)
    for layer in range(4):
        ridge = smooth_noise(rng, 8, width, coarsest=3 + 2 * layer)[4] - 0.5
        skyline = height * (0.38 + 0.13 * layer + (0.34 - 0.08 * layer) * ridge)
        cover = np.clip(y - skyline[None], 0, 1)[..., None]
        picture = picture + cover * ((far + layer / 3 * (near - far)) * texture[..., None] - picture)
    return np.asarray(picture)


def _build_village(rng: np.random.Generator, picture: Image.Image) -> None:
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for base in np.sort(rng.uniform(0.74, 0.97, 14)) * height:
        x, size = float(rng.uniform(0, width)), float(rng.uniform(0.05, 0.1)) * height
        if rng.random() < 0.5:
            trunk = [x - size / 12, base - size / 2, x + size / 12, base]
            draw.rectangle(trunk, fill=(80, 56, 40))
            crown = [(x - size / 2.5, base - size / 3), (x + size / 2.5, base - size / 3), (x, base - 1.6 * size)]
            draw.polygon(crown, fill=(34, int(rng.integers(70, 110)), 48))
            continue
        wall, roof = (int(v) for v in rng.integers(150, 225, 2))
        draw.rectangle([x, base - size, x + 1.4 * size, base], fill=(wall, wall - 12, wall - 30))
        gable = [(x - size / 6, base - size), (x + 1.56 * size, base - size), (x + 0.7 * size, base - 1.7 * size)]
        draw.polygon(gable, fill=(roof - 30, 60, 48))
        for pane in (0.2, 0.85):
            corner = [x + pane * size, base - 0.75 * size, x + (pane + 0.3) * size, base - 0.4 * size]
            draw.rectangle(corner, fill=(64, 66, 84), outline=(230, 226, 216))


def pixel_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column numbers, H 1 and 1 W."""
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def rgb(red: int, green: int, blue: int) -> np.ndarray:
    """A colour to calculate with."""
    return np.array([red, green, blue], np.float32)


def two_colours(rng: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
    """Two different COLOURS and what to call them."""
    first, second = (str(name) for name in rng.permutation(list(COLOURS))[:2])
    return f"{first} and {second}", rgb(*COLOURS[first]), rgb(*COLOURS[second])


def article(name: str) -> str:
    """The indefinite article before a name."""
    return "an" if name[0] in "aeiou" else "a"


def blend(first: np.ndarray, second: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """The first colour where the mask is 0, the second where it is 1; H W 3."""
    return np.asarray(first + mix[..., None] * (second - first), np.float32)


def soft_square(wave: np.ndarray, period: float) -> np.ndarray:
    """0 where the wave is negative, 1 where it is positive, with an edge about a pixel wide."""
    return np.asarray(np.clip(0.5 + wave * np.float32(period / (2 * np.pi)), 0, 1))


def smooth_noise(rng: np.random.Generator, height: int, width: int, coarsest: int = 4) -> np.ndarray:
    """Smooth value noise, float32 H W in [0, 1]: five octaves, each of half the size and weight of the one before."""
    total = np.zeros((height, width), np.float32)
    for octave in range(5):
        cells = rng.random((coarsest << octave, coarsest << octave), np.float32)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer) * np.float32(0.5**octave)
    return np.asarray((total - total.min()) / (total.max() - total.min()))


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """Rounded and clipped to [0, 255]."""
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
