"""Spoken Digits: real handwriting (MNIST) and real speech (Free Spoken Digit Dataset).

Coloured digits drift over a textured background; one of them is spoken over noise. Train and test share no handwriting
sample, no recording, no speaker and no kind of texture. Training speech is changed in tempo and pitch.
"""

import colorsys
import dataclasses
import functools
import importlib.resources
import io
import math

import numpy as np
import soundfile
import soxr
from PIL import Image
from scipy.signal import lfilter

from av_mae.prepare.demo import clips as demo_clips
from av_mae.prepare.demo.clips import RATE

WINDOW = 256  # samples: 32 ms, two periods of a low voice
HOP = WINDOW // 2
SEARCH = 80  # samples around the expected position, one period of a low voice
_HANN = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(WINDOW) / WINDOW)


def stretch(sound: np.ndarray, factor: float) -> np.ndarray:
    """Makes a sound [samples] `factor` times as long with its pitch kept: float64 [round(factor · samples)].

    Overlapping windows are moved; each is taken where it best continues the one before (WSOLA).
    """
    length = round(factor * len(sound))
    padded = np.concatenate([np.zeros(HOP + SEARCH), sound, np.zeros(2 * WINDOW + 2 * SEARCH)])
    result = np.zeros(length + 2 * WINDOW)
    position = SEARCH
    for start in range(0, length + HOP, HOP):
        expected = SEARCH + round(start / factor)
        if start:
            follow = padded[position + HOP : position + HOP + WINDOW]
            around = padded[expected - SEARCH : expected + SEARCH + WINDOW]
            position = expected - SEARCH + int(np.argmax(np.correlate(around, follow, "valid")))
        result[start : start + WINDOW] += _HANN * padded[position : position + WINDOW]
    return result[HOP : HOP + length]


def perturb(sound: np.ndarray, tempo: float, pitch: float) -> np.ndarray:
    """`tempo` times as fast and `pitch` times as high: float64 [about samples / tempo]."""
    resampled = soxr.resample(sound.astype(np.float64), pitch * RATE, RATE)
    return stretch(resampled, pitch / tempo)


NAME = "spoken_digits"
DESCRIPTION = (
    "Spoken Digits: handwriting from MNIST (CC BY-SA 3.0), speech from the Free Spoken Digit Dataset "
    "(CC BY-SA 4.0), composed to clips with exact annotations (class, boxes, mask, clean sources)."
)
CLASSES = tuple("zero one two three four five six seven eight nine".split())
TEST_SPEAKER = "theo"
PERTURBATION = (0.82, 1.22)
LEVEL = 0.1  # root mean square of the loudest speech
SPEECH_SECONDS = (0.5, 1.5)  # where speech lies, if short enough: inside every 1.5 s of the clip
NOISE_LEVELS = 255 * 0.7 * 0.225  # deviation 0.7 of a normalised image (ImageNet deviation 0.225)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A variant.

    Args:
        digits: how many are in the image.
        sizes: smallest and largest size of a digit's 28 × 28 field, in pixels.
        voices: speakers at once.
        image_noise: deviation of the noise in the image, in levels of 255.
        noise_db: speech over noise in decibels, mean powers over the whole clip: at 0, spoken sounds rise above the
            noise.
        drift: pixels per second.
    """

    digits: int
    sizes: tuple[float, float]
    voices: int
    image_noise: float
    noise_db: float
    drift: float = 4.0


RECIPES = {
    "single": Recipe(digits=1, sizes=(56, 84), voices=1, image_noise=NOISE_LEVELS, noise_db=0),
    "scene": Recipe(digits=2, sizes=(40, 48), voices=1, image_noise=0, noise_db=10),
    "mixture": Recipe(digits=1, sizes=(56, 84), voices=2, image_noise=0, noise_db=20),
}


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Images uint8 [n, 28, 28] and, for each digit, the numbers of the split's images."""
    with np.load(_asset("handwriting.npz"), allow_pickle=False) as stored:
        images, digits, train = stored["images"], stored["digits"], int(stored["train"])
    of_split = (np.arange(len(digits)) < train) == (split == "train")
    return images, tuple(np.flatnonzero(of_split & (digits == digit)) for digit in range(10))


@functools.cache
def recordings(split: str) -> tuple[dict, tuple[np.ndarray, ...]]:
    """The stored arrays and, for each digit, the numbers of the split's recordings."""
    with np.load(_asset("speech.npz"), allow_pickle=False) as stored:
        arrays = dict(stored)
    of_test = arrays["names"][arrays["speakers"]] == TEST_SPEAKER
    of_split = of_test == (split == "test")
    return arrays, tuple(np.flatnonzero(of_split & (arrays["digits"] == digit)) for digit in range(10))


def _asset(name: str) -> io.BytesIO:
    return io.BytesIO(importlib.resources.files("av_mae").joinpath("assets", name).read_bytes())


def read_recording(arrays: dict, number: int) -> np.ndarray:
    """A recording as float64 [samples], 8 kHz."""
    start, end = arrays["offsets"][number : number + 2]
    return soundfile.read(io.BytesIO(arrays["flac"][start:end].tobytes()))[0]


def draw_digit(generator: np.random.Generator, split: str, digit: int, sizes: tuple[float, float]) -> np.ndarray:
    """A handwritten digit as coverage float32 [h, w], 0…1, cropped to pixels covered at least half."""
    images, numbers = handwriting(split)
    image = Image.fromarray(images[generator.choice(numbers[digit])])
    size = round(generator.uniform(*sizes))
    coverage = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    coverage = np.clip(1.5 * coverage - 0.1, 0, 1)
    covered = coverage >= 0.5
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw_colour(generator: np.random.Generator) -> np.ndarray:
    """A colour float32 [3], levels 0…255; it says nothing about the digit."""
    hue, saturation, value = generator.uniform(), generator.uniform(0.7, 1), generator.uniform(0.6, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def draw_video(generator, split: str, digits: list[int], recipe: Recipe) -> tuple[np.ndarray, list[np.ndarray]]:
    """Frames uint8 [k, H, W, 3] and each digit's pixels in the middle frame, bool [H, W]."""
    reach = round(recipe.drift * demo_clips.SECONDS / 2)  # pixels on either side that the drift needs
    corners = None
    while corners is None:
        glyphs = [draw_digit(generator, split, digit, recipe.sizes) for digit in digits]
        spans = [(glyph.shape[0] + 2 * reach, glyph.shape[1] + 2 * reach) for glyph in glyphs]
        corners = demo_clips.place_boxes(generator, spans)
    seconds = (np.arange(demo_clips.FRAMES) - demo_clips.MIDDLE) / demo_clips.FRAME_RATE
    video = np.repeat(demo_clips.background(generator, split)[None], demo_clips.FRAMES, 0)
    masks = []
    for glyph, (top, left) in zip(glyphs, corners):
        colour, velocity = draw_colour(generator), generator.uniform(-recipe.drift, recipe.drift, 2)
        steps = np.rint(seconds[:, None] * velocity).astype(int) + (top + reach, left + reach)
        for frame, (row, column) in zip(video, steps):
            part = frame[row : row + glyph.shape[0], column : column + glyph.shape[1]]
            part += glyph[..., None] * (colour - part)
        row, column = steps[demo_clips.MIDDLE]
        mask = np.zeros(video.shape[1:3], bool)
        mask[row : row + glyph.shape[0], column : column + glyph.shape[1]] = glyph >= 0.5
        masks.append(mask)
    if recipe.image_noise:
        video += recipe.image_noise * generator.standard_normal((*video.shape[:3], 1), np.float32)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8), masks


def draw_speech(generator: np.random.Generator, split: str, digit: int) -> np.ndarray:
    """A digit spoken at a random time and level: float64 [SAMPLES]."""
    arrays, numbers = recordings(split)
    spoken = read_recording(arrays, int(generator.choice(numbers[digit])))
    tempo, pitch = np.exp(generator.uniform(math.log(PERTURBATION[0]), math.log(PERTURBATION[1]), 2))
    if split == "train":
        spoken = perturb(spoken, tempo, pitch)
    loudness = LEVEL * 10 ** (generator.uniform(-12, 0) / 20)
    spoken = spoken * (loudness / np.sqrt(np.mean(spoken**2)))
    first, last = (round(second * demo_clips.RATE) for second in SPEECH_SECONDS)
    room = last - first - len(spoken)
    start = first + (int(generator.integers(room + 1)) if room > 0 else room // 2)
    sound = np.zeros(demo_clips.SAMPLES)
    sound[start : start + len(spoken)] = spoken
    return sound


def draw_noise(generator: np.random.Generator, root_mean_square: float) -> np.ndarray:
    """Noise of random colour, from bluish to brownish: float64 [SAMPLES]."""
    colour = generator.uniform(-0.3, 0.9)
    noise = lfilter([1], [1, -colour], generator.standard_normal(demo_clips.SAMPLES))
    return noise * (root_mean_square / np.sqrt(np.mean(noise**2)))


def compose(seed: int, split: str, index: int, variant: str) -> demo_clips.Clip:
    """Clip `index` of a split ('train', 'test'); the same for the same arguments."""
    generator, recipe = demo_clips.clip_generator(NAME, split, seed, index), RECIPES[variant]
    drawn = [int(digit) for digit in generator.permutation(10)[: max(recipe.digits, recipe.voices)]]
    shown = drawn[: recipe.digits]
    sounding = int(generator.integers(recipe.digits))
    spoken = [shown[sounding], *drawn[recipe.digits :]][: recipe.voices]
    frames, masks = draw_video(generator, split, shown, recipe)
    sources = np.stack([draw_speech(generator, split, digit) for digit in spoken])
    noise = draw_noise(generator, np.sqrt(np.mean(sources[0] ** 2)) * 10 ** (-recipe.noise_db / 20))
    sound, sources = demo_clips.turn_down(sources.sum(0) + noise, sources)
    return demo_clips.Clip(
        id=demo_clips.clip_id(NAME, variant, split, index),
        label=shown[sounding],
        frames=frames,
        frame_rate=demo_clips.FRAME_RATE,
        sound=sound,
        rate=demo_clips.RATE,
        boxes=np.stack([demo_clips.box_of(mask) for mask in masks]),
        object_labels=np.array(shown, np.int64),
        sounding=sounding,
        mask=masks[sounding],
        sources=sources,
    )
