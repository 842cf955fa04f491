"""Plots: the right values in the right patches, colours and positions, as a person would read them."""

import types

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from av_mae import plots, workdir
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZES = {"width": 16, "depth": 1, "heads": 2}


def _config(normalize=False):
    return AVMAEConfig(
        image=StreamConfig(size=(8, 16), patch=(4, 8), mask_ratio=0.5, normalize_targets=normalize, **SIZES),
        audio=StreamConfig(size=(6, 8), channels=1, patch=(3, 2), mask_ratio=0.5, normalize_targets=normalize, **SIZES),
        fusion=FusionConfig(heads=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
    )


def test_sound_patches_lie_row_major():
    stream = _config().audio
    sound = np.arange(48, dtype=np.float32).reshape(1, 6, 8)
    mask = np.zeros((1, 8))
    mask[0, [1, 6]] = 1
    prediction = np.zeros((1, 8, 6))
    prediction[0, 1] = [100, 101, 102, 103, 104, 105]
    prediction[0, 6] = 7
    original, visible, rebuilt = plots.audio_panels(sound, prediction, mask, stream)
    expected = sound[0].copy()
    expected[0:3, 2:4] = [[100, 101], [102, 103], [104, 105]]
    expected[3:6, 4:6] = 7
    np.testing.assert_array_equal(rebuilt[0], expected)
    hidden = np.isnan(visible[0])
    assert hidden[0:3, 2:4].all() and hidden[3:6, 4:6].all() and hidden.sum() == 12
    np.testing.assert_array_equal(visible[0][~hidden], sound[0][~hidden])
    np.testing.assert_array_equal(original, sound)


def test_image_predictions_lose_the_imagenet_scale():
    stream = _config().image
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), np.uint8)
    wanted = np.array([0.25, 0.5, 0.75])
    prediction = np.tile((wanted - MEAN) / DEVIATION, (2, 4, 4 * 8))
    mask = np.array([[0, 0, 1, 1], [1, 0, 0, 1]])
    original, visible, rebuilt = plots.image_panels(image, prediction, mask, stream)
    np.testing.assert_allclose(original, image / 255, atol=1e-6)
    np.testing.assert_allclose(rebuilt[0, 4:], np.broadcast_to(wanted, (4, 16, 3)), atol=1e-6)
    np.testing.assert_allclose(rebuilt[0, :4], image[0, :4] / 255, atol=1e-6)
    np.testing.assert_allclose(rebuilt[1, :4, 8:], image[1, :4, 8:] / 255, atol=1e-6)
    assert np.isnan(visible[1, :4, :8]).all() and not np.isnan(visible[1, :4, 8:]).any()


def test_image_colours_stay_in_range():
    image = np.zeros((1, 8, 16, 3), np.uint8)
    panels = plots.image_panels(image, np.full((1, 4, 96), 50.0), np.ones((1, 4)), _config().image)
    assert panels.rebuilt.max() == 1 and panels.rebuilt.min() == 1


def test_normalized_targets_get_the_level_of_the_visible_patches():
    """Nothing of a masked patch is given back that the model does not predict."""
    stream = _config(normalize=True).audio
    sound = np.random.default_rng(1).normal(3, 5, (2, 6, 8))
    target = np.zeros((2, 8, 6))
    for clip in range(2):
        for row in range(2):
            for column in range(4):
                values = sound[clip, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2].ravel()
                target[clip, 4 * row + column] = (values - values.mean()) / np.sqrt(np.var(values, ddof=1) + 1e-6)
    mask = np.zeros((2, 8))
    mask[:, [1, 6]] = 1
    panels = plots.audio_panels(sound, target, mask, stream)
    for clip in range(2):
        patches = sound[clip].reshape(2, 3, 4, 2).swapaxes(1, 2).reshape(8, 6)
        seen = patches[[0, 2, 3, 4, 5, 7]]
        expected = target[clip, 1] * seen.std(-1, ddof=1).mean() + seen.mean()
        np.testing.assert_allclose(panels.rebuilt[clip][:3, 2:4].ravel(), expected, atol=1e-4)
    hidden = np.isnan(panels.visible)
    np.testing.assert_allclose(panels.rebuilt[~hidden], sound[~hidden], atol=1e-6)


@pytest.fixture(scope="module")
def plot():
    """One red clip whose hidden half is rebuilt in blue; its sound is loud in the lowest half of the mels."""
    image = np.zeros((1, 8, 16, 3), np.uint8)
    image[..., 0] = 255
    sound = np.zeros((1, 6, 8), np.float32)
    sound[:, :3] = 1
    blue = (np.array([0, 0, 1]) - MEAN) / DEVIATION
    out = types.SimpleNamespace(
        image_prediction=np.tile(blue, (1, 4, 32)),
        image_mask=np.array([[1, 1, 0, 0]]),
        audio_prediction=np.zeros((1, 8, 6)),
        audio_mask=np.zeros((1, 8)),
    )
    return plots.reconstructions(image, sound, out, _config(), titles=["clip 7"])


def _share(plot, colour):
    return np.all(plot == colour, axis=-1)


def test_columns_of_frames(plot):
    assert plot.dtype == np.uint8 and plot.ndim == 3 and plot.shape[2] == 3
    red, blue, grey = (_share(plot, colour) for colour in ((255, 0, 0), (0, 0, 255), (128, 128, 128)))
    grey |= _share(plot, (127, 127, 127))
    red, blue, grey = (np.where(colour.sum(0, keepdims=True) > 20, colour, False) for colour in (red, blue, grey))
    columns = [np.nonzero(colour)[1] for colour in (red, grey, blue)]
    assert red.sum() > 1.8 * blue.sum() > 0 and grey.sum() > 0
    assert columns[0].min() < columns[1].min() and columns[1].max() < columns[2].min()  # frame, visible, rebuilt
    assert np.nonzero(blue)[0].mean() < np.nonzero(red)[0].mean()  # the upper patches were hidden


def test_low_frequencies_are_at_the_bottom(plot):
    right = plot[:, plot.shape[1] * 3 // 5 :].astype(int).sum(-1)
    dark, bright = (right == np.array(colour).sum() for colour in ((0, 0, 3), (251, 252, 191)))
    assert dark.any() and bright.any()
    assert np.nonzero(bright)[0].mean() > np.nonzero(dark)[0].mean()


def test_curves_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "learning_rate": 0.1}\n{"step": 3, "lo')
    metrics = workdir.read_metrics(path)
    assert metrics == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "learning_rate": 0.1}]
    plot = plots.curves(metrics)
    line = _share(plot, (31, 119, 180))
    height, width = line.shape
    assert line[: height // 2, : width // 3].sum() > 20
    assert not line[: height // 2, width // 3 :].any()


def test_png_round_trip(tmp_path):
    plot = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    plots.save_png(tmp_path / "images" / "step_00000001.png", plot)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "step_00000001.png")), plot)


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(0).normal(size=(40, 7)) @ np.diag([9, 5, 3, 1, 1, 1, 1]) + 4
    found, expected = plots.principal(vectors), PCA(2).fit_transform(vectors)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-9)


def test_embedding_map_has_a_colour_for_each_class():
    random = np.random.default_rng(1)
    labels = np.array([0, 2, 2, 5, 0, 5])
    plot = plots.embedding_map(
        {"image": random.normal(size=(6, 8)), "audio": random.normal(size=(6, 3))}, labels, list("abcdef")
    )
    assert plot.dtype == np.uint8 and plot.shape == (400, 920, 3)
    colours = {tuple(colour) for colour in plot.reshape(-1, 3)}
    expected = [tuple(np.round(np.multiply(plots.MAP_COLOURS(number)[:3], 255)).astype(int)) for number in range(6)]
    assert [colour in colours for colour in expected] == [True, False, True, False, False, True]


def test_heat_map_is_seen_on_dark_and_light_frames():
    """Its colours are those of the stretched map over the frame's grey, whatever the map's range."""
    random = np.random.default_rng(2)
    heat = random.permutation(np.arange(12)).reshape(3, 4)
    frame = random.integers(0, 256, (3, 4, 3), np.uint8)
    colours = np.array([colormaps["inferno"](n / 11)[:3] for n in range(12)])
    expected = 0.4 * frame.astype(float).mean(-1, keepdims=True) + 0.6 * 255 * colours[heat]
    np.testing.assert_allclose(plots.heat_map(frame, 0.3 * heat - 2), expected, atol=0.51)
    assert plots.heat_map(np.zeros_like(frame), np.ones((3, 4))).dtype == np.uint8
