"""Toy Band: the truth that is stored agrees with pixels and sounds measured independently."""

import colorsys
import dataclasses

import numpy as np
import pytest

from av_mae.prepare.demo import clips as demo_clips
from av_mae.prepare.demo import toy_band


def peak_frequency(sound: np.ndarray, rate: int = 8000) -> float:
    """The frequency of the largest magnitude, refined by a parabola through its neighbours."""
    magnitude = np.log(np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 8 * len(sound))) + 1e-9)
    top = int(magnitude.argmax())
    below, at, above = magnitude[top - 1 : top + 2]
    return (top + 0.5 * (below - above) / (below - 2 * at + above)) * rate / (8 * len(sound))


def instrument(kind: str, **changes) -> toy_band.Instrument:
    return dataclasses.replace(toy_band.Instrument(kind, 42.0, 0.0, False, 100.0, 0.8, 0.675, 4), **changes)


# Size 42 px: 220 · 2^(2 · 14 / 28) = 440 Hz; the strongest partial by the recipe of each timbre.
@pytest.mark.parametrize("kind, expected", [("flute", 880), ("organ", 440), ("bell", 660), ("trumpet", 1760)])
def test_pitch_follows_size(kind, expected):
    pitch = toy_band.pitch_of(instrument(kind))
    assert pitch == pytest.approx(440)
    note = toy_band.NOTES[kind](pitch, 0.5, np.random.default_rng(0))
    assert peak_frequency(note) == pytest.approx(expected, rel=0.005)
    assert toy_band.pitch_of(instrument(kind, size=28.0)) == pytest.approx(880)
    assert toy_band.pitch_of(instrument(kind, size=56.0)) == pytest.approx(220)


def test_string_repeats_with_the_period_of_its_pitch():
    note = toy_band.NOTES["string"](220.0, 0.5, np.random.default_rng(0))
    late = note[400:2400]
    correlation = np.array([np.dot(late, note[400 - lag : 2400 - lag]) for lag in range(20, 60)])
    assert 20 + correlation.argmax() == round(8000 / 220)


def test_siren_rises_by_an_octave_and_falls():
    note = toy_band.NOTES["siren"](300.0, 0.5, np.random.default_rng(0))
    begin, middle, end = note[:400], note[len(note) // 2 - 200 : len(note) // 2 + 200], note[-400:]
    assert peak_frequency(begin) < 400 and peak_frequency(end) < 400
    assert peak_frequency(middle) > 500


def test_stripes_give_the_notes_per_second():
    kind = instrument("drum", stripes=5, size=50.0)
    sound = toy_band.play(kind, np.random.default_rng(3))
    loud = np.convolve(np.abs(sound), np.ones(160) / 160, "same") > 0.1 * np.abs(sound).max()
    onsets = np.flatnonzero(loud[1:] & ~loud[:-1])
    assert len(onsets) == 10  # 5 per second over 2 s
    np.testing.assert_allclose(np.diff(onsets) / 8000, 0.2, atol=0.01)


def test_brightness_gives_the_level():
    levels = []
    for value in (0.35, 1.0):
        sounds = [toy_band.play(instrument("organ", value=value), np.random.default_rng(seed)) for seed in range(40)]
        levels.append(np.mean([10 * np.log10(np.mean(sound**2)) for sound in sounds]))
    assert levels[1] - levels[0] == pytest.approx(16, abs=0.01)  # the same seeds: the spread cancels


@pytest.mark.parametrize("kind", toy_band.CLASSES)
def test_silhouettes_have_their_size_and_stripes(kind):
    coverage, darkness = toy_band.silhouette(kind, 48.0, 0.0, False, 3)
    assert max(coverage.shape) == 48
    along = 0 if toy_band.SHAPES[kind][1] == "y" else 1
    across = np.where(coverage >= 0.5, darkness, 0).max(1 - along) > 0.5
    assert int(across[0]) + np.count_nonzero(across[1:] & ~across[:-1]) == 3
    mirrored, _ = toy_band.silhouette(kind, 48.0, 0.0, True, 3)
    np.testing.assert_array_equal(mirrored, coverage[:, ::-1])


@pytest.mark.parametrize("variant, split", [("single", "train"), ("scene", "test")])
def test_truth_is_exact(variant, split):
    for index in range(12):
        clip = toy_band.compose(5, split, index, variant)
        rows, columns = np.nonzero(clip.mask)
        expected = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 96
        np.testing.assert_allclose(clip.boxes[clip.sounding], expected, atol=1e-6)
        assert clip.object_labels[clip.sounding] == clip.label
        assert len(set(clip.object_labels)) == len(clip.object_labels) == len(clip.boxes)
        assert len(clip.boxes) in ((1,) if variant == "single" else (2, 3))
        pixels = clip.frames[demo_clips.MIDDLE][clip.mask] / 255
        hues = [360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels]
        kind = toy_band.CLASSES[clip.label]
        away = [(hue - toy_band.HUES[kind] + 180) % 360 - 180 for hue in hues]
        assert abs(np.median(away)) < 40  # four deviations of the class's hue
        assert clip.sources.shape == (1, 16000) and np.array_equal(clip.sources[0], clip.sound)


def test_objects_do_not_overlap():
    for index in range(20):
        boxes = toy_band.compose(1, "train", index, "scene").boxes
        for number, (top, left, bottom, right) in enumerate(boxes):
            for other_top, other_left, other_bottom, other_right in boxes[:number]:
                assert min(bottom, other_bottom) <= max(top, other_top) or min(right, other_right) <= max(
                    left, other_left
                )


def test_painted_hue_is_that_of_the_instrument():
    image = np.full((96, 96, 3), 128, np.float32)
    one = instrument("drum", hue=200.0)
    shape = toy_band.silhouette(one.kind, one.size, one.degrees, one.flip, one.stripes)
    toy_band.paint(image, one, (10, 20), *shape)
    inside = image[10 : 10 + shape[0].shape[0], 20 : 20 + shape[0].shape[1]][shape[0] == 1] / 255
    colours = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in inside])
    np.testing.assert_allclose(colours[:, 0] * 360, 200, atol=0.1)
    np.testing.assert_allclose(colours[:, 1], 0.8, atol=1e-3)
    np.testing.assert_allclose(colours[:, 2].max(), 0.675, atol=1e-3)
    np.testing.assert_allclose(colours[:, 2].min(), 0.45 * 0.675, atol=1e-3)  # in the stripes


def test_mixture_adds_two_different_instruments():
    clip = toy_band.compose(0, "train", 3, "mixture")
    assert clip.sources.shape == (2, 16000)
    np.testing.assert_allclose(clip.sources.sum(0), clip.sound, atol=1e-6)
    assert len(clip.boxes) == 1 and min(np.abs(clip.sources).max(1)) > 0.001


def test_clips_depend_on_their_place_alone_and_splits_differ():
    first = toy_band.compose(3, "train", 7, "single")
    again = toy_band.compose(3, "train", 7, "single")
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.sound, again.sound)
    for other in ((4, "train", 7), (3, "test", 7), (3, "train", 8)):
        assert not np.array_equal(first.sound, toy_band.compose(*other, "single").sound)
    assert not set(demo_clips.TEXTURES["train"]) & set(demo_clips.TEXTURES["test"])
    generator = np.random.default_rng(0)
    for texture in (*demo_clips.TEXTURES["train"], *demo_clips.TEXTURES["test"]):
        drawn = texture(generator)
        assert drawn.shape == (96, 96) and np.abs(drawn).max() <= 1 and drawn.std() > 0.1


def test_loud_sums_are_turned_down_with_their_sources():
    sources = np.array([[0.9, -0.2], [0.6, 0.1]])
    sound, scaled = demo_clips.turn_down(sources.sum(0), sources)
    np.testing.assert_allclose(sound, [0.99, -0.066], rtol=1e-6)
    np.testing.assert_allclose(scaled, sources * 0.66, rtol=1e-6)
