"""Visual sound localization: where it sounds, without boxes in training (protocols: VGG-SS, Flickr-SoundNet)."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Value, divide, metrics_of, require_finite
from av_mae.evaluate.classification import row_keys
from av_mae.evaluate.task import Clip, HeadObjective, Task, TaskConfig, Untrained
from av_mae.models import kinds
from av_mae.models.config import LocalizerConfig, require
from av_mae.models.flops import encoder_flops, linear
from av_mae.models.localizer import attention_map, finer, occlusion_map, occlusion_noise
from av_mae.models.losses import contrastive_loss, contrastive_top1
from av_mae.train.step import PASSES, Batch, Rows

THRESHOLDS = 0.05 * np.arange(21)  # of cIoU, for the area under the curve
SUCCESS = 0.5
ROUNDING = 1e-3  # pixels by which float32 boxes may miss a whole number
MEASURES = ("ciou", "auc", "mean_ciou", "pointing")
DETECTION = ("precision", "recall", "detection_ap", "detection_f1")
NOT_ANNOTATED = "no boxes are annotated"
METHODS = ("contrastive", "attention", "occlusion")


@dataclasses.dataclass(frozen=True)
class LocalizationConfig(TaskConfig):
    """Where it sounds, as a heat map.

    `method` is 'contrastive' (a head trained without boxes), or of the pretrained model as it is 'attention' (of the
    fusion tokens) or 'occlusion' (how much worse a hidden image patch makes the rebuilt audio, over `masks` masks).
    The map's highest share `top` is what cIoU compares with the annotations: the 'box' or 'mask' of what sounds. Of
    boxes, a pixel counts in full where `agreeing` annotators (or all, where there are fewer) mark it. A map whose
    highest value reaches `detected` says that something sounds. Contrastive maps are the mean over `shifts` × `shifts`
    positions of the image within a patch, for detail finer than the patch grid.
    """

    task: str = "localization"
    head: LocalizerConfig = LocalizerConfig()
    method: str = "contrastive"
    masks: int = 4
    top: float = 0.1
    against: str = "mask"
    agreeing: int = 1
    detected: float = 0.5
    shifts: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self.method in METHODS, f"method={self.method!r} must be one of {', '.join(METHODS)}")
        require(0 < self.top <= 1, f"top={self.top} must be a share above 0, at most 1")
        require(self.against in ("box", "mask"), f"against={self.against!r} must be box or mask")


def top_mask(heat: np.ndarray, share: float) -> np.ndarray:
    """The mask of a heat map's highest values, as cIoU compares it with the annotations.

    Args:
      heat: [H, W].
      share: of the pixels, above 0 and at most 1 (0.5 is published for VGG-SS and Flickr-SoundNet).

    Returns:
      bool [H, W]. What equals the lowest value of the mask is in it: a flat map is in it as a whole.
    """
    count = max(1, int(np.ceil(share * heat.size - 1e-9)))
    return heat >= np.partition(heat, heat.size - count, axis=None)[heat.size - count]


def box_masks(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes as masks, their edges rounded down to whole pixels (as published).

    Args:
      boxes: [k, 4] as (ymin, xmin, ymax, xmax), shares of the frame's sides.
      size: (height, width) of the masks.

    Returns:
      bool [k, height, width].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(size, 2)
    top, left, bottom, right = np.floor(np.clip(boxes + ROUNDING, 0, np.tile(size, 2))).T[..., None]
    rows, columns = np.arange(size[0]), np.arange(size[1])
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def objects_in(clip: dict[str, np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of a clip (the annotation 'objects') as masks bool [k, *size], and which of them sound, bool [k]."""
    count = int(np.sum(clip["sounding"] >= 0))
    return box_masks(clip["boxes"][:count], size), clip["sounding"][:count] > 0


def consensus(masks: np.ndarray, needed: int = 1) -> np.ndarray:
    """What annotators agree on: the share, at most 1, of the `needed` annotators that mark a pixel.

    masks: bool [annotators, H, W]; needed: 1 for VGG-SS (any box), 2 for the three annotators of Flickr-SoundNet.
    Returns float64 [H, W].
    """
    return np.minimum(1, masks.sum(0) / needed)


def ciou(mask: np.ndarray, target: np.ndarray) -> float:
    """Consensus intersection over union (Senocak et al., CVPR 2018): marked target / (target + marked where none is).

    mask: bool [H, W]; target: [H, W] in 0…1, not all 0.
    """
    return float(target[mask].sum() / (target.sum() + np.sum(mask & (target == 0))))


def peak_share(heat: np.ndarray, inside: np.ndarray) -> float:
    """1 where the map's maximum lies inside, else 0; of several equal maxima the share that does.

    heat: [H, W]; inside: bool [H, W].
    """
    return float(inside[heat == heat.max()].mean())


def right_object(heat: np.ndarray, objects: np.ndarray, sounding: np.ndarray) -> Value:
    """Whether the object that the map marks most, by its mean inside the object, is one that sounds.

    Args:
      heat: [H, W].
      objects: bool [k, H, W].
      sounding: bool [k], which objects sound.

    Returns:
      1 or 0; of several objects marked alike, the share that sounds; the reason where there is nothing to choose from.
    """
    if not sounding.any():
        return "no object sounds"
    require_finite(heat, "values of a heat map")
    seen = np.asarray(objects.any((1, 2)))
    if not seen[sounding].any():
        return "the sounding object covers no pixel"
    if not seen[~sounding].any():
        return "only one object" if seen.sum() == 1 else "all objects sound"
    strengths = np.array([heat[mask].mean() if mask.any() else -np.inf for mask in objects])
    best = strengths == strengths.max()
    return float(best[sounding].sum() / best.sum())


def score_map(heat: np.ndarray, target: np.ndarray, top: float) -> dict[str, Value]:
    """The values of one map against what sounds; over clips, their means are the metrics.

    Args:
      heat: [H, W].
      target: [H, W] in 0…1, a mask or the consensus of annotators.
      top: the share of pixels that `top_mask` compares with the target.

    Returns:
      `ciou` (1 where the cIoU of the map's mask is at least 0.5), `auc` (area under the share of clips over cIoU
      thresholds 0, 0.05 … 1), `mean_ciou`, and `pointing` (the hit: the map's maximum lies in the target).
    """
    heat = np.asarray(heat, np.float64)
    require_finite(heat, "values of a heat map")
    if heat.shape != target.shape:
        raise ValueError(f"a heat map of {heat.shape} does not fit a target of {target.shape}")
    if not target.any():
        return dict.fromkeys(MEASURES, "nothing is annotated")
    value = ciou(top_mask(heat, top), target)
    area = np.trapezoid((value >= THRESHOLDS).astype(np.float64), THRESHOLDS)
    return {
        "ciou": float(value >= SUCCESS),
        "auc": float(area),
        "mean_ciou": value,
        "pointing": peak_share(heat, target > 0),
    }


def detection_metrics(
    confidence: np.ndarray, right: np.ndarray, sounding: np.ndarray, threshold: float, bootstrap: Bootstrap
) -> dict[str, Metric]:
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

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights[:, order]
        sounding_frames = weights @ sounding
        detections, hits = (np.cumsum(values, axis=1)[:, ends] for values in (weights, weights * true))
        steps = np.diff(hits, axis=1, prepend=0)
        average = (steps * divide(hits, detections, empty=0)).sum(1)
        best = divide(2 * hits, detections + sounding_frames[:, None], empty=0).max(1)
        marked = weights @ (true & detected)
        return {
            "precision": divide(marked, weights @ detected),
            "recall": divide(marked, sounding_frames),
            "detection_ap": divide(average, sounding_frames),
            "detection_f1": np.where(sounding_frames > 0, best, np.nan),
        }

    found = bootstrap.statistics(metrics)
    reasons = dict.fromkeys(found, "nothing sounds in any frame") | {"precision": "no map reaches the threshold"}
    return {
        name: dataclasses.replace(metric, left_out={reasons[name]: len(true)}) if np.isnan(metric.value) else metric
        for name, metric in found.items()
    }


class LocalizationObjective(HeadObjective):
    """Symmetric contrastive loss over all pairs of images and audio of the batch (of each part of it, where gradients
    are accumulated).

    Further metric: `contrastive_top1`, how often the own audio, or image, scores highest in the batch.
    """

    def __init__(
        self,
        config: models.AVMAEConfig,
        head: models.LocalizerConfig,
        encoder_rate: float = 0.5,
        layer_decay: float = 1.0,
    ):
        super().__init__("localizer", config, head, encoder_rate, layer_decay)
        unfused = dataclasses.replace(config, fusion=models.FusionConfig(kind="none"))
        projections = linear(config.image.tokens, config.image.width, head.width)
        projections += linear(1, config.audio.width, head.width)
        self.flops = PASSES * (encoder_flops(unfused, masked=False) + projections)

    def losses(self, model: Any, rows: Rows) -> tuple[jax.Array, Rows]:
        scores = model.pairwise(models.normalize_image(rows["image"]), rows["audio"])
        loss = contrastive_loss(scores, rows["valid"], self.head.temperature)
        return loss, {"contrastive_top1": contrastive_top1(scores, rows["valid"])}

    def trained(self, name: str) -> bool:
        """The localizer does without fusion: its parameters stay as they are."""
        return super().trained(name) and not name.startswith("encoder.fusion_") and ".bridges." not in name


class Scored(NamedTuple):
    """What one frame gives: the values of its map; the map's maximum; whether anything sounds (`None` where
    it is unknown)."""

    values: dict[str, Value]
    confidence: float
    sounding: bool | None


class Localization(Task[LocalizationConfig]):
    """Heat maps of the localizer, or of the pretrained model as it is; the audio is what is swapped and blanked."""

    config_class = LocalizationConfig
    kind = "localizer"
    columns = ("frame", "heat", "target")

    def __init__(self, config: LocalizationConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        self.trains = config.method == "contrastive"
        self.annotations = ("objects",) if config.against == "box" else ("mask", "objects")
        self.details = {
            "cut": f"top {config.top:.0%} of the map",
            "detected": f"maximum of the map at least {config.detected:g}",
        }
        self.objective = (
            LocalizationObjective(checkpoint.config.model, config.head, config.encoder_rate, config.layer_decay)
            if self.trains
            else Untrained(kinds.PRETRAINING, checkpoint.config.model)
        )

    def forward(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        image, audio = models.normalize_image(batch["image"]), batch["audio"]
        if self.trains:
            patch = model.config.image.patch_size
            return {"heat": finer(lambda moved: model(moved, audio), image, patch, self.config.shifts)}
        if self.config.method == "attention":
            return {"heat": attention_map(model, image, audio)}
        keys = jax.random.wrap_key_data(row_keys(jax.random.key(self.config.seed), batch["index"]))
        noise = occlusion_noise(keys, self.config.masks, model.config.audio)
        return {"heat": occlusion_map(model, image, audio, noise)}

    def score(self, clip: Clip) -> Scored:
        heat, target = clip["heat"].astype(np.float64), self.target(clip)
        if target is None:
            return Scored(dict.fromkeys((*MEASURES, "right_object"), NOT_ANNOTATED), float(heat.max()), None)
        sounding = bool(target.any() if self.config.against == "mask" else np.any(clip["sounding"] == 1))
        nothing: dict[str, Value] = dict.fromkeys(MEASURES, "nothing sounds")
        values = score_map(heat, target, self.config.top) if sounding else nothing
        right = right_object(heat, *objects_in(clip, heat.shape)) if clip["annotators"] else NOT_ANNOTATED
        return Scored(values | {"right_object": right}, float(heat.max()), sounding)

    def target(self, clip: Clip) -> np.ndarray | None:
        """What the map should show, [H, W] in 0…1, all 0 where nothing sounds; `None` where nothing is annotated."""
        if self.config.against == "mask":
            return clip["mask"] > 0
        annotators = int(clip["annotators"])
        if not annotators:
            return None
        objects, sounding = objects_in(clip, clip["image"].shape[:2])
        by = clip["box_annotators"][: len(objects)]
        marked = np.stack([objects[sounding & (by == annotator)].any(0) for annotator in range(annotators)])
        return consensus(marked, min(self.config.agreeing, annotators))

    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        found = {
            prefix + name: metric
            for prefix, clips in scores.items()
            for name, metric in metrics_of([clip.values for clip in clips], bootstrap).items()
        }
        found |= self.detections(scores[""], bootstrap)
        silenced = [clip._replace(sounding=False) for clip in scores["blank/"]]
        return found | {
            f"blank/{name}": metric for name, metric in self.detections(scores[""] + silenced, bootstrap).items()
        }

    def detections(self, clips: list[Scored], bootstrap: Bootstrap) -> dict[str, Metric]:
        """`precision`, `recall` … of saying where something sounds; the clips may come once more, silenced."""
        known = [index for index, clip in enumerate(clips) if clip.sounding is not None]
        if not known:
            return dict.fromkeys(DETECTION, Metric(math.nan, math.nan, math.nan, {NOT_ANNOTATED: len(clips)}))
        confidence, sounding = (
            np.array([getattr(clips[index], name) for index in known]) for name in ("confidence", "sounding")
        )
        right = np.array([clips[index].values["ciou"] == 1 for index in known], bool)
        several = bootstrap.grouped(np.array(known, int) % bootstrap.clips)
        return detection_metrics(confidence, right, sounding, self.config.detected, several)

    def panels(self, clip: Clip) -> list[np.ndarray]:
        target = self.target(clip)
        shown = np.zeros(clip["heat"].shape) if target is None else target
        return [clip["image"], plots.heat_map(clip["image"], clip["heat"]), plots.overlay(clip["image"], shown)]
