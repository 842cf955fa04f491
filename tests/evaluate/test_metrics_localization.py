"""Localization metrics against loops over pixels, with flat maps, ties, empty boxes and frames where nothing sounds."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from av_mae.errors import UserError
from av_mae.evaluate import localization
from av_mae.evaluate.bootstrap import Bootstrap, metrics_of

HEIGHT, WIDTH = 12, 17


def random_map(seed, digits=6):
    return np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH)).round(digits)


def test_boxes_of_shares():
    generator = np.random.default_rng(1)
    corners = np.sort(generator.uniform(-0.2, 1.2, (6, 2, 2)), axis=1)  # some reach outside
    boxes = corners.reshape(6, 4)
    masks = localization.box_masks(boxes.astype(np.float32), (HEIGHT, WIDTH))
    assert masks.shape == (6, HEIGHT, WIDTH) and masks.dtype == bool
    for box, mask in zip(boxes, masks, strict=True):
        expected = np.zeros((HEIGHT, WIDTH), bool)
        top, left, bottom, right = (int(max(0.0, value) * side) for value, side in zip(box, (HEIGHT, WIDTH) * 2))
        expected[top:bottom, left:right] = True
        np.testing.assert_array_equal(mask, expected)


def test_float32_boxes_hit_whole_pixels():
    """Every box on whole pixels of 96 comes back exactly from shares in float32."""
    edges = np.arange(1, 97)
    boxes = np.stack([np.zeros(96), np.zeros(96), edges / 96, edges / 96], axis=1).astype(np.float32)
    np.testing.assert_array_equal(localization.box_masks(boxes, (96, 96)).any(2).sum(1), edges)
    assert localization.box_masks(np.zeros((0, 4)), (5, 6)).shape == (0, 5, 6)


def test_consensus_of_annotators():
    masks = np.array([[[1, 1, 0, 0]], [[1, 0, 1, 0]], [[1, 0, 0, 0]]], bool)
    np.testing.assert_array_equal(localization.consensus(masks, needed=2), [[1, 0.5, 0.5, 0]])
    np.testing.assert_array_equal(localization.consensus(masks), [[1, 1, 1, 0]])
    np.testing.assert_array_equal(localization.consensus(masks[:0], needed=2), np.zeros((1, 4)))


@pytest.mark.parametrize("digits", [6, 0])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 1e-6])
def test_the_highest_values(share, digits):
    heat = random_map(7, digits)
    values = sorted(heat.ravel(), reverse=True)
    lowest = values[max(1, math.ceil(round(share * len(values), 6))) - 1]
    np.testing.assert_array_equal(localization.top_mask(heat, share), heat >= lowest)
    if digits and share == 0.1:
        assert localization.top_mask(heat, share).sum() == 21  # a tenth of 204, rounded up
    assert localization.top_mask(np.ones((2, 3)), 0.5).all()


def test_half_of_the_map_as_published():
    """DeepAVFusion takes what is at least the value at index int(n / 2) of the ascending values."""
    for shape in ((15, 15), (16, 15)):
        heat = np.random.default_rng(0).normal(size=shape)
        np.testing.assert_array_equal(localization.top_mask(heat, 0.5), heat >= np.sort(heat.ravel())[heat.size // 2])


def plain_ciou(mask, target):
    inside, outside = 0.0, 0.0
    for row, column in np.ndindex(mask.shape):
        if mask[row, column]:
            inside += target[row, column]
            outside += target[row, column] == 0
    return inside / (target.sum() + outside)


@pytest.mark.parametrize("seed", range(5))
def test_map_against_consensus(seed):
    generator = np.random.default_rng(seed)
    boxes = np.stack(
        [
            generator.uniform(0, 0.3, 3),
            generator.uniform(0, 0.3, 3),
            generator.uniform(0.5, 1, 3),
            generator.uniform(0.5, 1, 3),
        ],
        axis=1,
    )
    target = localization.consensus(localization.box_masks(boxes, (HEIGHT, WIDTH)), needed=2)
    heat = random_map(seed) + 3 * target
    found = localization.score_map(heat, target, 0.3)
    value = plain_ciou(localization.top_mask(heat, 0.3), target)
    assert found["mean_ciou"] == pytest.approx(value) and found["ciou"] == (value >= 0.5)
    thresholds = [0.05 * number for number in range(21)]
    assert found["auc"] == pytest.approx(sklearn.auc(thresholds, [float(value >= t) for t in thresholds]))
    assert found["pointing"] == (target.ravel()[heat.argmax()] > 0)


def test_area_over_clips_is_the_mean_of_the_clips():
    """AUC of the curve 'share of clips with cIoU of at least t', as published, and success at 0.5."""
    targets = [localization.box_masks([0, 0, 0.5, 0.5], (HEIGHT, WIDTH))[0].astype(float) for _ in range(9)]
    maps = [random_map(seed) + 0.4 * seed * target for seed, target in enumerate(targets)]
    rows = [localization.score_map(heat, target, 0.25) for heat, target in zip(maps, targets, strict=True)]
    masks = [localization.top_mask(heat, 0.25) for heat in maps]
    values = np.array([plain_ciou(*pair) for pair in zip(masks, targets, strict=True)])
    found = metrics_of(rows, Bootstrap(9, 0, 200))
    curve = [np.mean(values >= 0.05 * number) for number in range(21)]
    assert found["auc"].value == pytest.approx(np.trapezoid(curve, dx=0.05))
    assert found["ciou"].value == pytest.approx(np.mean(values >= 0.5)) and 0 < found["ciou"].value < 1


def test_flat_maps_point_nowhere():
    inside = np.zeros((4, 5), bool)
    inside[1, :3] = True
    assert localization.peak_share(np.ones((4, 5)), inside) == pytest.approx(3 / 20)
    heat = np.zeros((4, 5))
    heat[1, 2] = heat[3, 4] = 1
    assert localization.peak_share(heat, inside) == 0.5


def test_nothing_annotated_and_a_single_pixel():
    found = localization.score_map(random_map(0), np.zeros((HEIGHT, WIDTH)), 0.1)
    assert set(found.values()) == {"nothing is annotated"} and len(found) == 4
    one = np.zeros((1, 1)) + 1
    assert localization.score_map(one, one, 0.1) == {
        "ciou": 1,
        "auc": pytest.approx(1),
        "mean_ciou": 1,
        "pointing": 1,
    }


def test_right_object():
    generator = np.random.default_rng(1)
    for _ in range(20):
        heat, number = generator.normal(size=(HEIGHT, WIDTH)), generator.integers(0, 3)
        objects = np.zeros((3, HEIGHT, WIDTH), bool)
        objects[0, :4, :4] = objects[1, 5:, :9] = objects[2, 6:8, 10:] = True
        strengths = [np.mean([heat[index] for index in np.ndindex(heat.shape) if mask[index]]) for mask in objects]
        found = localization.right_object(heat, objects, np.arange(3) == number)
        assert found == (np.argmax(strengths) == number)
        assert localization.right_object(heat, objects, np.arange(3) != number) == 1 - found


def test_right_object_with_ties_and_missing_objects():
    objects = np.zeros((3, 4, 6), bool)
    objects[0, :, :2] = objects[1, :, 2:4] = objects[2, :, 4:] = True

    def found(*sounding: int):
        return localization.right_object(np.ones((4, 6)), objects, np.array(sounding) == 1)

    assert found(0, 1, 0) == pytest.approx(1 / 3) and found(1, 1, 0) == pytest.approx(2 / 3)
    assert found(1, 1, 1) == "all objects sound"
    objects[2] = False
    assert found(0, 1, 0) == 0.5
    assert found(0, 0, 1) == "the sounding object covers no pixel"
    assert found(0, 0, 0) == "no object sounds"
    objects[1] = False
    assert found(1, 0, 0) == "only one object"
    objects = objects[:0]
    assert found() == "no object sounds"


def plain_detection(confidence, right, sounding, threshold):
    """(true detections, detections, sounding frames) at a threshold."""
    detected = confidence >= threshold
    return np.sum(detected & right & sounding), np.sum(detected), np.sum(sounding)


@pytest.mark.parametrize("digits", [6, 1])
def test_frames_where_nothing_sounds(digits):
    generator = np.random.default_rng(digits)
    sounding, right = generator.random(80) < 0.6, generator.random(80) < 0.7
    confidence = (generator.normal(size=80) + sounding).round(digits)
    found = localization.detection_metrics(confidence, right, sounding, 0.5, Bootstrap(80, 3, 100))
    hits, detections, sounds = plain_detection(confidence, right, sounding, 0.5)
    assert found["precision"].value == pytest.approx(hits / detections)
    assert found["recall"].value == pytest.approx(hits / sounds)
    average, f1, before = 0.0, 0.0, 0
    for threshold in np.unique(confidence)[::-1]:
        hits, detections, sounds = plain_detection(confidence, right, sounding, threshold)
        average += (hits - before) / sounds * hits / detections
        f1, before = max(f1, 2 * hits / (detections + sounds)), hits
    assert found["detection_ap"].value == pytest.approx(average)
    assert found["detection_f1"].value == pytest.approx(f1)
    always = localization.detection_metrics(confidence, np.ones(80, bool), sounding, 0.5, Bootstrap(80, 3, 100))
    assert always["detection_ap"].value == pytest.approx(sklearn.average_precision_score(sounding, confidence))
    assert all(metric.low < metric.value < metric.high for metric in always.values())


def test_detection_without_sound_or_detections():
    bootstrap = Bootstrap(3, 0, 100)
    found = localization.detection_metrics(np.arange(3.0), np.ones(3), np.zeros(3), 1.0, bootstrap)
    assert found["precision"].value == 0 and found["recall"].left_out == {"nothing sounds in any frame": 3}
    assert math.isnan(found["detection_ap"].value) and math.isnan(found["detection_f1"].value)
    found = localization.detection_metrics(np.arange(3.0), np.ones(3), np.ones(3), 9.0, bootstrap)
    assert found["recall"].value == 0 and found["precision"].left_out == {"no map reaches the threshold": 3}


def test_bad_input():
    with pytest.raises(UserError, match="top=0.0 must be a share above 0"):
        localization.LocalizationConfig(steps=1, top=0.0)
    with pytest.raises(UserError, match="2 of 4 values of a heat map are not finite"):
        localization.score_map(np.array([[0, np.nan], [np.inf, 0]]), np.ones((2, 2)), 0.1)
    with pytest.raises(ValueError, match="does not fit a target"):
        localization.score_map(np.zeros((2, 3)), np.ones((3, 2)), 0.1)
