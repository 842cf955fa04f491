"""From a mask on the mel spectrogram of a mixture back to a waveform, as the published system does it; ideal masks."""

import functools

import numpy as np
import scipy.fft

from av_mae.config import SoundConfig
from av_mae.data.sound import mel_filter_bank

_SILENT_WINDOW = 1e-11  # where no window reaches, the waveform is unknown


@functools.lru_cache(maxsize=8)
def _window_and_filters(sound: SoundConfig) -> tuple[np.ndarray, np.ndarray]:
    """The periodic Hann window float32 [n_fft] and the filter bank float32 [n_fft // 2 + 1, mels]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    return window.astype(np.float32), mel_filter_bank(sound)


def stft(waveform: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """The complex spectra of all frames, centred on multiples of hop, with reflect padding.

    waveform: float32 [samples], more than one. Returns complex64 [n_fft // 2 + 1, samples // hop + 1].
    """
    window, _ = _window_and_filters(sound)
    padded = np.pad(waveform, sound.n_fft // 2, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, sound.n_fft)[::sound.hop]
    return scipy.fft.rfft(frames * window, axis=1).T


def inverse_stft(spectrum: np.ndarray, sound: SoundConfig, samples: int) -> np.ndarray:
    """The waveform whose spectra come closest (least squares: overlapping windowed frames, over the windows' squares).

    spectrum: complex [n_fft // 2 + 1, frames]. Returns float32 [samples]; what no window reaches is 0.
    """
    window, _ = _window_and_filters(sound)
    frames = scipy.fft.irfft(spectrum.T, sound.n_fft, axis=1) * window
    total = np.zeros((2, sound.n_fft + max(samples, sound.hop * len(frames))))
    for number, frame in enumerate(frames):
        total[:, number * sound.hop:number * sound.hop + sound.n_fft] += frame, np.square(window)
    waveform, weight = total[:, sound.n_fft // 2:sound.n_fft // 2 + samples]
    return np.divide(waveform, weight, out=np.zeros(samples), where=weight > _SILENT_WINDOW).astype(np.float32)


def apply_mask(mixture: np.ndarray, mask: np.ndarray, sound: SoundConfig) -> np.ndarray:
    """The part of a mixture that a mask on its mel spectrogram keeps.

    One frame of zeros is appended (features drop the last frame), the mask is spread to linear frequency by the filter
    bank, and the mixture's complex spectrum is multiplied with it.

    mixture: float32 [samples]; mask: [mels, samples // hop] in 0…1. Returns float32 [samples].
    """
    _, filters = _window_and_filters(sound)
    spread = filters @ np.pad(mask, ((0, 0), (0, 1))).astype(np.float32)
    return inverse_stft(spread * stft(mixture, sound), sound, len(mixture))


def ideal_masks(sources: np.ndarray, kind: str, sound: SoundConfig) -> np.ndarray:
    """The masks that a separator would predict if it knew the sources: what its estimates are compared with.

    sources: float32 [m, samples], whose sum is the mixture; kind: 'ratio', each source's share of the sources' mel
    power, or 'binary', 1 where the source has more than all others together. (The published training targets compare
    a source with the mixture instead: they are lower.)
    Returns float32 [m, mels, samples // hop], 0 where nothing sounds.
    """
    _, filters = _window_and_filters(sound)
    spectra = np.stack([stft(source, sound)[:, :-1] for source in sources])
    power = filters.T @ np.square(np.abs(spectra))
    total = power.sum(0)
    share = np.divide(power, total, out=np.zeros_like(power), where=total > 0)
    return {"ratio": share, "binary": (share > 0.5).astype(np.float32)}[kind]
