"""What the demo sets compose: one clip with its exact annotations, and the sizes and backgrounds that they share."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from av_mae.media import encode

SIZE = 96  # pixels, both sides
RATE = 8000  # samples per second
FRAME_RATE = 4  # frames per second
SECONDS = 2.0  # the 1.5 s that a model sees plus room for temporal jitter
SAMPLES = int(RATE * SECONDS)
FRAMES = int(FRAME_RATE * SECONDS)
MIDDLE = FRAMES // 2  # the frame at the clip's middle, for which boxes and mask hold
VARIANTS = ("single", "scene", "mixture")
SPLITS = ("train", "test")
PEAK = 0.99  # louder sums are turned down


@dataclasses.dataclass(frozen=True)
class Clip:
    """A composed clip before any encoding. n objects, k frames, m sources, s samples.

    `frames` uint8 [k, H, W, 3] · `sound` float32 [s] in -1…1 · `boxes` float32 [n, 4] as (ymin, xmin, ymax, xmax) in
    0…1 · `object_labels` int64 [n] · `sounding` index of the sounding object · `mask` bool [H, W], the pixels of the
    sounding object in the middle frame · `sources` float32 [m, s] clean sources, the sounding object's first.
    """

    id: str
    label: int
    frames: np.ndarray
    frame_rate: int
    sound: np.ndarray
    rate: int
    boxes: np.ndarray
    object_labels: np.ndarray
    sounding: int
    mask: np.ndarray
    sources: np.ndarray


def clip_generator(dataset: str, split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one clip: the same for the same arguments, whoever composes the clip."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *dataset.encode()])


def clip_id(dataset: str, variant: str, split: str, index: int) -> str:
    return f"{dataset}_{variant}_{split}_{index:06d}"


def box_of(mask: np.ndarray) -> np.ndarray:
    """The smallest box around the true pixels of bool [H, W]: float32 (ymin, xmin, ymax, xmax), shares of the sides."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array(
        [rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width], np.float32
    )


def place_boxes(
    generator: np.random.Generator, sizes: list[tuple[int, int]], size: int = SIZE, attempts: int = 10
) -> list[tuple[int, int]] | None:
    """(top, left) for boxes that do not overlap, each uniform over what is free; `None` if they do not fit.

    Args:
        generator: draws the positions.
        sizes: (height, width) of each box, which are placed in this order.
        size: pixels of a side of the square that takes the boxes.
        attempts: how often the placing begins again.
    """
    for _ in range(attempts):
        corners: list[tuple[int, int]] = []
        for box in sizes:
            corner = _free_corner(generator, box, list(zip(corners, sizes)), size)
            if corner is None:
                break
            corners.append(corner)
        if len(corners) == len(sizes):
            return corners
    return None


def _free_corner(
    generator: np.random.Generator,
    box: tuple[int, int],
    taken: list[tuple[tuple[int, int], tuple[int, int]]],
    size: int,
) -> tuple[int, int] | None:
    height, width = box
    if height > size or width > size:
        return None
    free = np.ones((size - height + 1, size - width + 1), bool)
    for (top, left), (other_height, other_width) in taken:
        free[max(0, top - height + 1) : top + other_height, max(0, left - width + 1) : left + other_width] = False
    corners = np.flatnonzero(free)
    return divmod(int(corners[generator.integers(len(corners))]), free.shape[1]) if len(corners) else None


def turn_down(audio: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales audio [s] and sources [m, s] by one factor where the audio's peak would clip. Returns float32."""
    peak = np.abs(audio).max(initial=0.0)
    gain = min(1.0, PEAK / peak) if peak > 0 else 1.0
    return (gain * audio).astype(np.float32), (gain * sources).astype(np.float32)


def encode_clip(clip: Clip) -> tuple[bytes, dict]:
    """The clip's mp4 file, and its record (see shards.complete): frames and audio as decoded from that file."""
    mp4 = encode.encode_mp4(clip.frames, clip.frame_rate, clip.sound, clip.rate)
    frames, times, sound, rate = encode.decode_mp4(mp4)
    sound = sound[: len(clip.sound)]  # AAC fills its last block with silence
    return mp4, {
        "id": clip.id,
        "labels": np.array([clip.label], np.int64),
        "duration": np.float32(len(clip.sound) / rate),
        "source": clip.id,
        "frames": [encode.jpeg(frame) for frame in frames],
        "frame_times": times,
        "sound": encode.flac(sound, rate),
        "boxes": clip.boxes,
        "object_labels": clip.object_labels,
        "sounding": np.int64(np.arange(len(clip.boxes)) == clip.sounding),
        "box_annotators": np.zeros(len(clip.boxes), np.int64),
        "annotators": 1,
        "masks": [encode.png(clip.mask)],
        "mask_frames": np.array([MIDDLE]),
        "sources": [encode.flac(source, clip.rate) for source in clip.sources],
    }


Texture = Callable[[np.random.Generator], np.ndarray]
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def background(generator: np.random.Generator, split: str) -> np.ndarray:
    """A background as float32 [SIZE, SIZE, 3], levels 0…255: nearly grey, with one texture of the split."""
    textures = TEXTURES[split]
    level = generator.uniform(60, 190) + generator.uniform(-15, 15, 3)
    amplitude = generator.uniform(5, 25)
    texture = textures[generator.integers(len(textures))](generator)
    return level.astype(np.float32) + np.float32(amplitude) * texture[..., None]


def blurred_noise(generator: np.random.Generator) -> np.ndarray:
    cells = int(generator.integers(8, 28))
    coarse = Image.fromarray(generator.standard_normal((cells, cells), np.float32))
    noise = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return noise / np.abs(noise).max()


def oriented_sine(generator: np.random.Generator) -> np.ndarray:
    across, _ = _axes(generator)
    return np.sin(across * (2 * math.pi / generator.uniform(6, 24)))


def checkers(generator: np.random.Generator) -> np.ndarray:
    across, along = _axes(generator)
    period = generator.uniform(8, 28)
    return np.sign(np.sin(across * (2 * math.pi / period)) * np.sin(along * (2 * math.pi / period)))


def rings(generator: np.random.Generator) -> np.ndarray:
    row, column = generator.uniform(0, SIZE, 2)
    radius = np.hypot(ROWS - np.float32(row), COLUMNS - np.float32(column))
    return np.sin(radius * (2 * math.pi / generator.uniform(8, 24)))


def dots(generator: np.random.Generator) -> np.ndarray:
    across, along = _axes(generator)
    period = generator.uniform(8, 20)
    lattice = np.cos(across * (2 * math.pi / period)) + np.cos(along * (2 * math.pi / period))
    return np.where(lattice > generator.uniform(0.2, 0.8), np.float32(1), np.float32(-0.5))


def bricks(generator: np.random.Generator) -> np.ndarray:
    across, along = _axes(generator)
    height = generator.uniform(8, 16)
    course = np.floor(across / height)
    length = (along / (2.2 * height) + 0.5 * (course % 2)) % 1
    joint = (across / height % 1 < 0.2) | (length < 0.1)
    return np.where(joint, np.float32(-1), np.float32(0.6))


def _axes(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates [SIZE, SIZE] along two right-angled axes of random direction and origin."""
    angle, (first, second) = generator.uniform(0, math.pi), generator.uniform(0, SIZE, 2)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return (COLUMNS * cosine + ROWS * sine + np.float32(first), ROWS * cosine - COLUMNS * sine + np.float32(second))


TEXTURES: dict[str, tuple[Texture, ...]] = {
    "train": (blurred_noise, oriented_sine, checkers),
    "test": (rings, dots, bricks),
}
