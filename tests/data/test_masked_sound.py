"""Masked mixtures back to waveforms, against the golden file and transforms written out in float64."""

import numpy as np
import pytest

from av_mae.config import SoundConfig
from av_mae.data import audio
from av_mae.data.audio import log_mel, mel_filter_bank

SMALL = SoundConfig(rate=8000, n_fft=64, hop=20, mels=6, log_floor=1e-3)


def noise(samples, seed=0):
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def test_agrees_with_the_published_system(shared):
    golden = np.load(shared / "golden" / "audio.npz")
    mask = 1 / (1 + np.exp(-golden["masking/mask_logits"][0]))
    waveform = audio.apply_mask(golden["masking/mixture"][0], mask, SoundConfig())
    assert waveform.dtype == np.float32 and waveform.shape == (48000,)
    np.testing.assert_allclose(waveform, golden["masking/waveform"][0], rtol=0, atol=2e-6)


def plain_stft(waveform, sound):
    n, padded = sound.n_fft, np.pad(waveform.astype(np.float64), sound.n_fft // 2, "reflect")
    time = np.arange(n)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / n)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(n // 2 + 1), time) / n)
    return np.stack(
        [fourier @ (window * padded[start : start + n]) for start in range(0, len(waveform) + 1, sound.hop)], axis=1
    )


@pytest.mark.parametrize("samples", [200, 211, 20, 33])
def test_spectra_and_back(samples):
    waveform = noise(samples)
    spectrum = audio.stft(waveform, SMALL)
    assert spectrum.shape == (33, samples // 20 + 1) and spectrum.dtype == np.complex64
    np.testing.assert_allclose(spectrum, plain_stft(waveform, SMALL), atol=1e-4)
    np.testing.assert_allclose(audio.inverse_stft(spectrum, SMALL, samples), waveform, atol=1e-5)


def test_inverse_is_the_least_squares_waveform():
    """Of any spectra: no waveform's spectra come closer (the gradient is 0 there), written as a linear system."""
    generator = np.random.default_rng(1)
    samples, sound = 96, SoundConfig(rate=8000, n_fft=32, hop=12, mels=3)
    frames = generator.normal(size=(32, 9))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    matrix = np.zeros((9, 32, samples + 32))  # windowed frame number t of a padded waveform, as a matrix
    for number in range(9):
        matrix[number, np.arange(32), 12 * number + np.arange(32)] = window
    best = np.linalg.lstsq(matrix.reshape(288, -1), frames.T.reshape(-1), rcond=None)[0]
    waveform = audio.inverse_stft(np.fft.rfft(frames, axis=0), sound, samples)
    np.testing.assert_allclose(waveform, best[16 : 16 + samples], atol=1e-5)


def test_mask_is_spread_by_the_filter_bank():
    mixture, mask = noise(205, 2), np.random.default_rng(3).random((6, 10))
    spread = np.zeros((33, 11))
    for number, row in enumerate(mel_filter_bank(SMALL).T):
        spread[:, :10] += row[:, None] * mask[number]
    expected = audio.inverse_stft(spread * plain_stft(mixture, SMALL), SMALL, 205)
    np.testing.assert_allclose(audio.apply_mask(mixture, mask, SMALL), expected, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_ideal_masks(count):
    sources = np.stack([noise(200, seed) for seed in range(count)])
    sources[0] *= np.repeat([0, 3], 100)  # silent, then loud
    power = np.stack([10 ** log_mel(source, SMALL).astype(np.float64) - 1e-3 for source in sources])
    ratio = audio.ideal_masks(sources, SMALL)
    np.testing.assert_allclose(ratio, power / power.sum(0), atol=2e-4)
    np.testing.assert_allclose(ratio.sum(0), 1, rtol=1e-5)
    assert 0.2 < np.mean(ratio[0] > 0.5) < 0.8 and ratio[0, :, :3].max() < 0.5


def test_silence_has_empty_masks():
    masks = audio.ideal_masks(np.zeros((2, 200), np.float32), SMALL)
    np.testing.assert_array_equal(masks, np.zeros((2, 6, 10)))
    np.testing.assert_array_equal(audio.apply_mask(np.zeros(200, np.float32), masks[0], SMALL), 0)


def test_ideal_masks_tell_tones_apart():
    """Two tones far apart come out of their sum with little of each other."""
    time = np.arange(16000) / 8000
    sound = SoundConfig(rate=8000, n_fft=400, hop=125, mels=64)
    sources = np.stack([np.sin(2 * np.pi * 400 * time), np.sin(2 * np.pi * 2500 * time)]).astype(np.float32)
    masks = audio.ideal_masks(sources, sound)
    for source, mask in zip(sources, masks, strict=True):
        estimate = audio.apply_mask(sources.sum(0), mask, sound)[400:-400]
        assert np.mean(np.square(estimate - source[400:-400])) < 0.01 * np.mean(np.square(source))
