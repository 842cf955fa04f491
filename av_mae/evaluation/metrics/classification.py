"""Metrics of classification: accuracies of single labels; average precision, ROC AUC and d' of multiple labels."""

import dataclasses
import math

import numpy as np
import scipy.sparse
import scipy.special

from av_mae.errors import UserError
from av_mae.evaluation.figures import Bootstrap, Figure, Value, divide, mean_defined
from av_mae.evaluation.metrics.checks import require_finite, require_labels

TOP = 5


def top_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """1 where the label is among the k highest scores, else 0; of equal scores the lower class comes first (argmax).

    scores: [n, classes]; labels: int [n]. Returns float64 [n].
    Raises UserError for scores that are not finite and labels that are not classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    require_finite(scores, "class scores")
    require_labels(labels, scores.shape[1])
    own = scores[np.arange(len(labels)), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return (before.sum(1) < k).astype(np.float64)


def confusion_matrix(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 [classes, classes]: how many clips of the row's class have the highest score at the column's class."""
    classes = scores.shape[1]
    require_labels(labels, classes)
    return np.bincount(labels * classes + scores.argmax(1), minlength=classes ** 2).reshape(classes, classes)


def mean_class_accuracy(weights: np.ndarray, hits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The accuracy of each class, averaged over the classes that have clips.

    weights: [draws, n], how often each clip counts; hits: [n] from top_hits; labels: int [n]. Returns [draws].
    """
    members = scipy.sparse.csr_array((np.ones(len(labels)), (np.arange(len(labels)), labels)), (len(labels), classes))
    counts, right = weights @ members, (weights * hits) @ members
    return mean_defined(divide(right, counts))


def single_label_figures(scores: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap) -> dict[str, Figure]:
    """`accuracy`, `top5` and `class_accuracy` of scores [n, classes] for labels int [n].

    Classes without clips are left out of `class_accuracy` and counted; `top5` is undefined for 5 classes or fewer.
    """
    hits, classes = top_hits(scores, labels, 1), scores.shape[1]
    absent = classes - len(np.unique(labels))
    top: list[Value] | np.ndarray = top_hits(scores, labels, TOP)
    if classes <= TOP:
        top = [f"{TOP} of {classes} classes are always right"] * len(labels)
    by_class = bootstrap.statistics(
        lambda weights: {"class_accuracy": mean_class_accuracy(weights, hits, labels, classes)},
        {"classes without clips": absent} if absent else {})
    return {"accuracy": bootstrap.mean(hits), "top5": bootstrap.mean(top)} | by_class


def ranking(weights: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area under the ROC curve of each class; equal scores share one threshold (scikit-learn).

    Args:
      weights: [draws, n], how often each clip counts: whole numbers.
      scores: [n, classes].
      targets: bool [n, classes].

    Returns:
      (average precisions, areas), float64 [draws, classes]; NaN where the class has no positive, and for the area
      also where it has no negative.
    """
    counts = np.ascontiguousarray(weights.T, np.float32 if len(scores) < 2 ** 24 else np.float64)  # exact in both
    curves = [_rank_class(counts, scores[:, number], targets[:, number]) for number in range(scores.shape[1])]
    return tuple(np.stack(figures, axis=1) for figures in zip(*curves, strict=True))


def _rank_class(counts: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and ROC area [draws] of one class, from counts [n, draws], scores [n] and targets [n]."""
    order = np.argsort(-scores, kind="stable")
    falling, positive = -scores[order], np.flatnonzero(targets[order])
    first, end = (np.searchsorted(falling, falling[positive], side) for side in ("left", "right"))  # of its equals
    own = counts[order[positive]].astype(np.float64)
    positives = _counts_before(own)
    places = np.unique(np.concatenate([[0], first, end, [len(order)]]))  # the only ones where counts are needed
    between = scipy.sparse.csr_array((np.ones(len(order), counts.dtype), order, places), (len(places) - 1, len(order)))
    clips = _counts_before((between @ counts).astype(np.float64))
    clips_until, positives_until = clips[np.searchsorted(places, end)], positives[np.searchsorted(positive, end)]
    negatives_until = clips_until - positives_until
    negatives_before = clips[np.searchsorted(places, first)] - positives[np.searchsorted(positive, first)]
    total, negatives = positives[-1], clips[-1] - positives[-1]
    precision = divide(positives_until, clips_until, empty=0)
    below = negatives - (negatives_until + negatives_before) / 2  # a tie counts half
    return divide((own * precision).sum(0), total), divide((own * below).sum(0), total * negatives)


def _counts_before(counts: np.ndarray) -> np.ndarray:
    """[n, draws] → [n + 1, draws]: the sums of the rows before each place."""
    sums = np.zeros((len(counts) + 1, counts.shape[1]), counts.dtype)
    np.cumsum(counts, axis=0, out=sums[1:])
    return sums


def d_prime(auc: np.ndarray) -> np.ndarray:
    """The distance of two normal distributions of deviation 1 with this area under the ROC curve: √2 Φ⁻¹(AUC)."""
    return math.sqrt(2) * scipy.special.ndtri(auc)


def multi_label_figures(scores: np.ndarray, targets: np.ndarray, bootstrap: Bootstrap) -> dict[str, Figure]:
    """`mean_ap`, `auc` and `d_prime` of scores [n, classes] for targets [n, classes], above 0 where the class applies.

    Means over classes; d' is that of the mean area (as published for AudioSet). Classes without positives (for the
    area also those without negatives) are left out and counted.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) > 0
    if scores.shape != targets.shape:
        raise UserError(f"scores of {scores.shape[1]} classes do not fit labels of {targets.shape[1]} classes: the "
                        "class list belongs to other labels")
    require_finite(scores, "class scores")
    empty, full = int(np.sum(~targets.any(0))), int(np.sum(targets.all(0)))
    no_positives = {"classes without positives": empty} if empty else {}
    no_negatives = {"classes without negatives": full} if full else {}

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        precision, auc = (mean_defined(values) for values in ranking(weights, scores, targets))
        return {"mean_ap": precision, "auc": auc, "d_prime": d_prime(auc)}

    found = bootstrap.statistics(means, no_positives)
    for name in ("auc", "d_prime"):
        found[name] = dataclasses.replace(found[name], left_out=no_positives | no_negatives)
    if found["auc"].value in (0, 1):
        found["d_prime"] = dataclasses.replace(found["d_prime"], left_out={f"the area is {found['auc'].value}": 1})
    return found
