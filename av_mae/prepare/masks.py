"""Masks of what sounds, as data sets have them → PNG files with a value per pixel."""

import functools
import io

import numpy as np
from PIL import Image

BINARY = 255  # of a mask without classes: the value of what sounds
CLASSES = 256  # that the colours of a mask can tell apart


def read_mask(content: bytes, reader: str, size: tuple[int, int], classes: int) -> bytes:
    """An image file of a mask → a PNG file with a value per pixel.

    Args:
        content: of the image file.
        reader: 'binary': what is not black becomes 255. 'colours': AVSBench's colour of a class becomes the class's
            number. 'numbers': grey values stay.
        size: (height, width) of the result.
        classes: how many there are.

    Raises:
        ValueError: for a colour or a number that is no class.
    """
    image = Image.open(io.BytesIO(content))
    pixels: np.ndarray
    if reader == "numbers":
        pixels = _numbers(image)
    else:
        colours = np.asarray(image.convert("RGB"))
        pixels = np.where(colours.any(axis=2), BINARY, 0) if reader == "binary" else _classes(colours)
    most = BINARY if reader == "binary" else min(classes, CLASSES) - 1
    wrong = pixels[(pixels < 0) | (pixels > most)]
    if wrong.size:
        raise ValueError(f"value {wrong[0]} of a mask is no class, they are 0 to {most}")
    height, width = size
    resized = Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    resized.save(file, "PNG")
    return file.getvalue()


def _numbers(image: Image.Image) -> np.ndarray:
    """The grey values of an image, or the numbers of its colours where it has a palette: [H, W]."""
    if image.mode in ("L", "P", "1") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64)
    colours = np.asarray(image.convert("RGB"))
    if coloured := colours[(colours != colours[..., :1]).any(axis=2)].tolist():
        raise ValueError(f"a mask of numbers has the colour {tuple(coloured[0])}")
    return colours[..., 0]


@functools.cache
def palette() -> np.ndarray:
    """AVSBench's (and PASCAL VOC's) colour of each class: uint8 [256, 3].

    Bits 0, 1 and 2 of the class are the highest bits of red, green and blue, bits 3, 4 and 5 the next ones, and so on.
    """
    colours = np.zeros((CLASSES, 3), np.uint8)
    for bit in range(3):
        shifted = np.arange(CLASSES) >> 3 * bit
        for channel in range(3):
            colours[:, channel] |= ((shifted >> channel & 1) << 7 - bit).astype(np.uint8)
    return colours


def _classes(colours: np.ndarray) -> np.ndarray:
    """The class of each colour: uint8 [H, W, 3] → uint8 [H, W]."""
    weights = np.array([1 << 16, 1 << 8, 1])
    known, asked = palette().astype(np.int64) @ weights, colours.astype(np.int64) @ weights
    order = np.argsort(known)
    numbers = order[np.minimum(np.searchsorted(known[order], asked), CLASSES - 1)]
    wrong = known[numbers] != asked
    if wrong.any():
        raise ValueError(f"colour {tuple(map(int, colours[wrong][0]))} of a mask is no class")
    return numbers.astype(np.uint8)
