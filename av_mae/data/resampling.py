"""A part of a mono sound at another rate."""

import math
from collections.abc import Callable

import numpy as np
import soxr

_RESAMPLING_MARGIN = 0.02  # seconds read around a window, so that the resampling filter sees real sound at its ends


def take(read: Callable[[int, int], np.ndarray], total: int, own_rate: int, rate: int, first: int,
         count: int) -> np.ndarray:
    """Samples first … first + count of a mono sound of `total` samples at `own_rate` Hz, resampled to `rate` Hz.

    read(first, count) gives float32 [count] of the sound; it is asked for a margin in which both rates' samples
    coincide, too.
    """
    if own_rate == rate:
        return read(first, count)
    step = own_rate // math.gcd(own_rate, rate)
    margin = step * math.ceil(_RESAMPLING_MARGIN * own_rate / step)
    before = min(margin, first // step * step)
    after = min(margin, total - first - count)
    waveform = soxr.resample(read(first - before, before + count + after), own_rate, rate)
    skipped = before * rate // own_rate
    waveform = waveform[skipped:skipped + math.ceil(count * rate / own_rate)]
    if not len(waveform):
        raise ValueError(f"the sound is too short: {count} samples at {own_rate} Hz are none at {rate} Hz")
    return waveform
