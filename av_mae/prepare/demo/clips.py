"""What the demo sets compose: one clip with its exact truth, and the sizes that all of them share."""

import dataclasses

import numpy as np

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
    sounding object in the middle frame · `sources` float32 [m, s] clean sounds, the sounding object's first.
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
    """The random stream of one clip: a function of its place alone, whoever composes it."""
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
    """(top, left) for boxes of (height, width) that do not overlap, each uniform over what is free; None if none fit.

    The boxes are placed in the order given, on a square of `size` pixels.
    """
    for _ in range(attempts):
        places: list[tuple[int, int]] = []
        for height, width in sizes:
            place = _free_place(generator, (height, width), list(zip(places, sizes)), size)
            if place is None:
                break
            places.append(place)
        if len(places) == len(sizes):
            return places
    return None


def _free_place(generator, box, taken, size) -> tuple[int, int] | None:
    height, width = box
    if height > size or width > size:
        return None
    free = np.ones((size - height + 1, size - width + 1), bool)
    for (top, left), (other_height, other_width) in taken:
        free[max(0, top - height + 1) : top + other_height, max(0, left - width + 1) : left + other_width] = False
    places = np.flatnonzero(free)
    if not len(places):
        return None
    top, left = divmod(int(places[generator.integers(len(places))]), free.shape[1])
    return top, left


def turn_down(sound: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales sound [s] and sources [m, s] by one factor where the sound's peak would clip. Returns float32."""
    peak = np.abs(sound).max(initial=0.0)
    gain = min(1.0, PEAK / peak) if peak > 0 else 1.0
    return (gain * sound).astype(np.float32), (gain * sources).astype(np.float32)
