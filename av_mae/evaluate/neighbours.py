"""Nearest neighbours and retrieval by pooled features, as a task and every n steps of pretraining.

Figures of a set of clips, by cosine:
- `nearest/image|audio|fusion|all`: leave-one-out accuracy in percent by one stream, and by the sum of all streams'
  similarities (published definition).
- `audio_to_image/recall1|5|10`, `image_to_audio/…`: a sound's own image among all images, the streams encoded without
  fusion tokens. With them both streams of a clip have seen each other, and know each other again by that: that is
  `fused/…`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from av_mae import models
from av_mae import plots as pictures
from av_mae.checkpoint import Checkpoint
from av_mae.config import TrainConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError
from av_mae.evaluate import nearest as neighbours
from av_mae.evaluate.bootstrap import Bootstrap, Figure, Values
from av_mae.evaluate.clips import common_classes, set_names
from av_mae.evaluate.config import NeighboursConfig
from av_mae.evaluate.task import Clip, Measured, Task
from av_mae.models import kinds
from av_mae.train.hooks import MetricsHook
from av_mae.train.loop import Hook, Moment, to_global
from av_mae.train.sharding import local_rows, make_mesh, row_shards
from av_mae.train.step import Batch, Objective, Rows, TrainStep

FEATURES, FUSED, ALONE = "features/", "fused/", "alone/"
SHOWN = 5  # neighbours of each clip in the picture
Features = Mapping[str, np.ndarray]


class Encoding(Objective):
    """An encoder that is measured, not trained."""

    def __init__(self, config: models.AVMAEConfig):
        self.config = config

    def build(self, rngs: nnx.Rngs) -> kinds.EncoderModel:
        return kinds.EncoderModel(self.config, rngs=rngs)

    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        raise UserError("nearest neighbours have nothing to train")


class Neighbours(Task):
    """Leave-one-out accuracy and retrieval among the held-out clips."""

    kind = kinds.ENCODER
    trains = False
    conditions = ("",)

    def __init__(self, config: NeighboursConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        self.names = common_classes(config.data.paths)
        self.mesh = make_mesh(config.mesh)
        self.objective = Encoding(checkpoint.config.model)

    def forward(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        return features(model, batch)

    def score(self, clip: Clip) -> Clip:
        """The clip's features [D] by stream, its label and its index in the set."""
        return {name: x for name, x in clip.items() if name.startswith(FEATURES) or name in ("label", "index")}

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        values = clip_values(*stacked(scores[""]), self.mesh)
        return {name: bootstrap.mean(value) for name, value in values.items()}

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        """Clips spread over the set, and the clips nearest to each by the sum of all similarities."""
        clips = list(measured.scores.values())
        queries = np.linspace(0, len(clips) - 1, min(len(clips), self.config.pictures)).astype(int)
        found = nearest_of(stacked(clips)[0], queries, SHOWN)
        model, data = (
            self.checkpoint.config.model,
            dataclasses.replace(self.config.data, sound=self.sound, workers=0, split=self.config.test_split),
        )
        with open_evaluation_data(data, model.image.size, model.audio.size, 1, np.arange(1)) as source:
            rows = [
                [source.clip(int(clips[number]["index"]))["image"] for number in (query, *others)]
                for query, others in zip(queries, found, strict=True)
            ]
        titles = [
            ", ".join(self.class_name(clips[number]) for number in (query, *others))
            for query, others in zip(queries, found, strict=True)
        ]
        columns = ("clip", *(f"nearest {number + 1}" for number in range(found.shape[1])))
        pictures.save_png(folder / "neighbours.png", pictures.gallery(rows, columns, titles))

    def class_name(self, clip: Clip) -> str:
        label = int(clip["label"])
        return self.names[label] if label >= 0 else "no label"


def features(model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
    """Pooled features [B, D] 'features/image', '…audio' and '…fusion', and where there are fusion tokens
    'features/alone/image' and '…audio', of the streams without them."""
    image, audio = models.normalize_image(batch["image"]), batch["audio"]
    found = models.pool(model.encoder(image, audio))
    if "fusion" in found:
        alone = models.pool(model.encoder(image, audio, fused=False))
        found |= {ALONE + name: x for name, x in alone.items()}
    return {FEATURES + name: x for name, x in found.items()}


def stacked(clips: list[Clip]) -> tuple[Features, np.ndarray]:
    """Features [n, D] by stream and labels int [n] of clips."""
    names = [name for name in clips[0] if name.startswith(FEATURES)]
    return (
        {name.removeprefix(FEATURES): np.stack([clip[name] for clip in clips]).astype(np.float32) for name in names},
        np.array([int(clip["label"]) for clip in clips]),
    )


def clip_values(found: Features, labels: np.ndarray, mesh: Mesh) -> dict[str, Values]:
    """Every figure's value for each clip, from features [n, D] by stream and labels int [n] (-1: unknown)."""
    shards, clips = row_shards(mesh), len(labels)
    block = -(-min(neighbours.BLOCK, clips) // shards) * shards
    together = {name: x for name, x in found.items() if not name.startswith(ALONE)}
    nearest = neighbours.nearest(together, block, mesh)
    values = {f"nearest/{name}": neighbours.accuracies(each, labels) for name, each in nearest.items()}
    recalls = neighbours.retrieval(together["audio"], together["image"], block, mesh)
    if ALONE + "audio" not in found:
        return values | recalls
    values |= neighbours.retrieval(found[ALONE + "audio"], found[ALONE + "image"], block, mesh)
    return values | {FUSED + name: recall for name, recall in recalls.items()}


def nearest_of(found: Features, queries: np.ndarray, count: int) -> np.ndarray:
    """The `count` clips nearest to each of the clips `queries` [q], nearest first: int [q, at most n - 1]."""
    total = 0.0
    for name, x in found.items():
        if not name.startswith(ALONE):
            unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            total = total + unit[queries] @ unit.T
    total[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-total, axis=1, kind="stable")[:, : min(count, total.shape[1] - 1)]


class NeighboursHook(Hook):
    """The figures of `neighbours_clips` held-out clips of each set (SET/…), every `neighbours_every` steps and at the
    end: in metrics.jsonl, TensorBoard and over time in `images/neighbours.png`.

    They depend on the weights alone. The clips are read once and stay on the devices.

    Raises:
      UserError: a set has no such split.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: TrainStep,
        workdir: pathlib.Path,
        metrics: MetricsHook,
        say: Callable[[str], None],
    ):
        self.config, self.workdir, self.metrics, self.say = config, workdir, metrics, say
        self.mesh, self.rows = step.mesh, step.rows
        self.encode = step.forward(
            lambda model, batch: features(model, batch) | {name: batch[name] for name in ("label", "valid")}
        )
        self.batches = {name: self._read(path) for name, path in set_names(config.data).items()}

    def _read(self, path: str) -> list[Batch]:
        config, model, shards = self.config, self.config.model, row_shards(self.mesh)
        size = -(-min(config.batch_size, config.neighbours_clips) // shards) * shards
        data = dataclasses.replace(config.data, path=path, weights=None, split=config.neighbours_split, workers=0)
        with open_evaluation_data(
            data, model.image.size, model.audio.size, size, local_rows(self.rows, size), most=config.neighbours_clips
        ) as source:
            return [to_global(batch, self.rows) for batch in source]

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        every = self.config.neighbours_every
        return finished or step % every == 0

    def after_step(self, moment: Moment) -> None:
        line = {"step": moment.step}
        for name, batches in self.batches.items():
            clips = [clip for batch in batches for clip in rows_of(jax.device_get(self.encode(moment.state, batch)))]
            if clips:
                line |= {
                    f"{name}/{figure}": value
                    for figure, value in means(clip_values(*stacked(clips), self.mesh)).items()
                }
        self.metrics.write(line)
        if jax.process_index() == 0:
            self._draw([name for name in line if name != "step"])

    def _draw(self, names: list[str]) -> None:
        try:
            lines = pictures.read_metrics(self.workdir / "metrics.jsonl")
            pictures.save_png(self.workdir / "images" / "neighbours.png", pictures.curves(lines, names))
        except OSError as error:
            self.say(f"warning: the plot of nearest neighbours cannot be written ({error.strerror}); training goes on")


def rows_of(arrays: dict) -> list[Clip]:
    """The valid rows of a batch of what `NeighboursHook.encode` gives."""
    return [{name: x[row] for name, x in arrays.items()} for row in np.flatnonzero(arrays["valid"])]


def means(values: Mapping[str, Values]) -> dict[str, float]:
    """Mean of each figure over the clips that have it; a figure that none has is left out."""
    numbers = {name: [value for value in each if not isinstance(value, str)] for name, each in values.items()}
    return {name: float(np.mean(each)) for name, each in numbers.items() if each}
