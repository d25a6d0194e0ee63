"""Generate scenes of one textured object on a textured background, with the object's true mask.

A class is a shape with a texture. Colors, position, size, angle, background and noise vary
independently of the class. A scene is a function of (split, index) alone.
"""

import io
import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

CLASSES = [
    "striped disc",
    "checked square",
    "dotted triangle",
    "plain star",
    "ringed ring",
    "plain cross",
    "waved hexagon",
    "speckled bar",
]
SCENES = 2000
SIDES = (112, 144)  # minimum and maximum of height and width, in pixels


@dataclass(frozen=True, eq=False)
class Scene:
    """A generated image with its mask and label.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        mask: (height, width) bool, True on the object.
        label: index of the class in `CLASSES`.
    """

    image: np.ndarray
    mask: np.ndarray
    label: int


def choose_label(index: int) -> int:
    return index % len(CLASSES)


def draw_scene(index: int, split: str) -> Scene:
    """Generate the scene of this index; other splits hold other scenes of the same classes."""
    label = choose_label(index)
    rng = np.random.default_rng([zlib.crc32(split.encode()), index])
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, size=2)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ground_color = rng.uniform(0, 1, 3)
    ground = blend_colors(
        draw_cloud(rng, height, width), ground_color, shift_color(ground_color, 0.35)
    )

    radius = rng.uniform(0.28, 0.42) * min(height, width)
    center_y = rng.uniform(radius, height - radius)
    center_x = rng.uniform(radius, width - radius)
    angle = rng.uniform(0, 2 * math.pi)
    u = ((x - center_x) * math.cos(angle) + (y - center_y) * math.sin(angle)) / radius
    v = ((y - center_y) * math.cos(angle) - (x - center_x) * math.sin(angle)) / radius
    mask = draw_shape(label, u, v)
    color = shift_color(ground.mean(axis=(0, 1)), rng.uniform(0.3, 0.5, 3))
    surface = blend_colors(draw_texture(label, u, v, rng), color, shift_color(color, 0.9))

    image = np.where(mask[..., None], surface, ground)
    image = image + rng.normal(0, 0.02, image.shape)
    return Scene((np.clip(image, 0, 1) * 255).astype(np.uint8), mask, label)


def to_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def shift_color(color: np.ndarray, distance: np.ndarray | float) -> np.ndarray:
    """Return an RGB color in [0, 1] that is darker or lighter by `distance`.

    The direction is the one with more room.
    """
    return np.clip(color + (-1 if color.mean() > 0.5 else 1) * distance, 0, 1)


def blend_colors(amount: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Blend two colors: (H, W) amounts in [0, 1] of the second give (H, W, 3) pixels."""
    return first + amount[..., None] * (second - first)


def draw_cloud(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return smooth noise of three octaves: (height, width), in [0, 1]."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((4, 0.5), (8, 0.3), (16, 0.2)):
        coarse = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(total, 0, 1)


def draw_shape(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the object's mask, given the object's own coordinates (it fits the unit circle)."""
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    match label:
        case 0:
            return r < 0.9
        case 1:
            return np.maximum(abs(u), abs(v)) < 0.7
        case 2:
            return measure_polygon(r, theta, 3) < 0.5
        case 3:
            return r < 0.65 + 0.3 * np.cos(5 * theta)
        case 4:
            return (r < 0.95) & (r > 0.5)
        case 5:
            return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.9)
        case 6:
            return measure_polygon(r, theta, 6) < 0.8
        case _:
            return (abs(u) < 0.95) & (abs(v) < 0.4)


def measure_polygon(r: np.ndarray, theta: np.ndarray, corners: int) -> np.ndarray:
    """Return the distance from the center along the normal of a regular polygon's nearest side."""
    sector = 2 * math.pi / corners
    return r * np.cos((theta + sector / 2) % sector - sector / 2)


def draw_texture(label: int, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the object's texture in [0, 1], given the object's own coordinates."""
    phase = rng.uniform(0, 2 * math.pi)
    match label:
        case 0:
            return (np.sin(12 * u + phase) > 0).astype(np.float32)
        case 1:
            return ((np.sin(9 * u + phase) > 0) ^ (np.sin(9 * v + phase) > 0)).astype(np.float32)
        case 2:
            return (np.cos(14 * u + phase) + np.cos(14 * v + phase) > 0.8).astype(np.float32)
        case 4:
            return 0.5 + 0.5 * np.sin(30 * np.hypot(u, v) + phase)
        case 6:
            return 0.5 + 0.5 * np.sin(14 * u + 3 * np.sin(5 * v) + phase)
        case 7:
            return rng.uniform(0, 1, u.shape).astype(np.float32)
        case _:
            return np.zeros(u.shape, np.float32)
