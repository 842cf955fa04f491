"""Metrics of visual sound localization: heat maps against boxes or masks of what sounds."""

import dataclasses
from collections.abc import Callable

import numpy as np

from av_mae.errors import UserError
from av_mae.evaluation.figures import Bootstrap, Figure, Value, divide
from av_mae.evaluation.metrics.checks import require_finite

THRESHOLDS = 0.05 * np.arange(21)  # of cIoU, for the area under the curve
SUCCESS = 0.5
_ROUNDING = 1e-3  # pixels by which float32 boxes may miss a whole number


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a heat map becomes a mask: figures of cIoU depend on it, so they are reported together with it.

    kind: 'top', the share `at` of pixels with the highest values (0.5 is published for VGG-SS and Flickr-SoundNet);
    'range', the pixels at least the share `at` of the way from the map's lowest to its highest value;
    'value', the pixels of at least the value `at`.
    """

    kind: str = "top"
    at: float = 0.1

    def __post_init__(self):
        if self.kind not in ("top", "range", "value"):
            raise UserError(f"cut={self.kind!r} must be one of top, range, value")
        if self.kind != "value" and not 0 < self.at <= 1:
            raise UserError(f"a cut at the {self.kind} {self.at} must be a share above 0, at most 1")

    def __str__(self):
        return {"top": f"top {self.at:.0%} of the map", "range": f"{self.at:.0%} of the map's range",
                "value": f"values of {self.at:g}"}[self.kind]

    def mask(self, heat: np.ndarray) -> np.ndarray:
        """bool [H, W] of a heat map [H, W]; what equals the value at the cut is in (a flat map is in whole)."""
        if self.kind == "value":
            return heat >= self.at
        if self.kind == "range":
            return heat >= heat.min() + self.at * (heat.max() - heat.min())
        count = max(1, int(np.ceil(self.at * heat.size - 1e-9)))
        return heat >= np.partition(heat, heat.size - count, axis=None)[heat.size - count]


def box_masks(boxes: np.ndarray, size: tuple[int, int], frame: tuple[float, float] = (1, 1)) -> np.ndarray:
    """Boxes as masks, their edges cut down to whole pixels (as published).

    boxes: [k, 4] as (ymin, xmin, ymax, xmax); size: (height, width) of the masks; frame: (height, width) of the picture
    in the boxes' own units, (1, 1) where they are shares of its sides. Returns bool [k, height, width].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(np.divide(size, frame), 2)
    top, left, bottom, right = np.floor(np.clip(boxes + _ROUNDING, 0, np.tile(size, 2))).T[..., None]
    rows, columns = np.arange(size[0]), np.arange(size[1])
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def consensus(masks: np.ndarray, needed: int = 1) -> np.ndarray:
    """What annotators agree on: the share, at most 1, of the `needed` annotators that mark a pixel.

    masks: bool [annotators, H, W]; needed: 1 for VGG-SS (any box), 2 for the three annotators of Flickr-SoundNet.
    Returns float64 [H, W].
    """
    return np.minimum(1, masks.sum(0) / needed)


def ciou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Consensus intersection over union (Senocak et al., CVPR 2018): marked truth / (truth + marked where none is).

    mask: bool [H, W]; truth: [H, W] in 0…1, not all 0.
    """
    return float(truth[mask].sum() / (truth.sum() + np.sum(mask & (truth == 0))))


def peak_share(heat: np.ndarray, inside: np.ndarray) -> float:
    """1 where the map's maximum lies inside, else 0; of several equal maxima the share that does.

    heat: [H, W]; inside: bool [H, W].
    """
    return float(inside[heat == heat.max()].mean())


def right_object(heat: np.ndarray, objects: np.ndarray, sounding: np.ndarray,
                 strength: Callable[[np.ndarray], float] = np.mean) -> Value:
    """1 where an object that sounds is marked most, 0 where a silent one is; of several marked alike, the share that
    sounds.

    heat: [H, W]; objects: bool [k, H, W]; sounding: bool [k]; strength: of the map's values inside an object (np.mean
    or np.max). Returns the reason where there is nothing to choose from.
    """
    if not sounding.any():
        return "no object sounds"
    require_finite(heat, "values of a heat map")
    seen = objects.any((1, 2))
    if not seen[sounding].any():
        return "the sounding object covers no pixel"
    if not seen[~sounding].any():
        return "only one object" if seen.sum() == 1 else "all objects sound"
    strengths = np.array([strength(heat[mask]) if mask.any() else -np.inf for mask in objects])
    best = strengths == strengths.max()
    return float(best[sounding].sum() / best.sum())


def score_map(heat: np.ndarray, truth: np.ndarray, cut: Cut) -> dict[str, Value]:
    """The values of one map against what sounds; over clips, their means are the figures.

    heat: [H, W]; truth: [H, W] in 0…1, a mask or the consensus of annotators. Returns `ciou` (1 where the cIoU of the
    cut map is at least 0.5), `auc` (area under the share of clips over cIoU thresholds 0, 0.05 … 1), `mean_ciou`, and
    `pointing` (the hit: the map's maximum lies in the truth).
    """
    heat = np.asarray(heat, np.float64)
    require_finite(heat, "values of a heat map")
    if heat.shape != truth.shape:
        raise ValueError(f"a heat map of {heat.shape} does not fit a truth of {truth.shape}")
    if not truth.any():
        return dict.fromkeys(("ciou", "auc", "mean_ciou", "pointing"), "nothing is annotated")
    value = ciou(cut.mask(heat), truth)
    area = np.trapezoid((value >= THRESHOLDS).astype(np.float64), THRESHOLDS)
    return {"ciou": float(value >= SUCCESS), "auc": float(area), "mean_ciou": value,
            "pointing": peak_share(heat, truth > 0)}


def detection_figures(confidence: np.ndarray, right: np.ndarray, sounding: np.ndarray, threshold: float,
                      bootstrap: Bootstrap) -> dict[str, Figure]:
    """How well maps tell frames where nothing sounds (after Mo & Morgado, "A Closer Look at Weakly-Supervised
    Audio-Visual Source Localization", NeurIPS 2022).

    A map counts as a detection where its confidence reaches a threshold; the detection is true where something sounds
    and the map is right about it.

    Args:
      confidence: [n], how sure a map is, e.g. its maximum.
      right: bool [n], whether the map is right, e.g. its cIoU is at least 0.5; ignored where nothing sounds.
      sounding: bool [n], whether anything in the frame sounds.
      threshold: of the confidence, for `precision` and `recall`.

    Returns:
      `precision`, true detections among detections; `recall`, true detections among sounding frames; `detection_ap`,
      the average precision over all thresholds; `detection_f1`, the highest F1 of any threshold.
    """
    confidence, sounding = np.asarray(confidence, np.float64), np.asarray(sounding, bool)
    require_finite(confidence, "confidences of heat maps")
    true = np.asarray(right, bool) & sounding
    order = np.argsort(-confidence, kind="stable")
    confidence, sounding, true = confidence[order], sounding[order], true[order]
    ends = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True))  # equal confidences share one threshold
    detected = confidence >= threshold

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights[:, order]
        sounds = weights @ sounding
        detections, hits = (np.cumsum(values, axis=1)[:, ends] for values in (weights, weights * true))
        steps = np.diff(hits, axis=1, prepend=0)
        average = (steps * divide(hits, detections, empty=0)).sum(1)
        best = divide(2 * hits, detections + sounds[:, None], empty=0).max(1)
        marked = weights @ (true & detected)
        return {"precision": divide(marked, weights @ detected), "recall": divide(marked, sounds),
                "detection_ap": divide(average, sounds), "detection_f1": np.where(sounds > 0, best, np.nan)}

    found = bootstrap.statistics(figures)
    reasons = dict.fromkeys(found, "nothing sounds in any frame") | {"precision": "no map reaches the threshold"}
    return {name: dataclasses.replace(figure, left_out={reasons[name]: len(true)}) if np.isnan(figure.value) else figure
            for name, figure in found.items()}
