"""Log-mel features and windows of sound, against golden tensors and plain float64 NumPy."""

import io

import fake_clips
import numpy as np
import pytest
import soundfile

from av_mae.config import SoundConfig
from av_mae.data import audio
from av_mae.errors import UserError


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "audio.npz")


@pytest.mark.parametrize("name, tolerance", [("demo1", 3e-4), ("demo2", 3e-4), ("chirp2s", 2e-2)])
def test_log_mel_agrees_with_the_published_system(golden, name, tolerance):
    waveform = audio.cut(golden[f"{name}/waveform"][0], 1, 1, 0, 48000)
    features = audio.log_mel(waveform, SoundConfig())
    assert features.dtype == np.float32 and features.shape == (128, 192)
    np.testing.assert_allclose(features, golden[f"{name}/log_mel"][0], rtol=0, atol=tolerance)


def test_filter_bank_agrees_with_the_published_system(golden):
    np.testing.assert_allclose(audio.mel_filter_bank(SoundConfig()), golden["mel_filterbank"], rtol=0, atol=1e-6)


def plain_log_mel(waveform, settings):
    """The definition, term by term, in float64."""
    n, half = settings.n_fft, settings.n_fft // 2
    mirrored = np.arange(-half, len(waveform) + half) % (2 * len(waveform) - 2)
    padded = waveform.astype(np.float64)[np.minimum(mirrored, 2 * len(waveform) - 2 - mirrored)]
    window = np.sin(np.pi * np.arange(n) / n) ** 2
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(half + 1), np.arange(n)) / n)
    mels = np.linspace(0, 2595 * np.log10(1 + settings.rate / 1400), settings.mels + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.arange(half + 1) * settings.rate / n
    columns = []
    for start in range(0, len(waveform) // settings.hop * settings.hop, settings.hop):
        power = np.abs(fourier @ (window * padded[start : start + n])) ** 2
        mel = [
            sum(p * max(0, min((f - a) / (b - a), (c - f) / (c - b))) for f, p in zip(frequencies, power))
            for a, b, c in zip(corners, corners[1:], corners[2:])
        ]
        columns.append((np.log10(np.array(mel) + settings.log_floor) - settings.mean) / settings.std)
    return np.array(columns).T


@pytest.mark.parametrize(
    "settings, samples",
    [
        (SoundConfig(rate=8000, n_fft=256, hop=80, mels=20, log_floor=1e-3, mean=-1.5, std=0.7), 640),
        (SoundConfig(rate=11025, n_fft=130, hop=37, mels=9, log_floor=1e-7), 411),
        (SoundConfig(rate=8000, n_fft=200, hop=50, mels=5, log_floor=1e-5), 90),  # shorter than half a frame
    ],
)
def test_log_mel_agrees_with_its_definition(settings, samples):
    waveform = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    np.testing.assert_allclose(audio.log_mel(waveform, settings), plain_log_mel(waveform, settings), rtol=0, atol=1e-4)


def test_short_sound_is_extended_by_its_reversal():
    waveform = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(audio.cut(waveform, 1, 1, 0, 11), [1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2])
    np.testing.assert_array_equal(audio.cut(waveform, 1, 1, 0, 2), [1, 2])
    np.testing.assert_array_equal(audio.cut(waveform[:1], 1, 1, 0, 3), [1, 1, 1])


def test_window_is_placed_and_its_middle_known():
    waveform = np.linspace(-0.5, 0.5, 1000, dtype=np.float32)
    encoded = fake_clips.flac(waveform, 1000)
    for position, first in ((0.0, 0), (0.5, 350), (1.0, 700)):
        window, start, middle = audio.read_window(encoded, 1000, 300, position)
        np.testing.assert_allclose(window, waveform[first : first + 300], atol=2e-5)
        assert (start, middle) == (first / 1000, first / 1000 + 0.15)
    window, start, middle = audio.read_window(encoded, 1000, 2500, 0.7)
    assert (start, middle) == (0.0, 0.5)
    np.testing.assert_allclose(window, np.concatenate([waveform, waveform[::-1], waveform[:500]]), atol=2e-5)


@pytest.mark.parametrize("own_rate", [44100, 8000])
@pytest.mark.parametrize("position", [0.0, 0.37, 1.0])
def test_resampled_stereo_window_is_the_same_sine(own_rate, position):
    time = np.arange(2 * own_rate) / own_rate
    left, right = 0.4 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 440 * time)
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, right], axis=1), own_rate, format="FLAC")
    window, start, _ = audio.read_window(file.getvalue(), 16000, 16000, position)
    expected = 0.3 * np.sin(2 * np.pi * 440 * (start + np.arange(16000) / 16000))
    assert window.shape == (16000,) and window.dtype == np.float32
    inner = slice(400 if position == 0 else 0, -400 if position == 1 else None)  # the sound's own ends ring
    np.testing.assert_allclose(window[inner], expected[inner], atol=2e-3)


def test_volume_is_in_decibels():
    np.testing.assert_allclose(audio.change_volume(np.ones(3, np.float32), -6.0), 10**-0.3, rtol=1e-6)


def encoded(waveform, kind):
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, format=kind)
    return file.getvalue()


def test_a_sound_that_breaks_off_is_refused():
    whole = encoded(0.1 * np.random.default_rng(0).standard_normal(16000), "FLAC")
    with pytest.raises(ValueError, match="breaks off|lost sync"):
        audio.read_window(whole[: len(whole) // 2], 16000, 16000, 0.5)
    with pytest.raises(ValueError, match="no samples"):
        audio.read_window(encoded(np.zeros(0), "WAV"), 16000, 16000, 0.5)
    with pytest.raises(ValueError, match="^Format not recognised.$"):
        audio.read_window(b"noise", 16000, 16000, 0.5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (SoundConfig(n_fft=100, hop=250), "n_fft=100, hop=250"),
        (SoundConfig(n_fft=256, hop=250, mels=128), "lower mels or raise n_fft"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        audio.check_sound(settings)
