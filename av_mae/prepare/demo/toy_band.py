"""Toy Band: eight procedural instruments whose sight and sound are tied as in the world.

Size gives pitch (large is low), brightness gives level (bright is loud), the number of dark stripes gives the notes
per second, shape and hue go with the timbre. In a scene the silent objects draw all of these at random, so only the
sound tells which object plays.
"""

import colorsys
import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from av_mae.prepare.demo import clips as demo_clips
from av_mae.prepare.demo import shapes as textures
from av_mae.prepare.demo import shapes as toy_shapes
from av_mae.prepare.demo.clips import RATE

LOUDNESS_SECONDS = 0.06  # a note's level is the root mean square of its beginning
HIGHEST = 0.48 * RATE  # partials above are left out


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * RATE)) / RATE


def _envelope(time: np.ndarray, attack: float = 0.012, release: float = 0.03) -> np.ndarray:
    """Rises and falls linearly; `attack` and `release` in seconds."""
    end = time[-1] + 1 / RATE
    return np.clip(np.minimum(time / attack, (end - time) / release), 0, 1)


def _partials(time, frequencies, amplitudes, decays=None) -> np.ndarray:
    """A sum of sines; those above HIGHEST are left out."""
    kept = [number for number, frequency in enumerate(frequencies) if frequency < HIGHEST]
    sound = np.zeros(len(time))
    for number in kept:
        partial = amplitudes[number] * np.sin(2 * math.pi * frequencies[number] * time)
        sound += partial if decays is None else partial * np.exp(-time / decays[number])
    return sound


def _resonant_noise(generator, samples: int, frequency: float, width: float) -> np.ndarray:
    """White noise through a two-pole resonator at `frequency` Hz, `width` Hz wide; root mean square near 1."""
    radius = math.exp(-math.pi * width / RATE)
    poles = [1, -2 * radius * math.cos(2 * math.pi * frequency / RATE), radius**2]
    noise = lfilter([1, 0, -1], poles, generator.standard_normal(samples + 64))[64:]
    return noise / math.sqrt(np.mean(noise**2) + 1e-12)


def bell(pitch, seconds, generator):
    time = _time(0.6)
    ratios = np.array([1, 1.19, 2, 2.76, 3.76])
    sound = _partials(time, 1.5 * pitch * ratios, [1, 0.7, 0.6, 0.45, 0.3], 0.22 / np.sqrt(ratios))
    return sound * _envelope(time, 0.002)


def flute(pitch, seconds, generator):
    time = _time(0.85 * seconds)
    breath = _resonant_noise(generator, len(time), 2400, 1200)
    return (np.sin(4 * math.pi * pitch * time) + 0.15 * breath) * _envelope(time)


def organ(pitch, seconds, generator):
    time = _time(0.85 * seconds)
    harmonics = np.array([1, 3, 5, 7])
    return _partials(time, pitch * harmonics, 1 / np.sqrt(harmonics)) * _envelope(time, 0.006)


def string(pitch, seconds, generator):
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


def drum(pitch, seconds, generator):
    time = _time(0.06)
    noise = _resonant_noise(generator, len(time), 0.5 * pitch, 0.4 * pitch)
    return (0.5 * noise + np.sin(math.pi * pitch * time)) * np.exp(-time / 0.025) * _envelope(time, 0.001, 0.01)


def trumpet(pitch, seconds, generator):
    time = _time(0.85 * seconds)
    frequencies = pitch * np.arange(1, 1 + int(HIGHEST / pitch))
    amplitudes = 0.05 + np.exp(-(((frequencies - 1800) / 600) ** 2))
    return _partials(time, frequencies, amplitudes) * _envelope(time, 0.015)


def maraca(pitch, seconds, generator):
    time = _time(0.03)
    noise = _resonant_noise(generator, len(time), 1800 + 1.6 * pitch, 300)
    return noise * np.exp(-time / 0.015) * _envelope(time, 0.001, 0.008)


def siren(pitch, seconds, generator):
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


def play_notes(
    kind: str,
    pitches: list[float],
    spacing: float,
    first: float,
    root_mean_square: float,
    samples: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Notes every `spacing` seconds from second `first` (may be negative) on: float64 [samples].

    Each note begins with the given root mean square. Notes ring on into the next one.
    """
    sound = np.zeros(samples)
    for number, pitch in enumerate(pitches):
        note = NOTES[kind](pitch, spacing, generator)
        loudness = math.sqrt(np.mean(note[: round(LOUDNESS_SECONDS * RATE)] ** 2)) + 1e-9
        start = round((first + number * spacing) * RATE)
        begin, end = max(0, start), min(samples, start + len(note))
        if begin < end:
            sound[begin:end] += note[begin - start : end - start] * (root_mean_square / loudness)
    return sound


NAME = "toy_band"
DESCRIPTION = "Toy Band: procedural instruments with exact truth (class, boxes, mask, clean sounds)."
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
    return play_notes(
        instrument.kind,
        pitches,
        spacing,
        (phase - 1) * spacing,
        FULL_LEVEL * 10 ** (level / 20),
        demo_clips.SAMPLES,
        generator,
    )


def paint(
    image: np.ndarray, instrument: Instrument, top: int, left: int, coverage: np.ndarray, darkness: np.ndarray
) -> np.ndarray:
    """Paints a silhouette ([h, w] shares) into float32 [H, W, 3]; returns its pixels as bool [H, W]."""
    colour = np.array(colorsys.hsv_to_rgb(instrument.hue / 360, instrument.saturation, instrument.value), np.float32)
    shade = (1 - (1 - DARK) * darkness)[..., None] * (255 * colour)
    part = image[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    part += coverage[..., None] * (shade - part)
    mask = np.zeros(image.shape[:2], bool)
    mask[top : top + coverage.shape[0], left : left + coverage.shape[1]] = coverage >= 0.5
    return mask


def draw_scene(generator: np.random.Generator, objects: int) -> tuple[list[Instrument], list, list]:
    """Instruments of different kinds with their silhouettes and places (top, left), boxes apart from one another."""
    kinds = [CLASSES[number] for number in generator.permutation(len(CLASSES))[:objects]]
    largest = 46.0 if objects > 2 else 56.0
    while True:
        instruments = [draw_instrument(generator, kind, largest) for kind in kinds]
        shapes = [toy_shapes.silhouette(one.kind, one.size, one.degrees, one.flip, one.stripes) for one in instruments]
        places = demo_clips.place_boxes(generator, [coverage.shape for coverage, _ in shapes])
        if places is not None:
            return instruments, shapes, places


def compose(seed: int, split: str, index: int, variant: str) -> demo_clips.Clip:
    """Clip `index` of a split ('train', 'test'); the same for the same arguments."""
    generator = demo_clips.clip_generator(NAME, split, seed, index)
    objects = int(generator.integers(2, 4)) if variant == "scene" else 1
    instruments, shapes, places = draw_scene(generator, objects)
    sounding = int(generator.integers(objects))
    image = textures.background(generator, split)
    masks = [paint(image, one, *place, *shape) for one, shape, place in zip(instruments, shapes, places)]
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
