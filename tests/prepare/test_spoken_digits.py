"""Spoken Digits: what is shown, spoken and stored belongs together; train and test share nothing."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from av_mae.prepare.demo import spoken_digits
from av_mae.prepare.demo import spoken_digits as speech


def test_shipped_sources_are_those_of_the_data_sets(shared):
    arrays, numbers = spoken_digits.recordings("train")
    for number in numbers[7][::60]:
        speaker, take = arrays["names"][arrays["speakers"][number]], arrays["takes"][number]
        original, rate = soundfile.read(shared / "media" / "fsdd" / f"7_{speaker}_{take}.wav")
        assert rate == 8000
        np.testing.assert_array_equal(spoken_digits.read_recording(arrays, number), original)
    with np.load(shared / "media" / "mnist" / "mnist_train_first10k.npz") as stored:
        originals = {image.tobytes(): label for image, label in zip(stored["images"], stored["labels"])}
    for split in ("train", "test"):
        images, by_digit = spoken_digits.handwriting(split)
        for digit in range(10):
            assert all(originals[images[number].tobytes()] == digit for number in by_digit[digit])


def test_train_and_test_share_no_sample_recording_or_speaker():
    arrays, _ = spoken_digits.recordings("train")
    spoken = {split: np.concatenate(spoken_digits.recordings(split)[1]) for split in ("train", "test")}
    written = {split: np.concatenate(spoken_digits.handwriting(split)[1]) for split in ("train", "test")}
    images, _ = spoken_digits.handwriting("train")
    assert len(spoken["train"]) + len(spoken["test"]) == 1198 and not set(spoken["train"]) & set(spoken["test"])
    assert not set(arrays["speakers"][spoken["train"]]) & set(arrays["speakers"][spoken["test"]])
    assert set(arrays["speakers"][spoken["train"]]) | set(arrays["speakers"][spoken["test"]]) == {0, 1, 2, 3}
    assert (len(written["train"]), len(written["test"])) == (5000, 1000)
    of_train = {images[number].tobytes() for number in written["train"]}
    assert not any(images[number].tobytes() in of_train for number in written["test"])
    assert all(len(numbers) > 0 for split in ("train", "test") for numbers in spoken_digits.handwriting(split)[1])


@pytest.mark.parametrize("tempo, pitch", [(1.22, 0.82), (0.82, 1.22), (1.0, 1.1), (1.1, 1.0)])
def test_tempo_and_pitch_change_independently(tempo, pitch):
    time = np.arange(4800) / 8000
    voice = sum(np.sin(2 * np.pi * 150 * harmonic * time) / harmonic for harmonic in range(1, 8))
    changed = speech.perturb(voice, tempo, pitch)
    assert len(changed) == pytest.approx(4800 / tempo, abs=3)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed)), 16 * len(changed)))
    assert spectrum.argmax() * 8000 / (16 * len(changed)) == pytest.approx(150 * pitch, rel=0.02)
    middle = slice(len(changed) // 4, 3 * len(changed) // 4)
    assert np.std(changed[middle]) == pytest.approx(np.std(voice), rel=0.1)


def test_stretch_by_one_changes_nothing():
    sound = np.random.default_rng(0).standard_normal(2000)
    np.testing.assert_allclose(speech.stretch(sound, 1.0), sound, atol=1e-9)


@pytest.mark.parametrize("variant, digits, voices", [("single", 1, 1), ("scene", 2, 1), ("mixture", 1, 2)])
def test_truth_is_exact(variant, digits, voices):
    for index in range(8):
        clip = spoken_digits.compose(2, "test", index, variant)
        assert clip.frames.shape == (8, 96, 96, 3) and clip.sound.shape == (16000,)
        assert len(clip.boxes) == digits and clip.sources.shape == (voices, 16000)
        assert len(set(clip.object_labels)) == digits and clip.object_labels[clip.sounding] == clip.label
        rows, columns = np.nonzero(clip.mask)
        expected = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 96
        np.testing.assert_allclose(clip.boxes[clip.sounding], expected, atol=1e-6)
        for source in clip.sources:  # whatever of the clip a model sees, speech is in it
            heard = np.flatnonzero(source) / 8000
            assert heard[0] >= 0.25 and heard[-1] <= 1.75


def test_speech_stands_at_its_level_over_the_noise():
    for variant, decibels in (("single", 0), ("mixture", 20)):
        clip = spoken_digits.compose(0, "train", 4, variant)
        noise = clip.sound - clip.sources.sum(0)
        assert 10 * np.log10(np.mean(clip.sources[0] ** 2) / np.mean(noise**2)) == pytest.approx(decibels, abs=0.05)


def test_mask_marks_the_spoken_digit_in_the_middle_frame():
    clip = spoken_digits.compose(0, "train", 2, "scene")
    middle = clip.frames[4].astype(int)
    inside = middle[clip.mask]
    spread = np.abs(inside - np.median(inside, 0)).mean()
    outside = np.abs(middle[~clip.mask] - np.median(inside, 0)).mean()
    assert spread < 0.4 * outside  # one colour inside, another one around
    moved = [np.abs(frame[clip.mask].astype(int) - np.median(inside, 0)).mean() for frame in clip.frames]
    assert np.argmin(moved) == 4 or moved[4] <= min(moved) + 1


def test_the_digit_is_the_one_written():
    """The image's glyph correlates best with the mean handwriting of its own class for most clips."""
    images, by_digit = spoken_digits.handwriting("train")
    means = np.stack([images[numbers].mean(0) for numbers in by_digit])
    means = np.stack([_crop(mean > 100) for mean in means])
    right = 0
    for index in range(60):
        clip = spoken_digits.compose(0, "test", index, "single")
        glyph = _crop(clip.mask)
        right += int(np.argmax([np.corrcoef(glyph.ravel(), mean.ravel())[0, 1] for mean in means]) == clip.label)
    assert right >= 30  # chance: 6


def _crop(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cropped = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    return np.asarray(Image.fromarray(cropped).resize((20, 20), Image.Resampling.BILINEAR))
