"""Classification metrics against scikit-learn and loops, with ties, absent classes and single clips."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sklearn

from av_mae.errors import UserError
from av_mae.evaluate import classification
from av_mae.evaluate.bootstrap import Bootstrap

SEED, DRAWS = 3, 80


def scores_and_labels(clips, classes, digits=6, seed=0):
    """Scores that favour the label a little; few digits make many of them equal."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, clips)
    scores = generator.normal(size=(clips, classes)) + 1.0 * (labels[:, None] == np.arange(classes))
    return scores.round(digits).astype(np.float32), labels


def draws(clips):
    return np.random.default_rng(SEED).multinomial(clips, np.full(clips, 1 / clips), size=DRAWS)


@pytest.mark.parametrize("clips, classes, digits", [(101, 9, 6), (101, 9, 0), (1, 7, 6)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k(clips, classes, digits, k):
    scores, labels = scores_and_labels(clips, classes, digits)
    hits = classification.top_hits(scores, labels, k)
    for clip in range(clips):
        ranked = sorted(range(classes), key=lambda number: (-scores[clip, number], number))
        assert hits[clip] == (labels[clip] in ranked[:k])
    # scikit-learn prefers the higher of two classes with equal scores
    expected = sklearn.top_k_accuracy_score(classes - 1 - labels, scores[:, ::-1], k=k, labels=np.arange(classes))
    assert hits.mean() == pytest.approx(expected, abs=1e-12)


def test_top_1_is_argmax():
    scores, labels = scores_and_labels(200, 4, digits=0)
    np.testing.assert_array_equal(classification.top_hits(scores, labels, 1), scores.argmax(1) == labels)


@pytest.mark.parametrize("clips, classes", [(150, 6), (5, 11), (1, 3)])
def test_confusion_and_class_accuracy(clips, classes):
    scores, labels = scores_and_labels(clips, classes)
    prediction = scores.argmax(1)
    np.testing.assert_array_equal(
        classification.confusion_matrix(scores, labels),
        sklearn.confusion_matrix(labels, prediction, labels=np.arange(classes)),
    )
    found = classification.single_label_metrics(scores, labels, Bootstrap(clips, SEED, DRAWS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predicted classes that have no clip
        balanced = [
            sklearn.balanced_accuracy_score(np.repeat(labels, row), np.repeat(prediction, row)) for row in draws(clips)
        ]
        assert found["class_accuracy"].value == pytest.approx(sklearn.balanced_accuracy_score(labels, prediction))
    np.testing.assert_allclose(
        [found["class_accuracy"].low, found["class_accuracy"].high], np.percentile(balanced, (2.5, 97.5)), rtol=1e-9
    )
    assert found["accuracy"].value == pytest.approx(sklearn.accuracy_score(labels, prediction))
    absent = classes - len(set(labels))
    assert found["class_accuracy"].left_out == ({"classes without clips": absent} if absent else {})


def test_one_class_only():
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    found = classification.single_label_metrics(scores, np.zeros(3, int), Bootstrap(3, SEED, DRAWS))
    assert found["class_accuracy"].value == found["accuracy"].value == pytest.approx(2 / 3)
    assert found["class_accuracy"].left_out == {"classes without clips": 2}
    assert math.isnan(found["top5"].value) and found["top5"].left_out == {"5 of 3 classes are always right": 3}


@pytest.mark.parametrize("clips, classes, digits", [(90, 5, 6), (90, 5, 0), (4, 2, 6)])
def test_ranking_agrees_with_scikit_learn_for_any_resampling(clips, classes, digits):
    generator = np.random.default_rng(clips)
    targets = generator.random((clips, classes)) < 0.3
    targets[0], targets[1] = True, False
    scores = (generator.normal(size=(clips, classes)) + targets).round(digits)
    weights = generator.multinomial(clips, np.full(clips, 1 / clips), size=20).astype(float)
    precision, area = classification.ranking(weights, scores, targets)
    for row, counts in enumerate(weights.astype(int)):
        for number in range(classes):
            positive, score = np.repeat(targets[:, number], counts), np.repeat(scores[:, number], counts)
            if positive.any():
                expected = sklearn.average_precision_score(positive, score)
                assert precision[row, number] == pytest.approx(expected, abs=1e-9)
            else:
                assert np.isnan(precision[row, number])
            if positive.any() and not positive.all():
                assert area[row, number] == pytest.approx(sklearn.roc_auc_score(positive, score), abs=1e-9)
            else:
                assert np.isnan(area[row, number])


def test_multi_label_metrics_leave_out_and_count_classes():
    generator = np.random.default_rng(5)
    targets = generator.random((60, 6)) < 0.4
    targets[:, 2], targets[:, 4] = False, True
    scores = generator.normal(size=targets.shape) + targets
    found = classification.multi_label_metrics(scores, targets.astype(np.int32), Bootstrap(60, SEED, DRAWS))
    ranked = [number for number in range(6) if number not in (2, 4)]
    precisions = [sklearn.average_precision_score(targets[:, number], scores[:, number]) for number in (*ranked, 4)]
    area = sklearn.roc_auc_score(targets[:, ranked], scores[:, ranked], average="macro")
    assert found["mean_ap"].value == pytest.approx(np.mean(precisions))
    assert found["auc"].value == pytest.approx(area)
    assert found["d_prime"].value == pytest.approx(math.sqrt(2) * scipy.stats.norm.ppf(area))
    assert found["mean_ap"].left_out == {"classes without positives": 1}
    assert found["auc"].left_out == {"classes without positives": 1, "classes without negatives": 1}
    assert all(metric.low < metric.value < metric.high for metric in found.values())


def test_intervals_of_multi_label_metrics():
    generator = np.random.default_rng(6)
    targets = generator.random((40, 3)) < 0.5
    scores = (generator.normal(size=targets.shape) + targets).round(1)
    found = classification.multi_label_metrics(scores, targets, Bootstrap(40, SEED, DRAWS))
    chosen = [np.repeat(np.arange(40), row) for row in draws(40)]
    expected = {
        "mean_ap": [sklearn.average_precision_score(targets[rows], scores[rows]) for rows in chosen],
        "auc": [sklearn.roc_auc_score(targets[rows], scores[rows]) for rows in chosen],
    }
    for name, values in expected.items():
        np.testing.assert_allclose([found[name].low, found[name].high], np.percentile(values, (2.5, 97.5)), rtol=1e-9)


def test_perfect_and_missing_labels_are_explained():
    targets = np.array([[1, 0], [0, 1], [1, 0]])
    perfect = classification.multi_label_metrics(targets * 1.0, targets, Bootstrap(3, SEED, DRAWS))
    assert perfect["mean_ap"].value == perfect["auc"].value == 1
    assert math.isnan(perfect["d_prime"].value) and perfect["d_prime"].left_out == {"the area is 1.0": 1}
    empty = classification.multi_label_metrics(np.ones((3, 2)), np.zeros((3, 2)), Bootstrap(3, SEED, DRAWS))
    for metric in empty.values():
        assert math.isnan(metric.value) and metric.left_out == {"classes without positives": 2}


def test_bad_input():
    with pytest.raises(UserError, match="labels 0 to 4 do not fit 4 classes"):
        classification.top_hits(np.zeros((2, 4)), np.array([0, 4]), 1)
    with pytest.raises(UserError, match="1 of 6 class scores are not finite"):
        classification.top_hits(np.array([[0, 1, 2], [np.nan, 0, 1]]), np.array([0, 1]), 1)
    with pytest.raises(UserError, match="scores of 3 classes do not fit labels of 2 classes"):
        classification.multi_label_metrics(np.zeros((4, 3)), np.zeros((4, 2)), Bootstrap(4, 0, 100))
