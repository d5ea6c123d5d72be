"""Painted moving scenes: what the synthetic videos show.

In:   a kind of scene, a seed, a frame size.
Out:  a Scene: a caption in plain words, and `paint(seconds)` -> uint8 H W 3, a pure function of its arguments.
Cost: 0.2 to 2 ms a frame of 256 x 144 on one core; `make_scene` a few ms (the camera's picture up to 30 ms).
Errors: ValueError for an unknown kind or a frame below 16 x 16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.synthetic_pictures import (
    COLOURS,
    article,
    blend,
    paint_page,
    paint_valley,
    paint_wall,
    pixel_grid,
    rgb,
    smooth_noise,
    soft_square,
    to_uint8,
    two_colours,
)

Painter = Callable[[float], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A caption, and a painter from a time in seconds to a uint8 H W 3 frame."""

    kind: str
    caption: str
    paint: Painter


def make_scene(kind: str, seed: int, height: int, width: int) -> Scene:
    """A scene of one of SCENE_KINDS; the same arguments paint the same pixels.

    Raises:
        ValueError: an unknown kind, or a frame below 16 x 16.
    """
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of scene {kind!r}: one of {', '.join(SCENE_KINDS)}")
    if min(height, width) < 16:
        raise ValueError(f"a scene needs at least 16 x 16 pixels, got {height} x {width}")
    rng = np.random.default_rng([SCENE_KINDS.index(kind), seed])
    caption, paint = _MAKERS[kind](rng, height, width)
    return Scene(kind, caption, paint)


def scene_clip(kind: str, seed: int, num_frames: int, height: int, width: int, fps: float = 24.0) -> np.ndarray:
    """The first `num_frames` frames of a scene: uint8 T H W 3."""
    scene = make_scene(kind, seed, height, width)
    return np.stack([scene.paint(frame / fps) for frame in range(num_frames)])


# Shapes over a wall


def _shapes(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    wall, wall_name = paint_wall(rng, height, width)
    size = min(height, width)
    num_shapes = int(rng.integers(2, 5))
    colour_names = rng.permutation(list(COLOURS))[:num_shapes]
    kinds = [str(kind) for kind in rng.choice(["disc", "box"], num_shapes)]
    bodies = [
        _Body(
            kind=kind,
            colour=rgb(*COLOURS[name]),
            radius=float(rng.uniform(0.10, 0.20)) * size,
            start=rng.uniform(0, 4, 2) * (height, width),
            velocity=rng.uniform(0.2, 0.6, 2) * rng.choice([-1, 1], 2) * size,
            spin=float(rng.uniform(-2, 2)),
        )
        for kind, name in zip(kinds, colour_names, strict=True)
    ]

    def paint(seconds: float) -> np.ndarray:
        canvas = wall.copy()
        for body in bodies:
            body.draw(canvas, seconds)
        return to_uint8(canvas)

    things = [f"{article(name)} {name} {kind}" for name, kind in zip(colour_names, kinds, strict=True)]
    return f"{', '.join(things[:-1])} and {things[-1]} move over {wall_name}", paint


@dataclasses.dataclass(frozen=True)
class _Body:
    """A shaded disc or a spinning box, with a shadow, that bounces off the frame's edges. Pixels and seconds."""

    kind: str
    colour: np.ndarray
    radius: float
    start: np.ndarray
    velocity: np.ndarray
    spin: float

    def draw(self, canvas: np.ndarray, seconds: float) -> None:
        spans = np.array(canvas.shape[:2]) - 2 * self.radius
        y, x = _bounce(self.start + self.velocity * seconds, spans) + self.radius
        reach = self.radius * 1.5 + 2
        for offset, shadow in ((0.2 * self.radius, True), (0.0, False)):
            top, left = max(0, int(y + offset - reach)), max(0, int(x + offset - reach))
            patch = canvas[top : int(y + offset + reach), left : int(x + offset + reach)]
            dy = np.arange(patch.shape[0], dtype=np.float32)[:, None] + (top - y - offset)
            dx = np.arange(patch.shape[1], dtype=np.float32)[None] + (left - x - offset)
            cover, light = self._cover_and_light(dy, dx, seconds)
            if shadow:
                patch *= (1 - 0.45 * cover)[..., None]
            else:
                patch += cover[..., None] * (light[..., None] * self.colour - patch)

    def _cover_and_light(self, dy: np.ndarray, dx: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "disc":
            squared = (dy * dy + dx * dx) / self.radius**2
            facing = np.sqrt(np.clip(1 - squared, 0, 1))
            light = 0.45 + 0.6 * np.clip(0.7 * facing - 0.5 * (dy + dx) / self.radius, 0, 1.1)
            return np.clip(0.5 + self.radius * (1 - np.sqrt(squared)), 0, 1), light
        sine, cosine = np.sin(self.spin * seconds), np.cos(self.spin * seconds)
        across, along = cosine * dx + sine * dy, cosine * dy - sine * dx
        cover = np.clip(0.5 + self.radius - np.maximum(np.abs(across), np.abs(along)), 0, 1)
        return cover, 0.85 + 0.25 * (across - along) / (2 * self.radius)


def _bounce(position: np.ndarray, spans: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(np.mod(position, 2 * spans) - spans))


# Text, grain


def _text(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    upwards = bool(rng.integers(2))
    dark_page = bool(rng.integers(2))
    name = str(rng.choice(["red", "green", "teal", "blue", "purple"]))
    tone = rgb(*COLOURS[name])
    page, ink = (0.4 * tone, rgb(230, 228, 215)) if dark_page else (0.2 * tone + 180, 0.45 * tone)
    mask = paint_page(rng, height * 3 if upwards else height, width if upwards else width * 3)
    paper = page * (0.9 + 0.2 * smooth_noise(rng, height, width)[..., None])
    axis, speed = (0 if upwards else 1), float(rng.uniform(0.15, 0.4)) * height

    def paint(seconds: float) -> np.ndarray:
        whole, part = divmod(speed * seconds, 1.0)
        length = (height, width)[axis]
        rows = np.take(mask, np.arange(int(whole), int(whole) + length + 1), axis=axis, mode="wrap")
        now, after = (rows[:-1], rows[1:]) if upwards else (rows[:, :-1], rows[:, 1:])
        cover = ((1 - part) * now + part * after)[..., None].astype(np.float32)
        return to_uint8(paper + cover * (ink - paper))

    where = "up a" if upwards else "to the left over a"
    return f"lines of {'light' if dark_page else 'dark'} text scroll {where} {name} page", paint


def _grain(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    name, first, second = two_colours(rng)
    y, x = pixel_grid(height, width)
    y, x = y / height - 0.5, x / width - 0.5
    turn, phase = rng.uniform(0.4, 1.2) * rng.choice([-1, 1]), rng.uniform(0, 2 * np.pi)
    sigma, grain_seed = rng.uniform(4, 14), int(rng.integers(2**31))

    def paint(seconds: float) -> np.ndarray:
        angle = phase + turn * seconds
        light_y, light_x = 0.3 * np.sin(angle), 0.3 * np.cos(1.3 * angle)
        glow = np.exp(-6 * ((y - light_y) ** 2 + (x - light_x) ** 2))
        gradient = blend(first, second, 0.5 + 0.6 * (x * np.cos(angle) + y * np.sin(angle)))
        noise_rng = np.random.default_rng([grain_seed, round(seconds * 1000)])
        grain = noise_rng.standard_normal((height, width, 1), np.float32) * sigma
        return to_uint8(gradient * (0.55 + 0.5 * glow[..., None]) + grain)

    strength = "coarse" if sigma > 9 else "fine"
    return f"{strength} film grain over {article(name)} {name} gradient with a wandering glow", paint


# Camera over a painted valley


def _camera(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    picture_height, picture_width = int(2.2 * height), int(2.8 * width)
    evening = bool(rng.integers(2))
    picture = paint_valley(rng, picture_height, picture_width, evening)
    pan, tilt, zoom = rng.uniform(0.25, 0.6), rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.6)
    phases = rng.uniform(0, 2 * np.pi, 3)

    def paint(seconds: float) -> np.ndarray:
        across, down, near = 0.5 + 0.5 * np.sin(phases + 2 * np.pi * np.array([pan, tilt, zoom]) * seconds / 2)
        scale = 0.9 + 0.8 * near
        left = across * (picture_width - scale * width)
        top = (0.25 + 0.75 * down) * (picture_height - scale * height)
        view = (left, top, left + scale * width, top + scale * height)
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=view))

    light = "in the evening" if evening else "by day"
    return f"the camera pans and zooms over a painted valley with mountains and houses {light}", paint


# Test patterns


def _zone_plate(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    name, first, second = two_colours(rng)
    y, x = pixel_grid(height, width)
    centre_y, centre_x = rng.uniform(0.3, 0.7, 2) * (height, width)
    squared = (y - centre_y) ** 2 + (x - centre_x) ** 2
    # The phase is pi * k * r^2, so the frequency at r is k * r cycles per pixel: 0.3 at the far corner.
    rings = np.pi * 0.3 / float(np.sqrt(squared.max())) * squared
    speed, outwards = rng.uniform(3, 9), bool(rng.integers(2))

    def paint(seconds: float) -> np.ndarray:
        phase = -speed * seconds if outwards else speed * seconds
        return to_uint8(blend(first, second, 0.5 + 0.5 * np.cos(rings + np.float32(phase))))

    return f"fine {name} rings of a zone plate run {'outwards' if outwards else 'inwards'}", paint


def _checkerboard(rng: np.random.Generator, height: int, width: int) -> tuple[str, Painter]:
    name, first, second = two_colours(rng)
    y, x = pixel_grid(height, width)
    y, x = y - height / 2, x - width / 2
    period, start = rng.uniform(0.25, 0.6) * min(height, width), rng.uniform(0, np.pi)
    clockwise = bool(rng.integers(2))
    turn = rng.uniform(0.4, 1.4) * (1 if clockwise else -1)

    def paint(seconds: float) -> np.ndarray:
        angle, scale = start + turn * seconds, 2 * np.pi / (period * (1 + 0.25 * np.sin(1.7 * seconds)))
        sine, cosine = np.float32(np.sin(angle) * scale), np.float32(np.cos(angle) * scale)
        squares = np.sin(cosine * x + sine * y) * np.sin(cosine * y - sine * x)
        return to_uint8(blend(first, second, soft_square(squares, period)))

    return f"{article(name)} {name} checkerboard turns {'clockwise' if clockwise else 'anticlockwise'}", paint


_MAKERS: dict[str, Callable[[np.random.Generator, int, int], tuple[str, Painter]]] = {
    "shapes": _shapes,
    "text": _text,
    "grain": _grain,
    "camera": _camera,
    "zone_plate": _zone_plate,
    "checkerboard": _checkerboard,
}
SCENE_KINDS = tuple(_MAKERS)
