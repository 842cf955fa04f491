"""Video frames on the host: JPEG → cropped, resized uint8 image. Boxes are (left, top, right, bottom) in pixels."""

import math

import numpy as np
import simplejpeg
from PIL import Image

EVALUATION_SHARE = 0.875  # of the frame's shorter side that evaluation looks at
ASPECTS = (3 / 4, 4 / 3)
LEAST_SHRINK = 1.6  # of a frame's sides by the JPEG decoder

Size = tuple[int, int]  # (height, width), or (mels, frames) of a log-mel
Box = tuple[float, float, float, float]


def frame_size(jpeg: bytes) -> tuple[int, int]:
    """(height, width) of an encoded frame, from its header. Raises ValueError where it is no JPEG."""
    return simplejpeg.decode_jpeg_header(jpeg)[:2]


def random_box(generator: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> Box:
    """A random crop whose area is a share of the frame within `scale` and whose aspect lies in ASPECTS.

    After ten draws that do not fit in the frame, the largest centred crop with an aspect in ASPECTS.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def centre_box(height: int, width: int, size: Size, share: float = EVALUATION_SHARE) -> Box:
    """The crop of evaluation: the frame shrunk until it just covers size / share, then its centre of `size`.

    A frame that has exactly `size` is kept whole.
    """
    if (height, width) == tuple(size):
        return 0, 0, width, height
    pixels = share * min(height / size[0], width / size[1])  # of the frame, per pixel of the result
    crop_height, crop_width = size[0] * pixels, size[1] * pixels
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def decode(jpeg: bytes, box: Box, size: Size) -> tuple[np.ndarray, Box]:
    """An encoded frame uint8 [height, width, 3], and where in it `box` lies.

    A frame far larger than needed is decoded at 5/8 of its size or less, never below what `box` resized to `size`
    needs; the decoder takes as long for 6/8 and 7/8 as for the whole.
    """
    height, width = frame_size(jpeg)
    left, top, right, bottom = box
    shrink = max(1, min((bottom - top) / size[0], (right - left) / size[1]))
    pixels = simplejpeg.decode_jpeg(
        jpeg, "RGB", min_height=math.ceil(height / shrink), min_width=math.ceil(width / shrink), min_factor=LEAST_SHRINK
    )
    scale = round(8 * max(pixels.shape[:2]) / max(height, width)) / 8  # the decoder scales by eighths, then rounds up
    return pixels, (left * scale, top * scale, right * scale, bottom * scale)


def resize_box(pixels: np.ndarray, box: Box, size: Size, flip: bool = False) -> np.ndarray:
    """The part `box` of uint8 [H, W, 3], resized (bilinear, antialiased) to uint8 [height, width, 3]."""
    if pixels.shape[:2] == tuple(size) and box == (0, 0, size[1], size[0]):
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
