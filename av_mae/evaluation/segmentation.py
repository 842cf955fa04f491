"""Segmentation of what sounds: a mask over the frame (published protocol: AVSBench S4, MS3 and AVSS)."""

import itertools
import pathlib

import jax
import numpy as np

from av_mae import models, pictures
from av_mae.evaluation.figures import Bootstrap, Figure
from av_mae.evaluation.annotations import common_classes, objects_in
from av_mae.evaluation.finetuning import Finetuning
from av_mae.evaluation.metrics.localization import right_object
from av_mae.evaluation.metrics.segmentation import SIZE_BOUNDS, ClipScores, score_clip, segmentation_figures
from av_mae.evaluation.task import Clip, Measured, Task
from av_mae.models.objectives import segmentation_loss
from av_mae.task_config import SegmentationConfig
from av_mae.training.objective import Rows
from av_mae.training.step import Batch
from av_mae.training.stored import Stored


class Segmentation(Task):
    """The segmenter, fine-tuned with its encoder; the sound is what is swapped and blanked."""

    kind = "segmenter"
    truth = ("mask", "objects")

    def __init__(self, config: SegmentationConfig, stored: Stored):
        super().__init__(config, stored)
        if config.head.classes > 1:
            common_classes(config.paths, config.head.classes)
        self.classes = config.head.classes
        small, medium = SIZE_BOUNDS
        self.details = {"region_sizes": f"iou/small: what sounds takes less than {small} of the image; medium: less "
                                        f"than {medium}; large: more"}
        self.objective = Finetuning(self.kind, config, stored, self.loss)

    def loss(self, model: models.Segmenter, rows: Rows) -> jax.Array:
        logits = model(models.normalize_image(rows["image"]), rows["audio"], train_rows=rows["valid"])
        return segmentation_loss(logits, rows["mask"].astype(int))

    def forward(self, model: models.Segmenter, batch: Batch) -> dict[str, jax.Array]:
        return {"logits": model(models.normalize_image(batch["image"]), batch["audio"])}

    def score(self, clip: Clip) -> tuple[ClipScores | str, float | str]:
        """A frame's segmentation scores, and 1 where the sounding one of its objects is the one marked most."""
        right = "no boxes are annotated"
        if clip["annotators"] > 0:
            right = right_object(probability(clip), *objects_in(clip, clip["mask"].shape))
        return score_clip(clip["logits"].astype(np.float32), clip["mask"]), right

    def combine(self, scores: list) -> list:
        """The scores of all annotated frames of a clip, each of which counts as one (as published)."""
        return scores

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        found = {}
        for prefix, clips in scores.items():
            frames = bootstrap.grouped(np.repeat(np.arange(len(clips)), [len(clip) for clip in clips]))
            masks, objects = zip(*itertools.chain.from_iterable(clips), strict=True)
            found |= {prefix + name: figure for name, figure in segmentation_figures(masks, frames).items()}
            found[f"{prefix}right_object"] = frames.mean(objects)
        return found

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        rows = [[clip["image"], overlay(clip["image"], probability(clip)), overlay(clip["image"], clip["mask"] > 0)]
                for clip in measured.drawn]
        pictures.save_png(folder / "segmentation.png", pictures.gallery(rows, ("frame", "mask", "truth"), measured.names))


def probability(clip: Clip) -> np.ndarray:
    """Float [H, W]: that of the object, or of anything but background where there are several classes."""
    logits = clip["logits"].astype(np.float32)
    if logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits[..., 0]))
    return np.asarray(1 - jax.nn.softmax(logits)[..., 0])


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A frame uint8 [H, W, 3], darkened where the mask [H, W] (0 … 1) is not."""
    return (image * (0.25 + 0.75 * np.clip(mask, 0, 1)[..., None])).astype(np.uint8)
