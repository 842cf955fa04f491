"""From a mask on the mel spectrogram of a mixture back to a waveform, as the published system does it; ideal masks."""

import functools
import io
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.sparse
import soundfile
import soxr

from av_mae.config import SoundConfig
from av_mae.errors import UserError

BLOCK = 32  # frames transformed at once: what lies between waveform and spectrogram stays in the core's cache


def check_sound(sound: SoundConfig) -> None:
    """Raises UserError where the features of `sound` cannot be computed."""
    if sound.n_fft % 2 or sound.hop > sound.n_fft:
        raise UserError(f"data.sound: n_fft must be even and at least hop, got n_fft={sound.n_fft}, hop={sound.hop}")
    empty = int(np.sum(mel_filter_bank(sound).max(axis=0) == 0))
    if empty:
        raise UserError(
            f"data.sound: {empty} of mels={sound.mels} filters hold no frequency of n_fft={sound.n_fft} "
            f"at rate={sound.rate}; lower mels or raise n_fft"
        )


def mel_filter_bank(sound: SoundConfig) -> np.ndarray:
    """Triangular filters of peak 1 on the HTK mel scale from 0 Hz to rate / 2: float32 [n_fft // 2 + 1, mels]."""
    frequencies = np.linspace(0, sound.rate / 2, sound.n_fft // 2 + 1)
    highest = 2595 * math.log10(1 + sound.rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, sound.mels + 2) / 2595) - 1)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - left) / (centre - left)
    falling = (right - frequencies[:, None]) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _window_and_filters(sound: SoundConfig) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """The periodic Hann window float32 [n_fft] and the filter bank as a sparse matrix [mels, n_fft // 2 + 1]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    # A frequency lies in two filters at most: the sparse product costs 1/8 of the dense one, and unlike a threaded
    # BLAS it gives the same bits in every process.
    return window.astype(np.float32), scipy.sparse.csr_array(mel_filter_bank(sound).T)


def log_mel(waveform: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """Log-mel spectrogram: (log10(mel power + log_floor) - mean) / std.

    Frames are centred on multiples of hop, with reflect padding; the last one is dropped.
    waveform: float32 [samples], more than one sample. Returns float32 [mels, samples // hop].
    """
    window, filters = _window_and_filters(sound)
    count, half = len(waveform) // sound.hop, sound.n_fft // 2
    if len(waveform) > half:  # np.pad alone would cost a tenth of the whole
        padded = np.concatenate([waveform[half:0:-1], waveform, waveform[-2 : -half - 2 : -1]])
    else:
        padded = np.pad(waveform, half, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, sound.n_fft)[:: sound.hop][:count]
    mel = np.empty((sound.mels, count), np.float32)
    for first in range(0, count, BLOCK):
        spectrum = scipy.fft.rfft(frames[first : first + BLOCK].T * window[:, None], axis=0)
        power = np.square(spectrum.real)
        power += np.square(spectrum.imag)
        mel[:, first : first + BLOCK] = filters @ power
    logarithm = np.log(mel + np.float32(sound.log_floor))
    # log10 by the natural logarithm, which NumPy vectorises in float32
    logarithm *= np.float32(1 / (math.log(10) * sound.std))
    logarithm -= np.float32(sound.mean / sound.std)
    return logarithm


def features(waveform: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """log_mel, what the model takes. Raises ValueError where it is not finite."""
    audio = log_mel(waveform, sound)
    if not np.isfinite(audio).all():
        raise ValueError("the log-mel spectrogram is not finite")
    return audio


def extend_mirrored(waveform: np.ndarray, samples: int) -> np.ndarray:
    """[n] → [samples], n ≥ 1: the sound, its reversal (edge sample repeated), the sound again, …, then cut."""
    length = len(waveform)
    if length >= samples:
        return waveform[:samples]
    place = np.arange(samples) % (2 * length)
    return waveform[np.minimum(place, 2 * length - 1 - place)]


def cut(waveform: np.ndarray, own_rate: int, rate: int, first: int, samples: int) -> np.ndarray:
    """float32 [samples] at `rate` Hz of a mono sound at `own_rate` Hz from its sample `first` on.

    What is before and after helps the resampling; a sound that ends sooner is extended by its reversal.
    """

    def read(begin: int, length: int) -> np.ndarray:
        return waveform[begin : begin + length]

    count = min(math.ceil(samples * own_rate / rate), len(waveform) - first)
    return extend_mirrored(read_resampled(read, len(waveform), own_rate, rate, first, count), samples)


def change_volume(waveform: np.ndarray, decibels: float) -> np.ndarray:
    """The waveform louder by `decibels`; nothing is clipped."""
    return waveform * np.float32(10 ** (decibels / 20))


def add_noise(waveform: np.ndarray, snr: float, generator: np.random.Generator) -> np.ndarray:
    """The waveform under white noise `snr` decibels below its mean power (negative: above)."""
    level = math.sqrt(float(np.mean(np.square(waveform), dtype=np.float64)) * 10 ** (-snr / 10))
    return waveform + np.float32(level) * generator.standard_normal(len(waveform), np.float32)


def read_window(encoded: bytes, rate: int, samples: int, place: float) -> tuple[np.ndarray, float, float]:
    """A window of an encoded sound (FLAC, WAV, …) as mono at `rate` Hz; a short sound is extended by its reversal.

    place: 0 takes the first window that the sound holds, 1 the last, 0.5 the middle.
    Returns (float32 [samples], start of the window in seconds, middle of the sound in the window in seconds).
    Raises ValueError where there is no sound, or it cannot be decoded whole.
    """
    if not encoded:
        raise ValueError("the clip has no sound")
    try:
        with _Reader(io.BytesIO(encoded)) as file:
            total, own_rate = file.frames, file.samplerate
            if total == 0:
                raise ValueError("the sound holds no samples")
            needed = math.ceil(samples * own_rate / rate)
            first, count = round(place * max(0, total - needed)), min(needed, total)
            waveform = read_resampled(functools.partial(_read, file), total, own_rate, rate, first, count)
    except soundfile.LibsndfileError as error:  # its own text holds an address
        raise ValueError(error.error_string) from error
    start = first / own_rate
    return extend_mirrored(waveform, samples), start, start + count / own_rate / 2


class _Reader(soundfile.SoundFile):
    """A sound file that is read once: else soundfile seeks to where it is after each read, a tenth of the time."""

    def seekable(self) -> bool:
        return False


def _read(file: _Reader, first: int, count: int) -> np.ndarray:
    """Samples first … first + count of a sound, channels averaged: float32 [count]."""
    if first:
        file.seek(first)
    waveform = file.read(count, dtype="float32")
    if len(waveform) < count:
        raise ValueError(f"the sound breaks off: {first + len(waveform)} of {file.frames} samples can be read")
    return waveform if waveform.ndim == 1 else waveform.mean(axis=1)


_RESAMPLING_MARGIN = 0.02  # seconds read around a window, so that the resampling filter sees real sound at its ends


def read_resampled(
    read: Callable[[int, int], np.ndarray], total: int, own_rate: int, rate: int, first: int, count: int
) -> np.ndarray:
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
    waveform = waveform[skipped : skipped + math.ceil(count * rate / own_rate)]
    if not len(waveform):
        raise ValueError(f"the sound is too short: {count} samples at {own_rate} Hz are none at {rate} Hz")
    return waveform


_SILENT_WINDOW = 1e-11  # where no window reaches, the waveform is unknown


@functools.lru_cache(maxsize=8)
def _window_and_dense_filters(sound: SoundConfig) -> tuple[np.ndarray, np.ndarray]:
    """The periodic Hann window float32 [n_fft] and the filter bank float32 [n_fft // 2 + 1, mels]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    return window.astype(np.float32), mel_filter_bank(sound)


def stft(waveform: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """The complex spectra of all frames, centred on multiples of hop, with reflect padding.

    waveform: float32 [samples], more than one. Returns complex64 [n_fft // 2 + 1, samples // hop + 1].
    """
    window, _ = _window_and_dense_filters(sound)
    padded = np.pad(waveform, sound.n_fft // 2, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, sound.n_fft)[:: sound.hop]
    return scipy.fft.rfft(frames * window, axis=1).T


def inverse_stft(spectrum: np.ndarray, sound: SoundConfig, samples: int) -> np.ndarray:
    """The waveform whose spectra come closest (least squares: overlapping windowed frames, over the windows' squares).

    spectrum: complex [n_fft // 2 + 1, frames]. Returns float32 [samples]; what no window reaches is 0.
    """
    window, _ = _window_and_dense_filters(sound)
    frames = scipy.fft.irfft(spectrum.T, sound.n_fft, axis=1) * window
    total = np.zeros((2, sound.n_fft + max(samples, sound.hop * len(frames))))
    for number, frame in enumerate(frames):
        total[:, number * sound.hop : number * sound.hop + sound.n_fft] += frame, np.square(window)
    waveform, weight = total[:, sound.n_fft // 2 : sound.n_fft // 2 + samples]
    return np.divide(waveform, weight, out=np.zeros(samples), where=weight > _SILENT_WINDOW).astype(np.float32)


def apply_mask(mixture: np.ndarray, mask: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """The part of a mixture that a mask on its mel spectrogram keeps.

    One frame of zeros is appended (features drop the last frame), the mask is spread to linear frequency by the filter
    bank, and the mixture's complex spectrum is multiplied with it.

    mixture: float32 [samples]; mask: [mels, samples // hop] in 0…1. Returns float32 [samples].
    """
    _, filters = _window_and_dense_filters(sound)
    spread = filters @ np.pad(mask, ((0, 0), (0, 1))).astype(np.float32)
    return inverse_stft(spread * stft(mixture, sound), sound, len(mixture))


def ideal_masks(sources: np.ndarray, kind: str, sound: SoundConfig) -> np.ndarray:
    """The masks that a separator would predict if it knew the sources: what its estimates are compared with.

    sources: float32 [m, samples], whose sum is the mixture; kind: 'ratio', each source's share of the sources' mel
    power, or 'binary', 1 where the source has more than all others together. (The published training targets compare
    a source with the mixture instead: they are lower.)
    Returns float32 [m, mels, samples // hop], 0 where nothing sounds.
    """
    _, filters = _window_and_dense_filters(sound)
    spectra = np.stack([stft(source, sound)[:, :-1] for source in sources])
    power = filters.T @ np.square(np.abs(spectra))
    total = power.sum(0)
    share = np.divide(power, total, out=np.zeros_like(power), where=total > 0)
    return {"ratio": share, "binary": (share > 0.5).astype(np.float32)}[kind]
