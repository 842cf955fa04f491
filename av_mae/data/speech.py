"""Changes of tempo and pitch of short recordings."""

import math

import numpy as np
import soxr

from av_mae.data.demo_clips import RATE

WINDOW = 256  # samples: 32 ms, two periods of a low voice
HOP = WINDOW // 2
SEARCH = 80  # samples around the expected place, one period of a low voice
_HANN = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(WINDOW) / WINDOW)


def stretch(sound: np.ndarray, factor: float) -> np.ndarray:
    """Makes a sound [samples] `factor` times as long with its pitch kept: float64 [round(factor · samples)].

    Overlapping windows are moved; each is taken where it best continues the one before (WSOLA).
    """
    length = round(factor * len(sound))
    padded = np.concatenate([np.zeros(HOP + SEARCH), sound, np.zeros(2 * WINDOW + 2 * SEARCH)])
    result = np.zeros(length + 2 * WINDOW)
    place = SEARCH
    for start in range(0, length + HOP, HOP):
        expected = SEARCH + round(start / factor)
        if start:
            follow = padded[place + HOP:place + HOP + WINDOW]
            around = padded[expected - SEARCH:expected + SEARCH + WINDOW]
            place = expected - SEARCH + int(np.argmax(np.correlate(around, follow, "valid")))
        result[start:start + WINDOW] += _HANN * padded[place:place + WINDOW]
    return result[HOP:HOP + length]


def perturb(sound: np.ndarray, tempo: float, pitch: float) -> np.ndarray:
    """`tempo` times as fast and `pitch` times as high: float64 [about samples / tempo]."""
    resampled = soxr.resample(sound.astype(np.float64), pitch * RATE, RATE)
    return stretch(resampled, pitch / tempo)
