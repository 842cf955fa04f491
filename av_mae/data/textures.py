"""Textured grey backgrounds. Train and test never share a kind of texture."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from av_mae.data.demo_clips import SIZE

Texture = Callable[[np.random.Generator], np.ndarray]
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def background(generator: np.random.Generator, split: str) -> np.ndarray:
    """A background as float32 [SIZE, SIZE, 3], levels 0…255: nearly grey, with one texture of the split."""
    textures = TEXTURES[split]
    level = generator.uniform(60, 190) + generator.uniform(-15, 15, 3)
    amplitude = generator.uniform(5, 25)
    texture = textures[generator.integers(len(textures))](generator)
    return level.astype(np.float32) + np.float32(amplitude) * texture[..., None]


def blurred_noise(generator) -> np.ndarray:
    cells = int(generator.integers(8, 28))
    coarse = Image.fromarray(generator.standard_normal((cells, cells), np.float32))
    noise = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return noise / np.abs(noise).max()


def oriented_sine(generator) -> np.ndarray:
    across, _ = _axes(generator)
    return np.sin(across * (2 * math.pi / generator.uniform(6, 24)))


def checkers(generator) -> np.ndarray:
    across, along = _axes(generator)
    period = generator.uniform(8, 28)
    return np.sign(np.sin(across * (2 * math.pi / period)) * np.sin(along * (2 * math.pi / period)))


def rings(generator) -> np.ndarray:
    row, column = generator.uniform(0, SIZE, 2)
    radius = np.hypot(ROWS - np.float32(row), COLUMNS - np.float32(column))
    return np.sin(radius * (2 * math.pi / generator.uniform(8, 24)))


def dots(generator) -> np.ndarray:
    across, along = _axes(generator)
    period = generator.uniform(8, 20)
    lattice = np.cos(across * (2 * math.pi / period)) + np.cos(along * (2 * math.pi / period))
    return np.where(lattice > generator.uniform(0.2, 0.8), np.float32(1), np.float32(-0.5))


def bricks(generator) -> np.ndarray:
    across, along = _axes(generator)
    height = generator.uniform(8, 16)
    course = np.floor(across / height)
    length = (along / (2.2 * height) + 0.5 * (course % 2)) % 1
    joint = (across / height % 1 < 0.2) | (length < 0.1)
    return np.where(joint, np.float32(-1), np.float32(0.6))


def _axes(generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates [SIZE, SIZE] along two right-angled axes of random direction and origin."""
    angle, (first, second) = generator.uniform(0, math.pi), generator.uniform(0, SIZE, 2)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return (COLUMNS * cosine + ROWS * sine + np.float32(first), ROWS * cosine - COLUMNS * sine + np.float32(second))


TEXTURES: dict[str, tuple[Texture, ...]] = {
    "train": (blurred_noise, oriented_sine, checkers),
    "test": (rings, dots, bricks),
}
