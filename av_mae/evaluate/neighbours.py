"""Nearest neighbours and retrieval by pooled features, as a task and every n steps of pretraining.

Metrics of a set of clips, by cosine:
- `nearest/image|audio|fusion|all`: leave-one-out accuracy in percent by one stream, and by the sum of all streams'
  similarities (published definition).
- `audio_to_image/recall1|5|10`, `image_to_audio/…`: the image of a clip's audio among all images, the streams encoded
  without fusion tokens. With them both streams of a clip have seen each other, and know each other again by that: that
  is `fused/…`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.config import DataConfig, TrainConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.evaluate import cosine
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Values
from av_mae.evaluate.task import Clip, Condition, Measured, Task, TaskConfig, Untrained, common_classes, set_names
from av_mae.evaluate.validation import read_held_out
from av_mae.models import kinds
from av_mae.train.hooks import MetricsHook
from av_mae.train.loop import Hook, Moment
from av_mae.train.sharding import make_mesh, row_shards
from av_mae.train.step import Batch, TrainStep
from av_mae.workdir import read_metrics

FEATURES, FUSED, ALONE = "features/", "fused/", "alone/"
SHOWN = 5  # neighbours of each clip in the plot
Features = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NeighboursConfig(TaskConfig):
    """Nearest neighbours and retrieval among the held-out clips; nothing is trained."""

    task: str = "neighbours"
    steps: int = 1


class Neighbours(Task[NeighboursConfig]):
    """Leave-one-out accuracy and retrieval among the held-out clips."""

    config_class = NeighboursConfig
    kind = kinds.ENCODER
    trains = False

    def __init__(self, config: NeighboursConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        self.names = common_classes(DataConfig(path=config.held_out.sets[""]).paths)
        self.mesh = make_mesh(config.mesh)
        self.objective = Untrained(self.kind, checkpoint.config.model)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (Condition(),)

    def forward(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        return features(model, batch)

    def score(self, clip: Clip) -> Clip:
        """The clip's features [D] by stream, its label and its index in the set."""
        return {name: x for name, x in clip.items() if name.startswith(FEATURES) or name in ("label", "index")}

    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        values = clip_values(*stacked(scores[""]), self.mesh)
        return {name: bootstrap.mean(value) for name, value in values.items()}

    def plot(self, measured: Measured, folder: pathlib.Path) -> None:
        """Clips spread over the set, and the clips nearest to each by the sum of all similarities."""
        clips = list(measured.scores.values())
        queries = np.linspace(0, len(clips) - 1, min(len(clips), self.config.pictures)).astype(int)
        nearest = nearest_of(stacked(clips)[0], queries, SHOWN)
        shown = [[clips[number] for number in (query, *row)] for query, row in zip(queries, nearest, strict=True)]
        sizes = self.checkpoint.config.model.image.size, self.checkpoint.config.model.audio.size
        data = DataConfig(path=self.config.held_out.sets[""], sound=self.sound, split=self.config.test_split)
        with open_evaluation_data(data, *sizes, 1, np.arange(1)) as source:
            rows = [[source.clip(int(clip["index"]))["image"] for clip in row] for row in shown]
        names = [*self.names, "no label"]  # label -1 is unknown
        titles = [", ".join(names[int(clip["label"])] for clip in row) for row in shown]
        columns = ("clip", *(f"nearest {number + 1}" for number in range(nearest.shape[1])))
        plots.save_png(folder / "neighbours.png", plots.gallery(rows, columns, titles))


def features(model: Any, batch: Batch) -> dict[str, jax.Array]:
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
    """Every metric's value for each clip, from features [n, D] by stream and labels int [n] (-1: unknown)."""
    shards, clips = row_shards(mesh), len(labels)
    block = -(-min(cosine.BLOCK, clips) // shards) * shards
    together = {name: x for name, x in found.items() if not name.startswith(ALONE)}
    nearest = cosine.nearest(together, block, mesh)
    values = {f"nearest/{name}": accuracies(each, labels) for name, each in nearest.items()}
    recalls = cosine.retrieval(together["audio"], together["image"], block, mesh)
    if ALONE + "audio" not in found:
        return values | recalls
    values |= cosine.retrieval(found[ALONE + "audio"], found[ALONE + "image"], block, mesh)
    return values | {FUSED + name: recall for name, recall in recalls.items()}


def accuracies(neighbours: cosine.Hits, labels: np.ndarray) -> Values:
    """Leave-one-out accuracy of each clip in percent (as published): 100 where its neighbour has its label, else 0.

    labels: int [n], below 0 where unknown: such a clip has no accuracy, and is a wrong neighbour to others.
    """
    if len(labels) < 2:
        return ["there is no other clip"] * len(labels)
    right = labels[neighbours.row] == labels
    return [100.0 * hit if label >= 0 else "no label" for label, hit in zip(labels, right, strict=True)]


def nearest_of(found: Features, queries: np.ndarray, count: int) -> np.ndarray:
    """The clips nearest to each of some clips by the sum of all streams' cosines: int [q, at most n - 1].

    Args:
      found: features [n, D] by stream; those of streams encoded alone do not count.
      queries: int [q], the clips whose neighbours are looked for.
      count: how many neighbours of each, nearest first.
    """
    rows = np.concatenate([cosine.unit(x) for name, x in found.items() if not name.startswith(ALONE)], axis=1)
    return cosine.closest(rows[queries], [rows], min(count, len(rows) - 1), skip=queries).row


class NeighboursHook(Hook):
    """The metrics of `neighbours_clips` held-out clips of each set (SET/…), every `neighbours_every` steps and at the
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
        self.mesh = step.mesh
        self.encode = step.forward(
            lambda model, batch: features(model, batch) | {name: batch[name] for name in ("label", "valid")}
        )
        self.batches = {
            name: read_held_out(config, step, path, config.neighbours_split, config.neighbours_clips)
            for name, path in set_names(config.data.paths).items()
        }

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return finished or step % self.config.neighbours_every == 0

    def after_step(self, moment: Moment) -> None:
        line: dict[str, float] = {"step": moment.step}
        for name, batches in self.batches.items():
            encoded = [jax.device_get(self.encode(moment.state, batch)) for batch in batches]
            clips = [
                {field: x[row] for field, x in arrays.items()}
                for arrays in encoded
                for row in np.flatnonzero(arrays["valid"])
            ]
            for metric, values in (clip_values(*stacked(clips), self.mesh) if clips else {}).items():
                numbers = [value for value in values if not isinstance(value, str)]
                line |= {f"{name}/{metric}": float(np.mean(numbers))} if numbers else {}
        self.metrics.write(line)
        if jax.process_index() == 0:
            self._draw([name for name in line if name != "step"])

    def _draw(self, names: list[str]) -> None:
        try:
            lines = read_metrics(self.workdir / "metrics.jsonl")
            plots.save_png(self.workdir / "images" / "neighbours.png", plots.curves(lines, names))
        except OSError as error:
            self.say(f"warning: the plot of nearest neighbours cannot be written ({error.strerror}); training goes on")
