"""Classification: linear probe and fine-tuning (published protocols: VGGSound, AudioSet)."""

import pathlib

import jax
import numpy as np

from av_mae import models, pictures
from av_mae.data import records
from av_mae.data.balance import check_classes
from av_mae.errors import UserError
from av_mae.evaluation import classification_objective as training
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
        self.windows = config.windows
        self.classes = common_classes(config.data.paths)
        if len(self.classes) != config.head.classes:
            raise UserError(f"head.classes={config.head.classes} does not match the labels: {config.data.paths[0]} has "
                            f"{len(self.classes)} classes")
        counted = config.settings.balanced or config.settings.log_odds
        self.objective = training.Classification(
            stored.config.model, config.head, config.settings,
            frequency=frequencies(config.data.paths, config.data.split, config.head.classes) if counted else None,
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
        scores, labels = (np.stack([clip[name] for clip in measured.scores]) for name in (JOINT, "label"))
        counts = confusion_matrix(scores, labels)
        pictures.save_png(folder / "confusion.png", pictures.confusion(counts, self.classes))


def common_classes(paths: tuple[str, ...]) -> list[str]:
    """The class names of the prepared sets. Raises UserError where they differ, or there is no set."""
    if not paths:
        raise UserError("no data: set --config.data.path=DIR[,DIR] to prepared sets")
    names = {path: records.class_names(path) for path in paths}
    check_classes(names)
    return names[paths[0]]


def frequencies(paths: tuple[str, ...], split: str, classes: int) -> np.ndarray:
    """Share of the clips of a split that have each class: [classes]. Clips without label (-1) do not count."""
    counts = np.zeros(classes)
    for path in paths:
        source = records.open_source(path, split, ("label",))
        labels = np.array([source[number]["label"] for number in range(len(source))])
        counts += np.bincount(labels[labels >= 0], minlength=classes)
    return counts / max(1, counts.sum())
