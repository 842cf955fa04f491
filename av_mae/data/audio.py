"""Waveforms on the host: windows of encoded audio, log-mel features, and masks on mel spectrograms."""

import functools
import io
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.fft
import scipy.sparse
import soundfile
import soxr

from av_mae.errors import UserError

if TYPE_CHECKING:  # brings in JAX, which decoding processes do without
    from av_mae.config import SoundConfig

_RESAMPLING_MARGIN = 0.02  # seconds
_SILENT_WINDOW = 1e-11  # where no window reaches, the waveform is unknown
BLOCK = 32  # frames transformed at once: what lies between waveform and spectrogram stays in the core's cache


def check_sound(sound: "SoundConfig") -> None:
    """Raises UserError where the features of `sound` cannot be computed."""
    if sound.n_fft % 2 or sound.hop > sound.n_fft:
        raise UserError(f"data.sound: n_fft must be even and at least hop, got n_fft={sound.n_fft}, hop={sound.hop}")
    empty = int(np.sum(mel_filter_bank(sound).max(axis=0) == 0))
    if empty:
        raise UserError(
            f"data.sound: {empty} of mels={sound.mels} filters hold no frequency of n_fft={sound.n_fft} "
            f"at rate={sound.rate}; lower mels or raise n_fft"
        )


def mel_filter_bank(sound: "SoundConfig") -> np.ndarray:
    """Triangular filters of peak 1 on the HTK mel scale from 0 Hz to rate / 2: float32 [n_fft // 2 + 1, mels]."""
    frequencies = np.linspace(0, sound.rate / 2, sound.n_fft // 2 + 1)
    highest = 2595 * math.log10(1 + sound.rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, sound.mels + 2) / 2595) - 1)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - left) / (centre - left)
    falling = (right - frequencies[:, None]) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


class _Transform(NamedTuple):
    """What spectra are computed with: `window` float32 [n_fft], the periodic Hann window; `filters` float32
    [n_fft // 2 + 1, mels], the filter bank; `sparse` [mels, n_fft // 2 + 1], the same for fast products."""

    window: np.ndarray
    filters: np.ndarray
    sparse: scipy.sparse.csr_array


@functools.lru_cache(maxsize=8)
def _transform(sound: "SoundConfig") -> _Transform:
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    filters = mel_filter_bank(sound)
    # A frequency lies in two filters at most: the sparse product costs 1/8 of the dense one, and unlike a threaded
    # BLAS it gives the same bits in every process.
    return _Transform(window.astype(np.float32), filters, scipy.sparse.csr_array(filters.T))


def log_mel(waveform: np.ndarray, sound: "SoundConfig") -> np.ndarray:
    """Log-mel spectrogram: (log10(mel power + log_floor) - mean) / std.

    Frames are centred on multiples of hop, with reflect padding; the last frame is dropped.
    waveform: float32 [samples], more than one sample. Returns float32 [mels, samples // hop].
    """
    window, _, filters = _transform(sound)
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
    logarithm: np.ndarray = np.log(mel + np.float32(sound.log_floor))
    # log10 by the natural logarithm, which NumPy vectorises in float32
    logarithm *= np.float32(1 / (math.log(10) * sound.std))
    logarithm -= np.float32(sound.mean / sound.std)
    return logarithm


def features(waveform: np.ndarray, sound: "SoundConfig") -> np.ndarray:
    """The log-mel spectrogram that the model takes. Raises ValueError where it is not finite."""
    spectrogram = log_mel(waveform, sound)
    if not np.isfinite(spectrogram).all():
        raise ValueError("the log-mel spectrogram is not finite")
    return spectrogram


def change_volume(waveform: np.ndarray, decibels: float) -> np.ndarray:
    """The waveform louder by `decibels`; nothing is clipped."""
    return np.asarray(waveform * np.float32(10 ** (decibels / 20)))


def add_noise(waveform: np.ndarray, snr: float, generator: np.random.Generator) -> np.ndarray:
    """The waveform under white noise `snr` decibels below its mean power (negative: above)."""
    level = math.sqrt(float(np.mean(np.square(waveform), dtype=np.float64)) * 10 ** (-snr / 10))
    noise = np.float32(level) * generator.standard_normal(len(waveform), np.float32)
    return np.asarray(waveform + noise)


def read_window(encoded: bytes, rate: int, samples: int, position: float) -> tuple[np.ndarray, float, float]:
    """Decodes a window of encoded audio (FLAC, WAV, …), channels averaged, resampled.

    Args:
      encoded: the whole file.
      rate: of the result, Hz.
      samples: of the result. Audio that is shorter is extended by its reversal.
      position: 0 takes the first window that the audio holds, 1 the last, 0.5 the middle.

    Returns:
      The waveform float32 [samples], the start of the window in the file in seconds, and the middle of the part of the
      window that was read (not mirrored) in seconds.

    Raises:
      ValueError: there is no audio, or it cannot be decoded whole.
    """
    if not encoded:
        raise ValueError("the clip has no sound")
    try:
        with _Reader(io.BytesIO(encoded)) as file:
            total, own_rate = file.frames, file.samplerate
            if total == 0:
                raise ValueError("the sound holds no samples")
            needed = math.ceil(samples * own_rate / rate)
            first, count = round(position * max(0, total - needed)), min(needed, total)
            margin = _resampling_margin(own_rate, rate)
            begin, end = max(0, first - margin), min(total, first + count + margin)
            if begin:
                file.seek(begin)
            waveform = file.read(end - begin, dtype="float32")
    except soundfile.LibsndfileError as error:  # its own text holds an address
        raise ValueError(error.error_string) from error
    if len(waveform) < end - begin:
        raise ValueError(f"the sound breaks off: {begin + len(waveform)} of {total} samples can be read")
    mono = waveform if waveform.ndim == 1 else waveform.mean(axis=1)
    start = first / own_rate
    return cut(mono, own_rate, rate, first - begin, samples), start, start + count / own_rate / 2


class _Reader(soundfile.SoundFile):
    """An audio file that is read once: else soundfile seeks to where it is after each read, a tenth of the time."""

    def seekable(self) -> bool:
        return False


def cut(waveform: np.ndarray, own_rate: int, rate: int, first: int, samples: int) -> np.ndarray:
    """A window of a waveform, resampled.

    Args:
      waveform: float32 [n]. What lies before and after the window helps the resampling.
      own_rate: of `waveform`, Hz.
      rate: of the result, Hz.
      first: the sample of `waveform` at which the window begins.
      samples: of the result. A waveform that ends sooner is extended by its reversal (edge sample repeated), the
        waveform again, and so on.

    Returns:
      float32 [samples].
    """
    count = min(math.ceil(samples * own_rate / rate), len(waveform) - first)
    window = resample(waveform, own_rate, rate, first, count)
    if len(window) >= samples:
        return window[:samples]
    position = np.arange(samples) % (2 * len(window))
    return window[np.minimum(position, 2 * len(window) - 1 - position)]


def resample(waveform: np.ndarray, own_rate: int, rate: int, first: int, count: int) -> np.ndarray:
    """Samples first … first + count of a waveform at `own_rate` Hz, resampled to `rate` Hz: float32.

    The filter also sees a margin before and after them where the waveform has it. Raises ValueError where the result
    would be empty.
    """
    if own_rate == rate:
        return waveform[first : first + count]
    step, margin = own_rate // math.gcd(own_rate, rate), _resampling_margin(own_rate, rate)
    before = min(margin, first // step * step)
    after = min(margin, len(waveform) - first - count)
    resampled: np.ndarray = soxr.resample(waveform[first - before : first + count + after], own_rate, rate)
    skipped = before * rate // own_rate
    resampled = resampled[skipped : skipped + math.ceil(count * rate / own_rate)]
    if not len(resampled):
        raise ValueError(f"the sound is too short: {count} samples at {own_rate} Hz are none at {rate} Hz")
    return resampled


def _resampling_margin(own_rate: int, rate: int) -> int:
    """Samples around a window that the resampling filter sees: about 0.02 s, after which samples of both rates meet."""
    common = math.gcd(own_rate, rate)
    return 0 if own_rate == rate else own_rate // common * math.ceil(_RESAMPLING_MARGIN * common)


def stft(waveform: np.ndarray, sound: "SoundConfig") -> np.ndarray:
    """The complex spectra of all frames, centred on multiples of hop, with reflect padding.

    waveform: float32 [samples], more than one. Returns complex64 [n_fft // 2 + 1, samples // hop + 1].
    """
    window = _transform(sound).window
    padded = np.pad(waveform, sound.n_fft // 2, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, sound.n_fft)[:: sound.hop]
    return np.asarray(scipy.fft.rfft(frames * window, axis=1).T)


def inverse_stft(spectrum: np.ndarray, sound: "SoundConfig", samples: int) -> np.ndarray:
    """The waveform whose spectra come closest (least squares: overlapping windowed frames, over the windows' squares).

    spectrum: complex [n_fft // 2 + 1, frames]. Returns float32 [samples]; what no window reaches is 0.
    """
    window = _transform(sound).window
    frames = scipy.fft.irfft(spectrum.T, sound.n_fft, axis=1) * window
    total = np.zeros((2, sound.n_fft + max(samples, sound.hop * len(frames))))
    for number, frame in enumerate(frames):
        total[:, number * sound.hop : number * sound.hop + sound.n_fft] += frame, np.square(window)
    waveform, weight = total[:, sound.n_fft // 2 : sound.n_fft // 2 + samples]
    return np.asarray(np.divide(waveform, weight, out=np.zeros(samples), where=weight > _SILENT_WINDOW), np.float32)


def apply_mask(mixture: np.ndarray, mask: np.ndarray, sound: "SoundConfig") -> np.ndarray:
    """The part of a mixture that a mask on its mel spectrogram keeps.

    One frame of zeros is appended (features drop the last frame), the mask is spread to linear frequency by the filter
    bank, and the mixture's complex spectrum is multiplied with it.

    mixture: float32 [samples]; mask: [mels, samples // hop] in 0…1. Returns float32 [samples].
    """
    filters = _transform(sound).filters
    spread = filters @ np.pad(mask, ((0, 0), (0, 1))).astype(np.float32)
    return inverse_stft(spread * stft(mixture, sound), sound, len(mixture))


def ideal_masks(sources: np.ndarray, sound: "SoundConfig") -> np.ndarray:
    """The masks that a separator would predict if it knew the sources: what its estimates are compared with.

    A mask is the source's share of the sources' mel power. (The targets of training compare a source with the mixture
    instead: they are lower.)

    sources: float32 [m, samples], whose sum is the mixture. Returns float32 [m, mels, samples // hop], 0 where all
    sources are silent.
    """
    spectra = np.stack([stft(source, sound)[:, :-1] for source in sources])
    power = _transform(sound).filters.T @ np.square(np.abs(spectra))
    total = power.sum(0)
    share: np.ndarray = np.divide(power, total, out=np.zeros_like(power), where=total > 0)
    return share
