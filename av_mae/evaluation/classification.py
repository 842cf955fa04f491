"""Classification: linear probe and fine-tuning (published protocols: VGGSound, AudioSet)."""

import functools
import pathlib

import jax
import numpy as np

from av_mae import models, pictures
from av_mae.data.plans import each_clip
from av_mae.evaluation import classification_objective as training
from av_mae.evaluation.annotations import class_frequencies, common_classes
from av_mae.evaluation.figures import Bootstrap, Figure
from av_mae.evaluation.metrics.classification import confusion_matrix, multi_label_figures, single_label_figures
from av_mae.evaluation.task import Clip, Measured, Task
from av_mae.models.classifier import JOINT
from av_mae.task_config import ClassificationConfig
from av_mae.training.step import Batch
from av_mae.training.stored import Stored


class Classification(Task):
    """One linear layer per stream and their joint score; the image is what is swapped and blanked."""

    kind = "classifier"
    other = "image"

    def __init__(self, config: ClassificationConfig, stored: Stored):
        super().__init__(config, stored)
        self.plan = functools.partial(each_clip, windows=config.windows)
        self.names, multi_label = common_classes(config.paths, config.head.classes), config.settings.multi_label
        self.truth = ("labels",) if multi_label else ("label",)
        self.classes = config.head.classes if multi_label else 0
        counted = config.settings.balanced or config.settings.log_odds
        self.objective = training.Classification(
            stored.config.model, config.head, config.settings,
            frequency=class_frequencies(config.data.paths, config.data.split, config.head.classes, multi_label)
            if counted else None,
            encoder_rate=config.encoder_rate, layer_decay=config.layer_decay, image_noise=config.data.image_noise)

    def forward(self, model: models.Classifier, batch: Batch) -> dict[str, jax.Array]:
        image = models.normalize_image(batch["image"])
        if self.config.data.image_noise:
            keys = training.row_keys(jax.random.key(self.config.seed), batch["place"])
            image = training.degrade(image, self.config.data.image_noise, keys)
        logits = model(image, batch["audio"])
        return {f"{name}_logits": x for name, x in logits.items()} | {f"{JOINT}_logits": models.joint_score(logits)}

    def score(self, clip: Clip) -> dict[str, np.ndarray]:
        """The logits of each stream [classes], and the clip's label."""
        logits = {name.removesuffix("_logits"): x.astype(np.float64) for name, x in clip.items()
                  if name.endswith("_logits")}
        return logits | {"label": clip["label"]}

    def combine(self, scores: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: scores[0][name] if name == "label" else np.mean([score[name] for score in scores], axis=0)
                for name in scores[0]}

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        measure = multi_label_figures if self.config.settings.multi_label else single_label_figures
        found = {}
        for prefix, clips in scores.items():
            labels = np.stack([clip["label"] for clip in clips])
            for stream in [name for name in clips[0] if name != "label"]:
                logits = np.stack([clip[stream] for clip in clips])
                found |= {f"{prefix}{name}/{stream}": figure
                          for name, figure in measure(logits, labels, bootstrap).items()}
        return found

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        if self.config.settings.multi_label:
            return
        scores, labels = (np.stack([clip[name] for clip in measured.scores.values()]) for name in (JOINT, "label"))
        counts = confusion_matrix(scores, labels)
        pictures.save_png(folder / "confusion.png", pictures.confusion(counts, self.names))
