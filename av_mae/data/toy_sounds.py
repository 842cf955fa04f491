"""Notes of the eight toy instruments. Each takes (pitch in Hz, seconds, generator) and gives float64 [samples]."""

import math
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from av_mae.data.demo_clips import RATE

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
    poles = [1, -2 * radius * math.cos(2 * math.pi * frequency / RATE), radius ** 2]
    noise = lfilter([1, 0, -1], poles, generator.standard_normal(samples + 64))[64:]
    return noise / math.sqrt(np.mean(noise ** 2) + 1e-12)


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
    burst[:delay + 1] = generator.uniform(-1, 1, delay + 1)
    burst[:delay + 1] -= burst[:delay + 1].mean()
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
    phase = 2 * math.pi * np.cumsum(pitch * 2 ** height) / RATE
    return (np.sin(phase) + 0.4 * np.sin(2 * phase)) * _envelope(time, 0.006)


NOTES: dict[str, Callable] = {"bell": bell, "flute": flute, "organ": organ, "string": string, "drum": drum,
                              "trumpet": trumpet, "maraca": maraca, "siren": siren}


def play(kind: str, pitches: list[float], spacing: float, first: float, root_mean_square: float, samples: int,
         generator: np.random.Generator) -> np.ndarray:
    """Notes every `spacing` seconds from second `first` (may be negative) on: float64 [samples].

    Each note begins with the given root mean square. Notes ring on into the next one.
    """
    sound = np.zeros(samples)
    for number, pitch in enumerate(pitches):
        note = NOTES[kind](pitch, spacing, generator)
        loudness = math.sqrt(np.mean(note[:round(LOUDNESS_SECONDS * RATE)] ** 2)) + 1e-9
        start = round((first + number * spacing) * RATE)
        begin, end = max(0, start), min(samples, start + len(note))
        if begin < end:
            sound[begin:end] += note[begin - start:end - start] * (root_mean_square / loudness)
    return sound
