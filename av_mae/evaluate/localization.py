"""Visual sound localization: where it sounds, without boxes in training (protocols: VGG-SS, Flickr-SoundNet)."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from av_mae import models
from av_mae import plots as pictures
from av_mae.checkpoint import Checkpoint
from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Bootstrap, Figure, Value, divide, figures_of, require_finite
from av_mae.evaluate.classification import row_keys
from av_mae.evaluate.clips import objects_in
from av_mae.evaluate.config import LocalizationConfig
from av_mae.evaluate.task import Clip, Measured, Task
from av_mae.models.flops import encoder_flops, linear
from av_mae.models.localizer import attention_map, finer, occlusion_map, occlusion_noise
from av_mae.models.losses import contrastive_loss, contrastive_top1
from av_mae.train.optimizer import Length, Multipliers
from av_mae.train.step import PASSES, Batch, Objective, Pretraining, Rows

THRESHOLDS = 0.05 * np.arange(21)  # of cIoU, for the area under the curve
SUCCESS = 0.5


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
        return {
            "top": f"top {self.at:.0%} of the map",
            "range": f"{self.at:.0%} of the map's range",
            "value": f"values of {self.at:g}",
        }[self.kind]

    def mask(self, heat: np.ndarray) -> np.ndarray:
        """bool [H, W] of a heat map [H, W]; what equals the value at the cut is in (a flat map is in whole)."""
        if self.kind == "value":
            return heat >= self.at
        if self.kind == "range":
            return heat >= heat.min() + self.at * (heat.max() - heat.min())
        count = max(1, int(np.ceil(self.at * heat.size - 1e-9)))
        return heat >= np.partition(heat, heat.size - count, axis=None)[heat.size - count]


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


def right_object(
    heat: np.ndarray, objects: np.ndarray, sounding: np.ndarray, strength: Callable[[np.ndarray], float] = np.mean
) -> Value:
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
    return {
        "ciou": float(value >= SUCCESS),
        "auc": float(area),
        "mean_ciou": value,
        "pointing": peak_share(heat, truth > 0),
    }


def detection_figures(
    confidence: np.ndarray, right: np.ndarray, sounding: np.ndarray, threshold: float, bootstrap: Bootstrap
) -> dict[str, Figure]:
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
        return {
            "precision": divide(marked, weights @ detected),
            "recall": divide(marked, sounds),
            "detection_ap": divide(average, sounds),
            "detection_f1": np.where(sounds > 0, best, np.nan),
        }

    found = bootstrap.statistics(figures)
    reasons = dict.fromkeys(found, "nothing sounds in any frame") | {"precision": "no map reaches the threshold"}
    return {
        name: dataclasses.replace(figure, left_out={reasons[name]: len(true)}) if np.isnan(figure.value) else figure
        for name, figure in found.items()
    }


def reads_other_stream(name: str) -> bool:
    """Whether the parameter of this dotted name belongs to fusion, which the localizer does without."""
    return name.startswith("encoder.fusion_") or ".bridges." in name


class LocalizationObjective(Objective):
    """Symmetric contrastive loss over all pairs of images and sounds of the batch (of each part of it, where gradients
    are accumulated). The encoder learns at `encoder_rate` times the learning rate of the head; at 0 it is frozen.

    Figure: `contrastive_top1`, how often the own sound, or image, scores highest in the batch.

    Raises:
      UserError: encoder_rate is negative.
    """

    def __init__(self, config: models.AVMAEConfig, head: models.LocalizerConfig, encoder_rate: float = 0.5):
        if encoder_rate < 0:
            raise UserError(f"encoder_rate={encoder_rate} must be at least 0 (0: the encoder stays as it is)")
        self.config, self.head, self.encoder_rate = config, head, encoder_rate
        unfused = dataclasses.replace(config, fusion=models.FusionConfig(kind="none"))
        projections = linear(config.image.tokens, config.image.width, head.width) + linear(
            1, config.audio.width, head.width
        )
        self.flops = PASSES * (encoder_flops(unfused, masked=False) + projections)

    def build(self, rngs: nnx.Rngs) -> models.Localizer:
        return models.Localizer(self.config, self.head, rngs=rngs)

    def losses(self, model: models.Localizer, rows: Rows) -> tuple[jax.Array, Rows]:
        scores = model.pairwise(models.normalize_image(rows["image"]), rows["audio"])
        return (
            contrastive_loss(scores, rows["valid"], self.head.temperature),
            {"contrastive_top1": contrastive_top1(scores, rows["valid"])},
        )

    def trained(self, name: str) -> bool:
        frozen = self.encoder_rate == 0 and name.startswith("encoder.")
        return not frozen and not reads_other_stream(name)

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return {name: self.encoder_rate for name in params if name.startswith("encoder.")}


MEASURES = ("ciou", "auc", "mean_ciou", "pointing")
DETECTION = ("precision", "recall", "detection_ap", "detection_f1")
NOT_ANNOTATED = "no boxes are annotated"


class Scored(NamedTuple):
    """What one frame gives: the values of its map; the map's maximum; whether anything sounds (None: unknown)."""

    values: dict[str, Value]
    confidence: float
    sounding: bool | None


class Localization(Task):
    """Heat maps of the localizer, or of the pretrained model as it is; the sound is what is swapped and blanked."""

    kind = "localizer"

    def __init__(self, config: LocalizationConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        self.trains, self.cut = config.method == "contrastive", Cut("top", config.top)
        self.annotations = ("objects",) if config.against == "box" else ("mask", "objects")
        self.details = {"cut": str(self.cut), "detected": f"maximum of the map at least {config.detected:g}"}
        self.objective = (
            LocalizationObjective(checkpoint.config.model, config.head, config.encoder_rate)
            if self.trains
            else Pretraining(checkpoint.config.model)
        )

    def forward(self, model: models.Localizer | models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        image, audio = models.normalize_image(batch["image"]), batch["audio"]
        if self.trains:
            patch = model.config.image.patch_size
            return {"heat": finer(lambda moved: model(moved, audio), image, patch, self.config.shifts)}
        if self.config.method == "attention":
            return {"heat": attention_map(model, image, audio)}
        keys = jax.random.wrap_key_data(row_keys(jax.random.key(self.config.seed), batch["index"]))
        return {
            "heat": occlusion_map(model, image, audio, occlusion_noise(keys, self.config.masks, model.config.audio))
        }

    def score(self, clip: Clip) -> Scored:
        heat, truth = clip["heat"].astype(np.float64), self.where(clip)
        if truth is None:
            return Scored(dict.fromkeys((*MEASURES, "right_object"), NOT_ANNOTATED), float(heat.max()), None)
        sounding = bool(truth.any() if self.config.against == "mask" else np.any(clip["sounding"] == 1))
        values = score_map(heat, truth, self.cut) if sounding else dict.fromkeys(MEASURES, "nothing sounds")
        right = right_object(heat, *objects_in(clip, heat.shape)) if clip["annotators"] else NOT_ANNOTATED
        return Scored(values | {"right_object": right}, float(heat.max()), sounding)

    def where(self, clip: Clip) -> np.ndarray | None:
        """What the map should show, [H, W] in 0…1, all 0 where nothing sounds; None where it is not annotated."""
        if self.config.against == "mask":
            return clip["mask"] > 0
        annotators = int(clip["annotators"])
        if not annotators:
            return None
        objects, sounding = objects_in(clip, clip["image"].shape[:2])
        by = clip["box_annotators"][: len(objects)]
        marked = np.stack([objects[sounding & (by == annotator)].any(0) for annotator in range(annotators)])
        return consensus(marked, min(self.config.agreeing, annotators))

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        found = {
            prefix + name: figure
            for prefix, clips in scores.items()
            for name, figure in figures_of([clip.values for clip in clips], bootstrap).items()
        }
        found |= self.detections(scores[""], bootstrap)
        silenced = [clip._replace(sounding=False) for clip in scores["blank/"]]
        return found | {
            f"blank/{name}": figure for name, figure in self.detections(scores[""] + silenced, bootstrap).items()
        }

    def detections(self, clips: list[Scored], bootstrap: Bootstrap) -> dict[str, Figure]:
        """`precision`, `recall` … of saying where something sounds; the clips may come once more, without sound."""
        known = [place for place, clip in enumerate(clips) if clip.sounding is not None]
        if not known:
            return dict.fromkeys(DETECTION, Figure(math.nan, math.nan, math.nan, {NOT_ANNOTATED: len(clips)}))
        confidence, sounding = (
            np.array([getattr(clips[place], name) for place in known]) for name in ("confidence", "sounding")
        )
        right = np.array([clips[place].values["ciou"] == 1 for place in known], bool)
        several = bootstrap.grouped(np.array(known, int) % bootstrap.clips)
        return detection_figures(confidence, right, sounding, self.config.detected, several)

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        rows = []
        for clip in measured.drawn:
            truth = self.where(clip)
            shown = np.zeros(clip["heat"].shape) if truth is None else truth
            rows.append(
                [clip["image"], pictures.heat_map(clip["image"], clip["heat"]), pictures.overlay(clip["image"], shown)]
            )
        pictures.save_png(
            folder / "localization.png", pictures.gallery(rows, ("frame", "heat", "truth"), measured.names)
        )
