"""Toy Band: eight procedural instruments whose sight and sound are tied as in the world.

Size gives pitch (large is low), brightness gives level (bright is loud), the number of dark stripes gives the notes
per second, shape and hue go with the timbre. In a scene the silent objects draw all of these at random, so only the
sound tells which object plays.
"""

import colorsys
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.signal import lfilter

from av_mae.prepare.demo import clips as demo_clips
from av_mae.prepare.demo.clips import RATE

LOUDNESS_SECONDS = 0.06  # a note's level is the root mean square of its beginning
HIGHEST = 0.48 * RATE  # partials above are left out


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * RATE)) / RATE


def _envelope(time: np.ndarray, attack: float = 0.012, release: float = 0.03) -> np.ndarray:
    """Rises and falls linearly; `attack` and `release` in seconds."""
    end = time[-1] + 1 / RATE
    return np.clip(np.minimum(time / attack, (end - time) / release), 0, 1)


def _partials(
    time: np.ndarray,
    frequencies: np.ndarray,
    amplitudes: Sequence[float] | np.ndarray,
    decays: np.ndarray | None = None,
) -> np.ndarray:
    """A sum of sines; those above HIGHEST are left out."""
    kept = [number for number, frequency in enumerate(frequencies) if frequency < HIGHEST]
    sound = np.zeros(len(time))
    for number in kept:
        partial = amplitudes[number] * np.sin(2 * math.pi * frequencies[number] * time)
        sound += partial if decays is None else partial * np.exp(-time / decays[number])
    return sound


def _resonant_noise(generator: np.random.Generator, samples: int, frequency: float, width: float) -> np.ndarray:
    """White noise through a two-pole resonator at `frequency` Hz, `width` Hz wide; root mean square near 1."""
    radius = math.exp(-math.pi * width / RATE)
    poles = [1, -2 * radius * math.cos(2 * math.pi * frequency / RATE), radius**2]
    noise = lfilter([1, 0, -1], poles, generator.standard_normal(samples + 64))[64:]
    return noise / math.sqrt(np.mean(noise**2) + 1e-12)


def bell(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.6)
    ratios = np.array([1, 1.19, 2, 2.76, 3.76])
    sound = _partials(time, 1.5 * pitch * ratios, [1, 0.7, 0.6, 0.45, 0.3], 0.22 / np.sqrt(ratios))
    return sound * _envelope(time, 0.002)


def flute(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.85 * seconds)
    breath = _resonant_noise(generator, len(time), 2400, 1200)
    return (np.sin(4 * math.pi * pitch * time) + 0.15 * breath) * _envelope(time)


def organ(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.85 * seconds)
    harmonics = np.array([1, 3, 5, 7])
    return _partials(time, pitch * harmonics, 1 / np.sqrt(harmonics)) * _envelope(time, 0.006)


def string(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """Karplus-Strong: a burst of noise in a loop of one period, averaged over neighbours each time around."""
    time = _time(0.6)
    period = RATE / pitch
    delay = int(period - 0.5)
    fraction = period - 0.5 - delay  # linear interpolation for what is not a whole sample
    loop = np.zeros(delay + 3)
    loop[0] = 1
    loop[delay:] = -0.997 * np.array([0.5 * (1 - fraction), 0.5, 0.5 * fraction])
    burst = np.zeros(len(time))
    burst[: delay + 1] = generator.uniform(-1, 1, delay + 1)
    burst[: delay + 1] -= burst[: delay + 1].mean()
    return lfilter([1], loop, burst) * _envelope(time, 0.001)


def drum(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.06)
    noise = _resonant_noise(generator, len(time), 0.5 * pitch, 0.4 * pitch)
    return (0.5 * noise + np.sin(math.pi * pitch * time)) * np.exp(-time / 0.025) * _envelope(time, 0.001, 0.01)


def trumpet(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.85 * seconds)
    frequencies = pitch * np.arange(1, 1 + int(HIGHEST / pitch))
    amplitudes = 0.05 + np.exp(-(((frequencies - 1800) / 600) ** 2))
    return _partials(time, frequencies, amplitudes) * _envelope(time, 0.015)


def maraca(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.03)
    noise = _resonant_noise(generator, len(time), 1800 + 1.6 * pitch, 300)
    return noise * np.exp(-time / 0.015) * _envelope(time, 0.001, 0.008)


def siren(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    time = _time(0.85 * seconds)
    height = 1 - np.abs(2 * time / time[-1] - 1)  # octaves above the pitch: up and down again
    phase = 2 * math.pi * np.cumsum(pitch * 2**height) / RATE
    return (np.sin(phase) + 0.4 * np.sin(2 * phase)) * _envelope(time, 0.006)


NOTES: dict[str, Callable] = {
    "bell": bell,
    "flute": flute,
    "organ": organ,
    "string": string,
    "drum": drum,
    "trumpet": trumpet,
    "maraca": maraca,
    "siren": siren,
}


@dataclasses.dataclass(frozen=True)
class Melody:
    """What an instrument plays.

    Args:
        kind: one of NOTES.
        pitches: Hz of each note.
        spacing: seconds from note to note.
        first: seconds at which the first note begins; may be negative.
        root_mean_square: of each note's beginning.
    """

    kind: str
    pitches: Sequence[float]
    spacing: float
    first: float
    root_mean_square: float


def play_notes(melody: Melody, samples: int, generator: np.random.Generator) -> np.ndarray:
    """A melody as float64 [samples]. Notes ring on into the next one."""
    sound = np.zeros(samples)
    for number, pitch in enumerate(melody.pitches):
        note = NOTES[melody.kind](pitch, melody.spacing, generator)
        loudness = math.sqrt(np.mean(note[: round(LOUDNESS_SECONDS * RATE)] ** 2)) + 1e-9
        start = round((melody.first + number * melody.spacing) * RATE)
        begin, end = max(0, start), min(samples, start + len(note))
        if begin < end:
            sound[begin:end] += note[begin - start : end - start] * (melody.root_mean_square / loudness)
    return sound


SUPERSAMPLE = 2  # samples per pixel and direction, for smooth edges

# Silhouettes are conditions on coordinates x (right) and y (down) in -1…1. Every shape reaches -1 and 1 in at least one
# of the two directions, so its size is its longer side.


def ellipse(x: np.ndarray, y: np.ndarray, column: float, row: float, width: float, height: float) -> np.ndarray:

    return ((x - column) / width) ** 2 + ((y - row) / height) ** 2 <= 1


def block(x: np.ndarray, y: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:

    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def bell_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half_width = 0.3 + 0.5 * np.clip((y + 0.75) / 1.3, 0, 1) ** 2.5
    body = (np.abs(x) <= half_width) & (y >= -0.75) & (y <= 0.6)
    rim = block(x, y, -0.95, 0.55, 0.95, 0.72)
    return body | rim | ellipse(x, y, 0, -0.78, 0.2, 0.22) | ellipse(x, y, 0, 0.78, 0.2, 0.22)


def flute_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tube = block(x, y, -1, -0.13, 1, 0.13)
    return tube | block(x, y, -0.78, -0.24, -0.52, 0.24) | ellipse(x, y, 0.9, 0, 0.1, 0.22)


def organ_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pipes = np.zeros(x.shape, bool)
    for number, top in enumerate((-0.35, -0.7, -1.0, -0.7, -0.35)):
        left = -0.9 + 0.38 * number
        pipes |= block(x, y, left, top, left + 0.28, 0.6)
    return pipes | block(x, y, -1, 0.6, 1, 1)


def string_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    body = ellipse(x, y, 0, 0.58, 0.55, 0.42) | ellipse(x, y, 0, 0.02, 0.4, 0.34)
    return body | block(x, y, -0.1, -1, 0.1, 0) | block(x, y, -0.24, -1, 0.24, -0.78)


def drum_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    skin = ellipse(x, y, 0, -0.42, 0.92, 0.26) | ellipse(x, y, 0, 0.56, 0.92, 0.26)
    body = block(x, y, -0.92, -0.42, 0.92, 0.56)
    left_stick = (np.abs(x - y - 0.02) < 0.13) & block(x, y, -1, -1, -0.3, -0.3)
    right_stick = (np.abs(x + y + 0.02) < 0.13) & block(x, y, 0.3, -1, 1, -0.3)
    return skin | body | left_stick | right_stick


def trumpet_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    flare = (np.abs(y) <= 0.1 + 0.5 * np.clip((x - 0.35) / 0.65, 0, 1) ** 2) & (x >= -0.95) & (x <= 1)
    loop = ellipse(x, y, -0.05, 0.3, 0.5, 0.3) & ~ellipse(x, y, -0.05, 0.3, 0.32, 0.14)
    valves = block(x, y, -0.38, -0.42, -0.24, 0.2) | block(x, y, -0.12, -0.42, 0.02, 0.2)
    return flare | loop | valves | block(x, y, 0.14, -0.42, 0.28, 0.2) | block(x, y, -1, -0.2, -0.9, 0.2)


def maraca_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ellipse(x, y, 0, -0.48, 0.5, 0.52) | block(x, y, -0.14, -0.1, 0.14, 1) | ellipse(x, y, 0, 0.88, 0.22, 0.12)


def siren_shape(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    dome = ellipse(x, y, 0, 0.35, 0.62, 0.85) & (y <= 0.35)
    base = block(x, y, -1, 0.35, 1, 0.8)
    radius, angle = np.hypot(x, y - 0.1), np.arctan2(0.1 - y, np.abs(x))
    rays = (radius >= 0.92) & (radius <= 1.25) & (np.abs((angle / math.pi * 6) % 1 - 0.5) > 0.3) & (y < 0.2)
    return dome | base | (rays & (np.abs(x) <= 1) & (y >= -1))


# Kind → (condition, axis along which the stripes follow one another).
SHAPES: dict[str, tuple[Callable, str]] = {
    "bell": (bell_shape, "y"),
    "flute": (flute_shape, "x"),
    "organ": (organ_shape, "y"),
    "string": (string_shape, "y"),
    "drum": (drum_shape, "y"),
    "trumpet": (trumpet_shape, "x"),
    "maraca": (maraca_shape, "y"),
    "siren": (siren_shape, "x"),
}


@functools.lru_cache(maxsize=128)
def _grid(pixels: int) -> np.ndarray:
    return (np.arange(pixels * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE - pixels / 2


def silhouette(kind: str, size: float, degrees: float, flip: bool, stripes: int) -> tuple[np.ndarray, np.ndarray]:
    """A shape as it covers the pixels.

    Args:
        kind: one of SHAPES.
        size: pixels of the longer side before the rotation.
        degrees: of the rotation.
        flip: whether left and right are exchanged.
        stripes: number of dark stripes.

    Returns:
        How much of each pixel the shape covers, and how much of that is a dark stripe: float32 [h, w] each, 0…1,
        cropped to the pixels of which the shape covers at least half.
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


NAME = "toy_band"
DESCRIPTION = "Toy Band: procedural instruments with exact annotations (class, boxes, mask, clean sources)."
HUES = {"bell": 0, "flute": 135, "organ": 270, "string": 45, "drum": 180, "trumpet": 315, "maraca": 90, "siren": 225}
CLASSES = tuple(HUES)
HUE_SPREAD = 10.0  # degrees; the knob of difficulty
DARK = 0.45  # value of a stripe over that of the object
FULL_LEVEL = 0.12  # root mean square of a note at 0 dB
SHIFTS = (-2, 0, 0, 2)  # semitones


@dataclasses.dataclass(frozen=True)
class Instrument:
    """One object. `size` pixels, `degrees` of rotation, `hue` degrees, `saturation` and `value` 0…1."""

    kind: str
    size: float
    degrees: float
    flip: bool
    hue: float
    saturation: float
    value: float
    stripes: int


def draw_instrument(generator: np.random.Generator, kind: str, largest: float = 56.0) -> Instrument:
    return Instrument(
        kind=kind,
        size=generator.uniform(28, largest),
        degrees=generator.uniform(-20, 20),
        flip=bool(generator.integers(2)),
        hue=(HUES[kind] + generator.normal(0, HUE_SPREAD)) % 360,
        saturation=generator.uniform(0.7, 1),
        value=generator.uniform(0.35, 1),
        stripes=int(generator.integers(2, 7)),
    )


def pitch_of(instrument: Instrument, deviation: float = 0.0) -> float:
    """Hz; `deviation` in octaves."""
    return 220 * 2 ** (2 * (56 - instrument.size) / 28 + deviation)


def level_of(instrument: Instrument) -> float:
    """Decibels below the full level."""
    return -16 + 16 * (instrument.value - 0.35) / 0.65


def play(instrument: Instrument, generator: np.random.Generator) -> np.ndarray:
    """The instrument's sound over the whole clip, float64 [SAMPLES]."""
    pitch = pitch_of(instrument, generator.normal(0, 0.1))
    level = level_of(instrument) + generator.normal(0, 1)
    spacing, phase = 1 / instrument.stripes, generator.uniform()
    count = math.ceil(demo_clips.SECONDS * instrument.stripes) + 1
    pitches = [pitch * 2 ** (shift / 12) for shift in generator.choice(SHIFTS, count)]
    volume = FULL_LEVEL * 10 ** (level / 20)
    melody = Melody(instrument.kind, pitches, spacing, (phase - 1) * spacing, volume)
    return play_notes(melody, demo_clips.SAMPLES, generator)


def paint(
    image: np.ndarray, instrument: Instrument, corner: tuple[int, int], coverage: np.ndarray, darkness: np.ndarray
) -> np.ndarray:
    """Paints an instrument into an image.

    Args:
        image: float32 [H, W, 3], which is changed.
        instrument: gives the colour.
        corner: (top, left) of the silhouette.
        coverage: [h, w], the share of each pixel that the silhouette covers.
        darkness: [h, w], the share of that which is a dark stripe.

    Returns:
        bool [H, W], the pixels of which the silhouette covers at least half.
    """
    top, left = corner
    colour = np.array(colorsys.hsv_to_rgb(instrument.hue / 360, instrument.saturation, instrument.value), np.float32)
    shade = (1 - (1 - DARK) * darkness)[..., None] * (255 * colour)
    part = image[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    part += coverage[..., None] * (shade - part)
    mask = np.zeros(image.shape[:2], bool)
    mask[top : top + coverage.shape[0], left : left + coverage.shape[1]] = coverage >= 0.5
    return mask


def draw_scene(generator: np.random.Generator, objects: int) -> tuple[list[Instrument], list, list]:
    """Instruments of different kinds with their silhouettes and corners (top, left), boxes apart from one another."""
    kinds = [CLASSES[number] for number in generator.permutation(len(CLASSES))[:objects]]
    largest = 46.0 if objects > 2 else 56.0
    while True:
        instruments = [draw_instrument(generator, kind, largest) for kind in kinds]
        shapes = [silhouette(one.kind, one.size, one.degrees, one.flip, one.stripes) for one in instruments]
        corners = demo_clips.place_boxes(generator, [coverage.shape for coverage, _ in shapes])
        if corners is not None:
            return instruments, shapes, corners


def compose(seed: int, split: str, index: int, variant: str) -> demo_clips.Clip:
    """Clip `index` of a split ('train', 'test'); the same for the same arguments."""
    generator = demo_clips.clip_generator(NAME, split, seed, index)
    objects = int(generator.integers(2, 4)) if variant == "scene" else 1
    instruments, shapes, corners = draw_scene(generator, objects)
    sounding = int(generator.integers(objects))
    image = demo_clips.background(generator, split)
    masks = [paint(image, one, corner, *shape) for one, shape, corner in zip(instruments, shapes, corners)]
    playing = [instruments[sounding]]
    if variant == "mixture":
        others = [kind for kind in CLASSES if kind != playing[0].kind]
        playing.append(draw_instrument(generator, others[generator.integers(len(others))]))
    sources = np.stack([play(one, generator) for one in playing])
    sound, sources = demo_clips.turn_down(sources.sum(0), sources)
    frame = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    labels = np.array([CLASSES.index(one.kind) for one in instruments], np.int64)
    return demo_clips.Clip(
        id=demo_clips.clip_id(NAME, variant, split, index),
        label=int(labels[sounding]),
        frames=np.broadcast_to(frame, (demo_clips.FRAMES, *frame.shape)),
        frame_rate=demo_clips.FRAME_RATE,
        sound=sound,
        rate=demo_clips.RATE,
        boxes=np.stack([demo_clips.box_of(mask) for mask in masks]),
        object_labels=labels,
        sounding=sounding,
        mask=masks[sounding],
        sources=sources,
    )
