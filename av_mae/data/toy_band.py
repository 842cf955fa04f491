"""Toy Band: eight procedural instruments whose sight and sound are tied as in the world.

Size gives pitch (large is low), brightness gives level (bright is loud), the number of dark stripes gives the notes
per second, shape and hue go with the timbre. In a scene the silent objects draw all of these at random, so only the
sound tells which object plays.
"""

import colorsys
import dataclasses
import math

import numpy as np

from av_mae.data import demo_clips, textures, toy_shapes, toy_sounds

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
    return Instrument(kind=kind, size=generator.uniform(28, largest), degrees=generator.uniform(-20, 20),
                      flip=bool(generator.integers(2)), hue=(HUES[kind] + generator.normal(0, HUE_SPREAD)) % 360,
                      saturation=generator.uniform(0.7, 1), value=generator.uniform(0.35, 1),
                      stripes=int(generator.integers(2, 7)))


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
    return toy_sounds.play(instrument.kind, pitches, spacing, (phase - 1) * spacing, FULL_LEVEL * 10 ** (level / 20),
                           demo_clips.SAMPLES, generator)


def paint(image: np.ndarray, instrument: Instrument, top: int, left: int,
          coverage: np.ndarray, darkness: np.ndarray) -> np.ndarray:
    """Paints a silhouette ([h, w] shares) into float32 [H, W, 3]; returns its pixels as bool [H, W]."""
    colour = np.array(colorsys.hsv_to_rgb(instrument.hue / 360, instrument.saturation, instrument.value), np.float32)
    shade = (1 - (1 - DARK) * darkness)[..., None] * (255 * colour)
    part = image[top:top + coverage.shape[0], left:left + coverage.shape[1]]
    part += coverage[..., None] * (shade - part)
    mask = np.zeros(image.shape[:2], bool)
    mask[top:top + coverage.shape[0], left:left + coverage.shape[1]] = coverage >= 0.5
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
        id=demo_clips.clip_id(NAME, variant, split, index), label=int(labels[sounding]),
        frames=np.broadcast_to(frame, (demo_clips.FRAMES, *frame.shape)), frame_rate=demo_clips.FRAME_RATE,
        sound=sound, rate=demo_clips.RATE, boxes=np.stack([demo_clips.box_of(mask) for mask in masks]),
        object_labels=labels, sounding=sounding, mask=masks[sounding], sources=sources)
