"""Segmentation metrics against the golden file and plain loops over pixels, clips and classes."""

import math

import numpy as np
import pytest

from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Bootstrap
from av_mae.evaluate.segmentation import best_f, score_clip, segmentation_metrics

PUBLISHED = {"miou": "miou", "precision": "precision", "recall": "recall", "f_score": "fscore"}


@pytest.mark.parametrize("classes", [1, 5])
def test_agrees_with_the_published_system(shared, classes):
    golden = np.load(shared / "golden" / "metrics.npz")
    logits, target = (golden[f"segmentation{classes}/{name}"] for name in ("logits", "target"))
    scores = [score_clip(*clip) for clip in zip(np.moveaxis(logits, 1, -1), target, strict=True)]
    found = segmentation_metrics(scores, Bootstrap(6, 0, 100))
    for ours, theirs in PUBLISHED.items():
        expected = [golden[f"segmentation{classes}/{theirs}{end}"] for end in ("", "_noBg")]
        np.testing.assert_allclose([found[ours].value, found[f"{ours}_without_background"].value], expected, rtol=1e-6)
    assert scores[5] == "the target is all background" and found["miou"].left_out == {scores[5]: 1}


def random_clips(clips, classes, seed=0, rows=7, columns=9):
    """Logits [rows, columns, classes] and targets; some classes are absent, and the third clip is all background."""
    generator = np.random.default_rng(seed)
    found = []
    for clip in range(clips):
        target = generator.integers(0, max(2, classes), (rows, columns)) * (generator.random((rows, columns)) < 0.5)
        target[target == 3] = 0
        target[0, 0] = 1
        logits = generator.normal(size=(rows, columns, classes)).astype(np.float32)
        favoured = target[..., None] == (np.arange(classes) if classes > 1 else 1)
        found.append((logits + (1.0 + clip) * favoured, target if clip != 2 else 0 * target))
    return found


def plain_scores(logits, target):
    """{class: (IoU, precision, recall, F)} by sets of pixels; the last is None for a binary mask."""
    classes = max(2, logits.shape[-1])
    prediction = (logits[..., 0] > 0).astype(int) if logits.shape[-1] == 1 else logits.argmax(-1)
    found = {}
    for number in range(classes):
        marked = {index for index in np.ndindex(target.shape) if prediction[index] == number}
        true = {index for index in np.ndindex(target.shape) if target[index] == number}
        if marked | true:
            precision = len(marked & true) / len(marked) if marked else 0
            recall = len(marked & true) / len(true) if true else 0
            both = 0.3 * precision + recall
            found[number] = (
                len(marked & true) / len(marked | true),
                precision,
                recall,
                1.3 * precision * recall / both if both else 0,
            )
    return found


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_agrees_with_loops(classes):
    clips = random_clips(8, classes)
    found = segmentation_metrics([score_clip(*clip) for clip in clips], Bootstrap(8, 0, 100))
    plain = [plain_scores(*clip) for clip in clips if clip[1].any()]
    seen = sorted(set().union(*plain))
    for index, name in enumerate(("miou", "precision", "recall", "f_score")):
        if classes == 1 and name == "f_score":
            continue
        by_class = {number: np.mean([scores[number][index] for scores in plain if number in scores]) for number in seen}
        assert found[name].value == pytest.approx(np.mean(list(by_class.values())))
        without = np.mean([value for number, value in by_class.items() if number])
        assert found[f"{name}_without_background"].value == pytest.approx(without)
    assert found["iou"] == found["miou_without_background"]


def test_best_f_of_a_binary_mask():
    generator = np.random.default_rng(3)
    logits, target = 3 * generator.normal(size=(11, 8)), generator.random((11, 8)) < 0.4
    logits[0, 0], logits[0, 1], logits[0, 2] = 800, -800, 0  # certain, and exactly a half
    probability = [0.0 if x < -700 else 1 / (1 + math.exp(-x)) for x in logits.ravel()]
    best = 0.0
    for number in range(256):
        marked = np.array([value >= number / 255 for value in probability])
        hits = np.sum(marked & target.ravel())
        precision, recall = hits / max(1, marked.sum()), hits / target.sum()
        best = max(best, 1.3 * precision * recall / (0.3 * precision + recall) if hits else 0)
    assert best_f(logits, target) == pytest.approx(best)
    clips = random_clips(4, 1)
    found = segmentation_metrics([score_clip(*clip) for clip in clips], Bootstrap(4, 0, 100))
    expected = np.mean([best_f(logits[..., 0], target == 1) for logits, target in clips if target.any()])
    assert found["f_score"].value == found["f_score_without_background"].value == pytest.approx(expected)


def test_interval_is_that_of_resampled_clips():
    """Each draw is the metric of the drawn clips, as if they were the test set."""
    clips = random_clips(5, 4, seed=1)
    scores = [score_clip(*clip) for clip in clips]
    found = segmentation_metrics(scores, Bootstrap(5, 7, 100))
    draws = np.random.default_rng(7).multinomial(5, np.full(5, 0.2), size=100)
    for name in ("miou", "f_score_without_background"):
        values = [
            segmentation_metrics(
                [score for score, count in zip(scores, row) for _ in range(count)], Bootstrap(5, 0, 1)
            )[name].value
            for row in draws
        ]
        np.testing.assert_allclose([found[name].low, found[name].high], np.percentile(values, (2.5, 97.5)), rtol=1e-9)


def test_objects_by_size():
    scores = []
    for rows, columns in ((2, 2), (2, 5), (4, 5), (4, 5), (10, 8)):  # 4, 10, 20, 20 and 80 % of the image
        target = np.zeros((10, 10), int)
        target[:rows, :columns] = 1
        logits = np.where(target == 1, 1.0, -1.0)[..., None]
        logits[0, 0] = -1
        scores.append(score_clip(logits, target))
    scores.append(score_clip(logits, 0 * target))
    found = segmentation_metrics(scores, Bootstrap(6, 0, 100))
    np.testing.assert_allclose(
        [found[f"iou/{size}"].value for size in ("small", "medium", "large")],
        [3 / 4, 9 / 10, (19 / 20 + 19 / 20 + 79 / 80) / 3],
    )
    assert found["iou/small"].left_out == {
        "the object is medium": 1,
        "the object is large": 3,
        "the target is all background": 1,
    }


def test_several_frames_of_a_clip_are_drawn_together():
    clips = random_clips(6, 3, seed=2)
    scores = [score_clip(*clip) for clip in clips]
    bootstrap = Bootstrap(3, 1, 100).grouped(np.array([0, 0, 0, 1, 2, 2]))
    found = segmentation_metrics(scores, bootstrap)["miou"]
    single = segmentation_metrics(scores, Bootstrap(6, 1, 100))["miou"]
    assert found.value == single.value and (found.low, found.high) != (single.low, single.high)


@pytest.mark.parametrize("classes", [1, 4])
def test_all_background_everywhere(classes):
    logits, target = np.zeros((3, 5, classes)), np.zeros((3, 5), int)
    found = segmentation_metrics([score_clip(logits, target)] * 2, Bootstrap(2, 0, 100))
    assert len(found) == 12
    for metric in found.values():
        assert math.isnan(metric.value) and metric.left_out == {"the target is all background": 2}


def test_one_clip_all_object_and_nothing_marked():
    target = np.ones((3, 5), int)
    found = segmentation_metrics([score_clip(np.ones((3, 5, 1)), target)], Bootstrap(1, 0, 100))
    assert all(found[name].value == 1 for name in ("miou", "iou", "f_score", "iou/large"))
    missed = segmentation_metrics([score_clip(-np.ones((3, 5, 1)), target)], Bootstrap(1, 0, 100))
    assert (missed["miou"].value, missed["precision"].value, missed["f_score"].value) == (0, 0, 1)


def test_bad_input():
    with pytest.raises(UserError, match="labels 0 to 255 do not fit 2 classes"):
        score_clip(np.zeros((2, 2, 1)), np.array([[0, 255], [0, 0]]))
    with pytest.raises(UserError, match="labels -1 to 2 do not fit 3 classes"):
        score_clip(np.zeros((2, 2, 3)), np.array([[0, -1], [2, 0]]))
    with pytest.raises(UserError, match="1 of 4 segmentation logits are not finite"):
        score_clip(np.array([[0, np.nan], [0, 1]])[..., None], np.ones((2, 2)))
