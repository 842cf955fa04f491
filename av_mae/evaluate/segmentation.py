"""Segmentation of what sounds: a mask over the frame (published protocol: AVSBench S4, MS3 and AVSS)."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Value, divide, mean_defined, require_finite, require_labels
from av_mae.evaluate.localization import objects_in, right_object
from av_mae.evaluate.task import Clip, Finetuning, Task, TaskConfig, common_classes
from av_mae.models.config import SegmenterConfig
from av_mae.models.losses import segmentation_loss
from av_mae.train.step import Batch, Rows

BETA2 = 0.3
THRESHOLDS = np.arange(256) / 255
MEASURES = ("miou", "precision", "recall", "f_score")
WITHOUT = "_without_background"
SIZES = ("small", "medium", "large")
SIZE_BOUNDS = (0.05, 0.2)  # shares of the image's area from which on objects are medium and large


class ClipScores(NamedTuple):
    """What one clip gives.

    values: float64 [4, classes], IoU, precision, recall and F of each class; counts: bool [4, classes], which of them
    count: the class occurs in target or prediction. share: of the image's area that is not background.
    """

    values: np.ndarray
    counts: np.ndarray
    share: float

    @property
    def object_iou(self) -> float:
        """Mean IoU over the classes without background that occur."""
        return float(self.values[0, 1:][self.counts[0, 1:]].mean())


def score_clip(logits: np.ndarray, target: np.ndarray) -> ClipScores | str:
    """Scores one clip.

    Args:
      logits: [H, W, classes], or [H, W, 1] for a binary mask.
      target: [H, W], whole numbers 0 (background) … classes - 1, or 0 and 1 for a binary mask.

    Returns:
      The scores, or the reason why there are none. A binary mask has the classes background and object; its F is the
      highest object F over 256 thresholds of the probability, and the same for both classes.

    Raises:
      UserError: logits that are not finite, or a target that is not among the classes.
    """
    require_finite(logits, "segmentation logits")
    binary = logits.shape[-1] == 1
    classes = 2 if binary else logits.shape[-1]
    target = np.asarray(target).astype(np.int64)
    require_labels(target, classes)
    if not target.any():
        return "the target is all background"
    prediction = logits[..., 0] > 0 if binary else logits.argmax(-1)
    pairs = np.bincount((target * classes + prediction).ravel(), minlength=classes**2).reshape(classes, classes)
    both, marked, true = np.diag(pairs), pairs.sum(0), pairs.sum(1)
    union = marked + true - both
    precision, recall = divide(both, marked, empty=0), divide(both, true, empty=0)
    values = np.stack([divide(both, union, empty=0), precision, recall, f_measure(precision, recall)])
    counts = np.broadcast_to(union > 0, values.shape).copy()
    if binary:
        values[3], counts[3] = best_f(logits[..., 0], target == 1), True
    return ClipScores(values, counts, float(np.mean(target > 0)))


def f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """F with β² = 0.3, which weighs precision above recall; 0 where both are."""
    return divide((1 + BETA2) * precision * recall, BETA2 * precision + recall, empty=0)


def best_f(logits: np.ndarray, target: np.ndarray) -> float:
    """The highest F over the masks sigmoid(logits) >= i / 255, i = 0 … 255. logits [H, W]; target bool [H, W]."""
    probability = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500)))
    level = np.searchsorted(THRESHOLDS, probability.ravel(), side="right") - 1  # the last threshold that it reaches
    marked, hits = (
        np.cumsum(np.bincount(level, weights, minlength=256)[::-1])
        for weights in (None, target.ravel().astype(np.float64))
    )
    return float(f_measure(divide(hits, marked, empty=0), hits / target.sum()).max())


def averages(weights: np.ndarray, scores: Sequence[ClipScores]) -> dict[str, np.ndarray]:
    """The four measures with background, and without (`…_without_background`).

    weights: [draws, clips], how often each clip counts. Returns name → [draws]; NaN where no class occurs.
    """
    counts = np.stack([score.counts for score in scores]).reshape(len(scores), -1).astype(np.float64)
    values = np.stack([score.values for score in scores]).reshape(len(scores), -1)
    shape = (len(weights), len(MEASURES), scores[0].values.shape[1])
    by_class = divide(weights @ (values * counts), weights @ counts).reshape(shape)
    parts = [(name, by_class[:, number]) for number, name in enumerate(MEASURES)]
    parts += [(name + WITHOUT, values[:, 1:]) for name, values in parts]
    return {name: mean_defined(values) for name, values in parts}


def segmentation_metrics(scores: Sequence[ClipScores | str], bootstrap: Bootstrap) -> dict[str, Metric]:
    """Metrics of scored clips: those of `averages`, and the object's IoU by its size.

    `miou`, `precision`, `recall`, `f_score` with background, `…_without_background`, `iou` (that is
    `miou_without_background`: the object's, where the mask is binary), and `iou/small|medium|large` over the clips
    whose objects take less than 0.05, up to 0.2, and more of the image.
    """
    left_out = dict(collections.Counter(score for score in scores if isinstance(score, str)))
    used = np.flatnonzero([not isinstance(score, str) for score in scores])
    chosen = [score for score in scores if not isinstance(score, str)]
    names = [name + end for name in MEASURES for end in ("", WITHOUT)]
    found = dict.fromkeys(names, Metric(math.nan, math.nan, math.nan, left_out))
    if chosen:
        found = bootstrap.statistics(lambda weights: averages(weights[:, used], chosen), left_out)
    found["iou"] = found["miou" + WITHOUT]
    for size in SIZES:
        found[f"iou/{size}"] = bootstrap.mean([_iou_of_size(score, size) for score in scores])
    return found


def _iou_of_size(score: ClipScores | str, size: str) -> Value:
    """The clip's object IoU if its objects are of that size ('small', 'medium' or 'large')."""
    if isinstance(score, str):
        return score
    own = SIZES[int(np.searchsorted(SIZE_BOUNDS, score.share, side="right"))]
    return score.object_iou if own == size else f"the object is {own}"


@dataclasses.dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
    """A mask of what sounds, in every annotated frame; `head.classes` 1: binary, more: as many as the sets have."""

    task: str = "segmentation"
    head: SegmenterConfig = SegmenterConfig()


class Segmentation(Task[SegmentationConfig]):
    """The segmenter, fine-tuned with its encoder; the audio is what is swapped and blanked."""

    config_class = SegmentationConfig
    kind = "segmenter"
    annotations = ("mask", "objects")
    columns = ("frame", "mask", "target")

    def __init__(self, config: SegmentationConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        if config.head.classes > 1:
            common_classes(config.paths, config.head.classes)
        self.classes = config.head.classes
        small, medium = SIZE_BOUNDS
        self.details = {
            "region_sizes": f"iou/small: what sounds takes less than {small} of the image; medium: less "
            f"than {medium}; large: more"
        }
        self.objective = Finetuning(self.kind, config, checkpoint, self.loss)

    def loss(self, model: models.Segmenter, rows: Rows) -> jax.Array:
        logits = model(models.normalize_image(rows["image"]), rows["audio"], train_rows=rows["valid"])
        return segmentation_loss(logits, rows["mask"].astype(int))

    def forward(self, model: models.Segmenter, batch: Batch) -> dict[str, jax.Array]:
        return {"logits": model(models.normalize_image(batch["image"]), batch["audio"])}

    def score(self, clip: Clip) -> tuple[ClipScores | str, float | str]:
        """A frame's segmentation scores, and 1 where the sounding one of its objects is the one marked most."""
        right: Value = "no boxes are annotated"
        if clip["annotators"] > 0:
            right = right_object(probability(clip), *objects_in(clip, clip["mask"].shape))
        return score_clip(clip["logits"].astype(np.float32), clip["mask"]), right

    def combine(self, scores: list) -> list:
        """The scores of all annotated frames of a clip, each of which counts as one (as published)."""
        return scores

    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        found: dict[str, Metric] = {}
        for prefix, clips in scores.items():
            frames = bootstrap.grouped(np.repeat(np.arange(len(clips)), [len(clip) for clip in clips]))
            masks, objects = zip(*itertools.chain.from_iterable(clips), strict=True)
            found |= {prefix + name: metric for name, metric in segmentation_metrics(masks, frames).items()}
            found[f"{prefix}right_object"] = frames.mean(objects)
        return found

    def panels(self, clip: Clip) -> list[np.ndarray]:
        image = clip["image"]
        return [image, plots.overlay(image, probability(clip)), plots.overlay(image, clip["mask"] > 0)]


def probability(clip: Clip) -> np.ndarray:
    """Float [H, W]: that of the object, or of anything but background where there are several classes."""
    logits = clip["logits"].astype(np.float32)
    if logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits[..., 0]))
    return np.asarray(1 - jax.nn.softmax(logits)[..., 0])
