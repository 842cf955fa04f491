"""Visual sound localization: where it sounds, without boxes in training (protocols: VGG-SS, Flickr-SoundNet)."""

import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from av_mae import models, pictures
from av_mae.evaluation import localization_objective as training
from av_mae.evaluation.annotations import objects_in
from av_mae.evaluation.classification_objective import row_keys
from av_mae.evaluation.figures import Bootstrap, Figure, Value, figures_of
from av_mae.evaluation.metrics.localization import Cut, consensus, detection_figures, right_object, score_map
from av_mae.evaluation.segmentation import overlay
from av_mae.evaluation.task import Clip, Measured, Task
from av_mae.models.localizer import attention_map, finer, occlusion_map, occlusion_noise
from av_mae.task_config import LocalizationConfig
from av_mae.training.objective import Pretraining
from av_mae.training.step import Batch
from av_mae.training.stored import Stored

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

    def __init__(self, config: LocalizationConfig, stored: Stored):
        super().__init__(config, stored)
        self.trains, self.cut = config.method == "contrastive", Cut("top", config.top)
        self.truth = ("objects",) if config.against == "box" else ("mask", "objects")
        self.details = {"cut": str(self.cut), "detected": f"maximum of the map at least {config.detected:g}"}
        self.objective = (training.Localization(stored.config.model, config.head, config.encoder_rate)
                          if self.trains else Pretraining(stored.config.model))

    def forward(self, model: models.Localizer | models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        image, audio = models.normalize_image(batch["image"]), batch["audio"]
        if self.trains:
            patch = model.config.image.patch_size
            return {"heat": finer(lambda moved: model(moved, audio), image, patch, self.config.shifts)}
        if self.config.method == "attention":
            return {"heat": attention_map(model, image, audio)}
        keys = jax.random.wrap_key_data(row_keys(jax.random.key(self.config.seed), batch["place"]))
        return {"heat": occlusion_map(model, image, audio, occlusion_noise(keys, self.config.masks, model.config.audio))}

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
        by = clip["box_annotators"][:len(objects)]
        marked = np.stack([objects[sounding & (by == annotator)].any(0) for annotator in range(annotators)])
        return consensus(marked, min(self.config.agreeing, annotators))

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        found = {prefix + name: figure for prefix, clips in scores.items()
                 for name, figure in figures_of([clip.values for clip in clips], bootstrap).items()}
        found |= self.detections(scores[""], bootstrap)
        silenced = [clip._replace(sounding=False) for clip in scores["blank/"]]
        return found | {f"blank/{name}": figure
                        for name, figure in self.detections(scores[""] + silenced, bootstrap).items()}

    def detections(self, clips: list[Scored], bootstrap: Bootstrap) -> dict[str, Figure]:
        """`precision`, `recall` … of saying where something sounds; the clips may come once more, without sound."""
        known = [place for place, clip in enumerate(clips) if clip.sounding is not None]
        if not known:
            return dict.fromkeys(DETECTION, Figure(math.nan, math.nan, math.nan, {NOT_ANNOTATED: len(clips)}))
        confidence, sounding = (np.array([getattr(clips[place], name) for place in known])
                                for name in ("confidence", "sounding"))
        right = np.array([clips[place].values["ciou"] == 1 for place in known], bool)
        several = bootstrap.grouped(np.array(known, int) % bootstrap.clips)
        return detection_figures(confidence, right, sounding, self.config.detected, several)

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        rows = []
        for clip in measured.drawn:
            truth = self.where(clip)
            shown = np.zeros(clip["heat"].shape) if truth is None else truth
            rows.append([clip["image"], pictures.heat_map(clip["image"], clip["heat"]), overlay(clip["image"], shown)])
        pictures.save_png(folder / "localization.png", pictures.gallery(rows, ("frame", "heat", "truth"), measured.names))
