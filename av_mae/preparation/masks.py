"""Segmentation masks as data sets draw them → 8-bit greyscale PNG as records hold them."""

import functools
import io

import numpy as np
from PIL import Image

BINARY = 255
CLASSES = 256


def read_mask(content: bytes, reader: str, size: tuple[int, int]) -> bytes:
    """A mask picture → PNG of (height, width): 0 and 255 ('binary'), or class numbers ('colours', 'numbers').

    'binary': whatever is not black sounds. 'colours': AVSBench's colour of each class. 'numbers': grey values.
    Raises ValueError for a colour that is no class.
    """
    picture = Image.open(io.BytesIO(content))
    if reader == "numbers":
        pixels = np.asarray(picture if picture.mode in ("L", "P") else picture.convert("L"))
    else:
        colours = np.asarray(picture.convert("RGB"))
        pixels = np.uint8(BINARY) * colours.any(axis=2) if reader == "binary" else _classes(colours)
    height, width = size
    resized = Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    resized.save(file, "PNG")
    return file.getvalue()


@functools.cache
def palette() -> np.ndarray:
    """AVSBench's (and PASCAL VOC's) colour of each class: uint8 [256, 3].

    Bits 0, 1 and 2 of the class are the highest bits of red, green and blue, bits 3, 4 and 5 the next ones, and so on.
    """
    colours = np.zeros((CLASSES, 3), np.uint8)
    for place in range(3):
        shifted = np.arange(CLASSES) >> 3 * place
        for channel in range(3):
            colours[:, channel] |= ((shifted >> channel & 1) << 7 - place).astype(np.uint8)
    return colours


def _classes(colours: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [H, W]."""
    weights = np.array([1 << 16, 1 << 8, 1])
    known, asked = palette().astype(np.int64) @ weights, colours.astype(np.int64) @ weights
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known[order], asked), CLASSES - 1)
    numbers = order[place]
    wrong = known[numbers] != asked
    if wrong.any():
        raise ValueError(f"colour {tuple(map(int, colours[wrong][0]))} of a mask is no class")
    return numbers.astype(np.uint8)
