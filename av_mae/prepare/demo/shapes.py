"""Silhouettes of the eight toy instruments, as conditions on coordinates x (right) and y (down) in -1…1.

Every shape reaches -1 and 1 in at least one of the two directions, so its size is its longer side.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from av_mae.prepare.demo.clips import SIZE

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

SUPERSAMPLE = 2  # samples per pixel and direction, for smooth edges


def ellipse(x, y, column, row, width, height):
    return ((x - column) / width) ** 2 + ((y - row) / height) ** 2 <= 1


def block(x, y, left, top, right, bottom):
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def bell(x, y):
    half_width = 0.3 + 0.5 * np.clip((y + 0.75) / 1.3, 0, 1) ** 2.5
    body = (np.abs(x) <= half_width) & (y >= -0.75) & (y <= 0.6)
    rim = block(x, y, -0.95, 0.55, 0.95, 0.72)
    return body | rim | ellipse(x, y, 0, -0.78, 0.2, 0.22) | ellipse(x, y, 0, 0.78, 0.2, 0.22)


def flute(x, y):
    tube = block(x, y, -1, -0.13, 1, 0.13)
    return tube | block(x, y, -0.78, -0.24, -0.52, 0.24) | ellipse(x, y, 0.9, 0, 0.1, 0.22)


def organ(x, y):
    pipes = np.zeros(x.shape, bool)
    for number, top in enumerate((-0.35, -0.7, -1.0, -0.7, -0.35)):
        left = -0.9 + 0.38 * number
        pipes |= block(x, y, left, top, left + 0.28, 0.6)
    return pipes | block(x, y, -1, 0.6, 1, 1)


def string(x, y):
    body = ellipse(x, y, 0, 0.58, 0.55, 0.42) | ellipse(x, y, 0, 0.02, 0.4, 0.34)
    return body | block(x, y, -0.1, -1, 0.1, 0) | block(x, y, -0.24, -1, 0.24, -0.78)


def drum(x, y):
    skin = ellipse(x, y, 0, -0.42, 0.92, 0.26) | ellipse(x, y, 0, 0.56, 0.92, 0.26)
    body = block(x, y, -0.92, -0.42, 0.92, 0.56)
    left_stick = (np.abs(x - y - 0.02) < 0.13) & block(x, y, -1, -1, -0.3, -0.3)
    right_stick = (np.abs(x + y + 0.02) < 0.13) & block(x, y, 0.3, -1, 1, -0.3)
    return skin | body | left_stick | right_stick


def trumpet(x, y):
    flare = (np.abs(y) <= 0.1 + 0.5 * np.clip((x - 0.35) / 0.65, 0, 1) ** 2) & (x >= -0.95) & (x <= 1)
    loop = ellipse(x, y, -0.05, 0.3, 0.5, 0.3) & ~ellipse(x, y, -0.05, 0.3, 0.32, 0.14)
    valves = block(x, y, -0.38, -0.42, -0.24, 0.2) | block(x, y, -0.12, -0.42, 0.02, 0.2)
    return flare | loop | valves | block(x, y, 0.14, -0.42, 0.28, 0.2) | block(x, y, -1, -0.2, -0.9, 0.2)


def maraca(x, y):
    return ellipse(x, y, 0, -0.48, 0.5, 0.52) | block(x, y, -0.14, -0.1, 0.14, 1) | ellipse(x, y, 0, 0.88, 0.22, 0.12)


def siren(x, y):
    dome = ellipse(x, y, 0, 0.35, 0.62, 0.85) & (y <= 0.35)
    base = block(x, y, -1, 0.35, 1, 0.8)
    radius, angle = np.hypot(x, y - 0.1), np.arctan2(0.1 - y, np.abs(x))
    rays = (radius >= 0.92) & (radius <= 1.25) & (np.abs((angle / math.pi * 6) % 1 - 0.5) > 0.3) & (y < 0.2)
    return dome | base | (rays & (np.abs(x) <= 1) & (y >= -1))


# Kind → (condition, axis along which the stripes follow one another).
SHAPES: dict[str, tuple[Callable, str]] = {
    "bell": (bell, "y"),
    "flute": (flute, "x"),
    "organ": (organ, "y"),
    "string": (string, "y"),
    "drum": (drum, "y"),
    "trumpet": (trumpet, "x"),
    "maraca": (maraca, "y"),
    "siren": (siren, "x"),
}


@functools.lru_cache(maxsize=128)
def _grid(pixels: int) -> np.ndarray:
    return (np.arange(pixels * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE - pixels / 2


def silhouette(kind: str, size: float, degrees: float, flip: bool, stripes: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the shape covers, and how much of that is a dark stripe: float32 [h, w] each, 0…1.

    `size` pixels is the longer side before the rotation by `degrees`; the result is cropped to the pixels of which
    the shape covers at least half.
    """
    shape, axis = SHAPES[kind]
    pixels = 2 * math.ceil(size * math.sqrt(0.5) + 1)
    across, down = np.meshgrid(_grid(pixels), _grid(pixels))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = (across * np.float32(cosine) + down * np.float32(sine)) * np.float32(2 / size)
    y = (down * np.float32(cosine) - across * np.float32(sine)) * np.float32(2 / size)
    if flip:
        x = -x
    inside = shape(x, y)
    along = (x if axis == "x" else y) * np.float32(stripes / 2) + np.float32(stripes / 2)
    dark = inside & (np.abs(along - np.floor(along) - 0.5) < 0.2)
    coverage, darkness = _average(inside), _average(dark)
    covered = coverage >= 0.5
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    share = np.divide(darkness, coverage, out=np.zeros_like(darkness), where=coverage > 0)
    return coverage[crop], share[crop]


def _average(samples: np.ndarray) -> np.ndarray:
    rows, columns = samples.shape[0] // SUPERSAMPLE, samples.shape[1] // SUPERSAMPLE
    return samples.reshape(rows, SUPERSAMPLE, columns, SUPERSAMPLE).mean((1, 3), dtype=np.float32)
