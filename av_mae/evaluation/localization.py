"""Visual sound localization: where it sounds, without boxes in training (protocols: VGG-SS, Flickr-SoundNet)."""

import pathlib

import jax
import numpy as np

from av_mae import models, pictures
from av_mae.evaluation import localization_objective as training
from av_mae.evaluation.classification_objective import row_keys
from av_mae.evaluation.figures import Bootstrap, Figure, Value, figures_of
from av_mae.evaluation.metrics.localization import Cut, box_masks, right_object, score_map
from av_mae.evaluation.segmentation import overlay
from av_mae.evaluation.task import Clip, Measured, Task
from av_mae.models.localizer import attention_map, occlusion_map, occlusion_noise
from av_mae.task_config import LocalizationConfig
from av_mae.training.objective import Pretraining
from av_mae.training.step import Batch
from av_mae.training.stored import Stored


class Localization(Task):
    """Heat maps of the localizer, or of the pretrained model as it is; the sound is what is swapped and blanked."""

    kind = "localizer"
    truth = ("mask", "objects")

    def __init__(self, config: LocalizationConfig, stored: Stored):
        super().__init__(config, stored)
        self.trains, self.cut = config.method == "contrastive", Cut("top", config.top)
        self.objective = (training.Localization(stored.config.model, config.head, config.encoder_rate)
                          if self.trains else Pretraining(stored.config.model))

    def forward(self, model: models.Localizer | models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        image, audio = models.normalize_image(batch["image"]), batch["audio"]
        if self.trains:
            return {"heat": model(image, audio)}
        if self.config.method == "attention":
            return {"heat": attention_map(model, image, audio)}
        keys = jax.random.wrap_key_data(row_keys(jax.random.key(self.config.seed), batch["place"]))
        return {"heat": occlusion_map(model, image, audio, occlusion_noise(keys, self.config.masks, model.config.audio))}

    def score(self, clip: Clip) -> dict[str, Value]:
        heat, sounding = clip["heat"].astype(np.float64), clip["sounding"][clip["sounding"] >= 0] > 0
        objects = box_masks(clip["boxes"][:len(sounding)], heat.shape)
        truth = objects[sounding].any(0) if self.config.against == "box" else clip["mask"] > 0
        return score_map(heat, truth, self.cut) | {"right_object": right_object(heat, objects, sounding)}

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        return {prefix + name: figure for prefix, clips in scores.items()
                for name, figure in figures_of(clips, bootstrap).items()}

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        rows = [[clip["image"], overlay(clip["image"], stretched(clip["heat"])), overlay(clip["image"], clip["mask"])]
                for clip in measured.drawn]
        pictures.save_png(folder / "localization.png", pictures.gallery(rows, ("frame", "heat", "truth"), measured.names))


def stretched(heat: np.ndarray) -> np.ndarray:
    """A map [H, W] from its lowest value at 0 to its highest at 1."""
    heat = heat.astype(np.float64)
    return (heat - heat.min()) / max(1e-12, heat.max() - heat.min())
