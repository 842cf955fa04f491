"""Geometry of crops and what decoding keeps."""

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from av_mae.data import frames


def decode_crop(jpeg: bytes, box: frames.Box, size: tuple[int, int], flip: bool = False) -> np.ndarray:
    return frames.resize_box(*frames.decode(jpeg, box, size), size, flip)


def gradient(height: int, width: int) -> np.ndarray:
    """Red rises with the column, green with the row: a place can be read off its colour."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.round(np.linspace(10, 240, width))
    image[..., 1] = np.round(np.linspace(10, 240, height))[:, None]
    return image


def encode(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=98, colorsubsampling="444")


@pytest.mark.parametrize("height, width", [(96, 96), (240, 320), (7, 400), (33, 5), (1, 1)])
def test_random_boxes_lie_inside_and_keep_scale_and_aspect(height, width):
    generator = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = frames.random_box(generator, height, width, (0.5, 1.0))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if min(height, width) > 90:
            assert 0.49 <= (right - left) * (bottom - top) / (height * width) <= 1
            assert 0.74 <= (right - left) / (bottom - top) <= 1.36


def test_random_boxes_reach_every_place():
    generator = np.random.default_rng(1)
    boxes = np.array([frames.random_box(generator, 100, 100, (0.5, 1.0)) for _ in range(2000)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.all(np.abs(centres.mean(axis=0) - 50) < 0.5)
    assert boxes[:, :2].min() == 0 and boxes[:, 2:].max() == 100


def test_evaluation_looks_at_the_middle():
    assert frames.centre_box(96, 96, (96, 96)) == (0, 0, 96, 96)
    # 256 × 320: the shorter side becomes 224 / 0.875 = 256, so the crop is the middle 224 × 224
    assert frames.centre_box(256, 320, (224, 224)) == (48, 16, 272, 240)
    left, top, right, bottom = frames.centre_box(128, 128, (224, 224))
    assert (left, top, right, bottom) == (8, 8, 120, 120)
    left, top, right, bottom = frames.centre_box(200, 400, (50, 200), share=1.0)
    assert (left, top, right, bottom) == (0, 50, 400, 150)


def test_a_frame_of_the_right_size_is_left_as_it_is():
    jpeg = encode(gradient(48, 64))
    stored = simplejpeg.decode_jpeg(jpeg, "RGB")
    np.testing.assert_array_equal(decode_crop(jpeg, (0, 0, 64, 48), (48, 64)), stored)
    np.testing.assert_array_equal(decode_crop(jpeg, (0, 0, 64, 48), (48, 64), flip=True), stored[:, ::-1])


@pytest.mark.parametrize(
    "shape, box",
    [((120, 160), (20, 30, 100, 90)), ((1200, 1600), (200, 300, 1000, 900)), ((121, 163), (1, 2, 162, 120))],
)
def test_the_box_is_what_is_shown(shape, box):
    """Colours at the corners of the result are those of the box; the large frame takes the scaled decoder."""
    jpeg, size = encode(gradient(*shape)), (40, 56)
    image = decode_crop(jpeg, box, size)
    flipped = decode_crop(jpeg, box, size, flip=True)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    left, top, right, bottom = box
    columns = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1] - 0.5
    rows = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0] - 0.5
    expected_red = 10 + 230 * columns / (shape[1] - 1)
    expected_green = 10 + 230 * rows / (shape[0] - 1)
    assert np.abs(image[2:-2, 2:-2, 0] - expected_red[None, 2:-2]).max() < 4
    assert np.abs(image[2:-2, 2:-2, 1] - expected_green[2:-2, None]).max() < 4
    np.testing.assert_array_equal(flipped, image[:, ::-1])


@pytest.mark.parametrize(
    "shape, box, least",
    [
        ((256, 340), (20, 10, 280, 250), None),
        ((360, 480), (50, 0, 390, 340), None),  # 1.5 × too large: decoded whole
        ((720, 1280), (300, 10, 1000, 715), 45),
        ((1081, 1921), (7, 3, 1200, 1080), 45),
    ],
)
def test_decoding_to_less_costs_no_quality(shape, box, least):
    """Against the whole frame decoded and then resized; `least` decibels of the peak over the difference."""
    generator = np.random.default_rng(0)
    scene = sum(
        weight
        * np.asarray(
            Image.fromarray(generator.standard_normal((n, n), np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC)
        )
        for n, weight in ((8, 40), (60, 20), (300, 8))
    )
    image = np.clip(np.stack([128 + scene, 110 - scene, 140 + 0.5 * scene], -1), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
    whole = Image.fromarray(simplejpeg.decode_jpeg(jpeg, "RGB"))
    expected = np.asarray(whole.resize((224, 224), Image.Resampling.BILINEAR, box=box)).astype(float)
    difference = np.square(decode_crop(jpeg, box, (224, 224)) - expected).mean()
    assert difference == 0 if least is None else 20 * np.log10(255) - 10 * np.log10(difference) > least
    assert (frames.decode(jpeg, box, (224, 224))[0].shape[:2] == shape) == (least is None)


def test_a_damaged_frame_is_refused():
    jpeg = encode(gradient(48, 64))
    with pytest.raises(ValueError):
        decode_crop(jpeg[: len(jpeg) // 2], (0, 0, 64, 48), (48, 64))
    with pytest.raises(ValueError):
        frames.frame_size(b"not a jpeg")
