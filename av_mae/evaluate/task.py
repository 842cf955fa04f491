"""What a task is: its recipe, its model, how a head is trained, how clips are scored, and the table of all tasks."""

import abc
import collections
import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.config import DataConfig, RunConfig, SoundConfig, TrainConfig
from av_mae.data import records
from av_mae.data.pipeline import check_classes
from av_mae.data.plans import MakePlan, Plan
from av_mae.errors import ClipFailure, UserError, batch_failures
from av_mae.evaluate.bootstrap import Bootstrap, Metric
from av_mae.models import kinds
from av_mae.models.config import require
from av_mae.models.kinds import Params
from av_mae.train.optimizer import Length, Multipliers, encoder_multipliers
from av_mae.train.sharding import gather_failures, gather_values
from av_mae.train.step import Batch, Objective, Rows

# The one table of tasks: module in this package → class. The class names its configuration (`config_class`), its model
# (`kind`, whose head is in models.kinds.HEADS) and how the model is trained and measured.
TASKS = {
    "reconstruction": "Reconstruction",
    "classification": "Classification",
    "localization": "Localization",
    "segmentation": "Segmentation",
    "separation": "Separation",
    "neighbours": "Neighbours",
}
NO_DATA = "no data: set --config.data.path=DIR[,DIR] to prepared sets (python -m av_mae.prepare makes them)"
Clip = dict[str, np.ndarray]


class HeldOut(NamedTuple):
    """What is measured: name (the prefix of its metrics) → prepared sets that are measured together; their split; how
    many clips of it (0: all), in batches of how many."""

    sets: Mapping[str, str]
    split: str
    clips: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Measurable(abc.ABC):
    """What the recipe of a task has. `bootstrap` resamplings give the intervals, `pictures` clips are drawn."""

    task: str = ""
    init: str = ""
    seed: int = 0
    bootstrap: int = 2000
    pictures: int = 6

    @property
    @abc.abstractmethod
    def held_out(self) -> HeldOut:
        """What is measured."""

    @abc.abstractmethod
    def run_config(self, pretrained: TrainConfig, annotations: tuple[str, ...], classes: int) -> TrainConfig:
        """The recipe of the run that trains the head, or measures the model as it is.

        Args:
          pretrained: the recipe of the pretraining.
          annotations: the annotations that batches carry.
          classes: how many classes the annotations have, where there are several.
        """


ConfigT = TypeVar("ConfigT", bound=Measurable)


@dataclasses.dataclass(frozen=True)
class TaskConfig(Measurable, RunConfig):
    """What all tasks with a head share. The encoder, its sizes and its audio features (`data.sound`) are those of
    `init`.

    `random_weights` takes the sizes of `init` but not its weights. `encoder_rate` multiplies the encoder's learning
    rate, `layer_decay` those of its layers (deepest first). `data.split` is trained on and `test_split` measured, of
    the sets `test_path` (empty: those of `data.path`), `test_clips` of it (0: all) in batches of `test_batch_size`.
    `bootstrap` resamplings give the intervals, `pictures` clips are drawn.
    """

    random_weights: bool = False
    encoder_rate: float = 1.0
    layer_decay: float = 1.0
    test_path: str = ""
    test_split: str = "test"
    test_clips: int = 0
    test_batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.layer_decay <= 1, f"layer_decay={self.layer_decay} must be above 0 and at most 1")
        require(bool(self.test_split), "test_split must name a split of the prepared sets, e.g. test")

    @property
    def held_out(self) -> HeldOut:
        """All sets are measured as one."""
        sets = {"": self.test_path or self.data.path}
        return HeldOut(sets, self.test_split, self.test_clips, self.test_batch_size)

    @property
    def paths(self) -> tuple[str, ...]:
        """All prepared sets that are used, each once."""
        return tuple(dict.fromkeys((*self.data.paths, *DataConfig(path=self.held_out.sets[""]).paths)))

    def run_config(self, pretrained: TrainConfig, annotations: tuple[str, ...], classes: int) -> TrainConfig:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        data = dataclasses.replace(self.data, sound=pretrained.data.sound, annotations=annotations, classes=classes)
        return TrainConfig(**fields | {"data": data}, model=pretrained.model)


class Condition(NamedTuple):
    """How clips are shown: `name` is the prefix of the metrics, with a '/' at its end; `swap` the stream that is taken
    from another clip, `blank` the stream that holds nothing ('image', 'audio' or neither); `untrained`: by a model with
    the task's random weights."""

    name: str = ""
    swap: str = ""
    blank: str = ""
    untrained: bool = False


class Task(abc.ABC, Generic[ConfigT]):
    """How a head is trained (`objective`), and how it is measured. A subclass per task, entered in `TASKS`.

    Attributes:
      config_class: the dataclass of the task's recipes.
      kind: the model's name in models.kinds.
      trains: whether there is a head to train; else the checkpoint's own model is measured.
      other: the stream that is exchanged for another clip's under `swapped/`, and for nothing under `blank/`.
      annotations: the annotations that batches carry.
      classes: how many the labels or pixels of masks have, where there are several.
      plan: what is measured of which clips; `None` as EvaluationData has it.
      details: further entries of results.json.
      missing: what could not be measured because clips are not there.
      columns: heads of the columns of the plot, which `panels` fills.
    """

    config_class: type[ConfigT]
    kind: str
    trains: bool = True
    other: str = "audio"
    annotations: tuple[str, ...] = ()
    classes: int = 0
    plan: MakePlan | None = None
    columns: tuple[str, ...] = ()
    objective: Objective

    def __init__(self, config: ConfigT, checkpoint: Checkpoint):
        self.config, self.checkpoint = config, checkpoint
        self.sound = checkpoint.config.data.sound
        self.details: dict[str, Any] = {}
        self.missing: list[str] = []

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Under which conditions every clip is measured; the first one gives the plots."""
        return Condition(), Condition("swapped/", swap=self.other), Condition("blank/", blank=self.other)

    @abc.abstractmethod
    def forward(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is measured of a batch: arrays [B, …] by name, under jit."""

    def forward_under(self, condition: Condition, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is measured of a batch under a condition; a swapped stream is in the batch already."""
        return self.forward(model, blank(batch, condition.blank, self.sound) if condition.blank else batch)

    def untrained_weights(self) -> Params | None:
        """Weights for conditions with an untrained model; `None`: those that a new run begins with."""
        return None

    def forward_drawn(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What plots need besides, computed for the batches of drawn clips alone."""
        return {}

    @abc.abstractmethod
    def score(self, clip: Clip) -> Any:
        """The scores of one item of the plan, from its rows of the batch and of what `forward` gave."""

    def combine(self, scores: list) -> Any:
        """A clip's (or a mixture's) scores from those of its items."""
        return scores[0]

    @abc.abstractmethod
    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        """Metrics by name from the scores of all clips by the name of each condition."""

    def table(self, name: str, metrics: Mapping[str, Metric], clips: int, skipped: int) -> str:
        """The metrics of the set `name` to print, a line each."""
        width = max(map(len, metrics))
        lines = (f"  {metric_name:<{width}}  {metric}" for metric_name, metric in metrics.items())
        return "\n".join([f"{clips} clips measured, {skipped} skipped", *lines])

    def panels(self, clip: Clip) -> list[np.ndarray]:
        """What the plot shows of a clip under `columns`: frames uint8 [H, W, 3] and spectrograms [mels, frames]."""
        return []

    def plot(self, measured: "Measured", folder: pathlib.Path) -> None:
        """Writes plots (and audio files) of the clips `measured.drawn`, or of all scores."""
        if self.columns:
            rows, names = [self.panels(clip) for clip, _ in measured.drawn], [name for _, name in measured.drawn]
            plots.save_png(folder / f"{self.config.task}.png", plots.gallery(rows, self.columns, names))


class HeadObjective(Objective):
    """A head on an encoder, which learns at `encoder_rate` times the rates of the head (0: frozen), its layers by
    `layer_decay` of those.

    Raises:
      UserError: encoder_rate is negative.
    """

    def __init__(
        self, kind: str, config: models.AVMAEConfig, head: Any, encoder_rate: float = 1.0, layer_decay: float = 1.0
    ):
        require(encoder_rate >= 0, f"encoder_rate={encoder_rate} must be at least 0 (0: the encoder stays as it is)")
        self.kind, self.config, self.head = kind, config, head
        self.encoder_rate, self.layer_decay = encoder_rate, layer_decay

    def build(self, rngs: nnx.Rngs) -> Any:
        return kinds.build_model(self.kind, self.config, self.head, rngs)

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return encoder_multipliers(params, self.encoder_rate, self.layer_decay, self.config.layers)

    def trained(self, name: str) -> bool:
        return self.encoder_rate > 0 or not name.startswith("encoder.")


class Finetuning(HeadObjective):
    """The head of a recipe on the encoder of a checkpoint; `loss(model, rows)` gives [B]."""

    def __init__(self, kind: str, config: Any, checkpoint: Checkpoint, loss: Callable[[Any, Rows], jax.Array]):
        super().__init__(kind, checkpoint.config.model, config.head, config.encoder_rate, config.layer_decay)
        self.loss = loss

    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        return self.loss(model, rows), {}


class Untrained(Objective):
    """A model that is measured as it is: one with decoders ('pretraining'), or an 'encoder'."""

    def __init__(self, kind: str, config: models.AVMAEConfig):
        self.kind, self.config = kind, config

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return kinds.build_model(self.kind, self.config, None, rngs)

    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        raise UserError(f"a model of kind {self.kind} is measured here, not trained")

    def trained(self, name: str) -> bool:
        return False


@dataclasses.dataclass
class Measured:
    """What was measured of a plan under one condition.

    Attributes:
      name: of the set.
      plan: what is measured of which clips.
      items: group of the plan → scores of its items that could be read; `scores`: the same combined.
      ids: group of the plan → ids of the items' clips.
      failures: the clips that could not be read.
      drawn: items for plots, with their clips' ids.
      rates: clips per second, where they were timed.
    """

    name: str
    plan: Plan
    items: dict[int, list] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    scores: dict[int, Any] = dataclasses.field(default_factory=dict)
    ids: dict[int, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    failures: list[ClipFailure] = dataclasses.field(default_factory=list)
    drawn: list[tuple[Clip, str]] = dataclasses.field(default_factory=list)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, task: Task, arrays: Clip, host: dict[str, np.ndarray], drawn: Sequence[int]) -> None:
        """Scores a batch's rows; those in `drawn` are kept for plots. Every process must call this."""
        self.failures += gather_failures(batch_failures(host))
        ids = gather_values(list(host["id"]))
        for row in np.flatnonzero(arrays["valid"]):
            clip = {name: x[row] for name, x in arrays.items()}
            group = int(self.plan.group[clip["index"]])
            self.items[group].append(task.score(clip))
            self.ids[group].append(ids[row])
            if row in drawn:
                self.drawn.append((clip, ids[row]))


def task_class(name: Any) -> type[Task]:
    """The class of the task of this name. Raises UserError for an unknown one."""
    require(name in TASKS, f"task={name!r} must be one of {', '.join((*TASKS, 'compare'))}")
    return getattr(importlib.import_module(f"av_mae.evaluate.{name}"), TASKS[name])


def blank(batch: Batch, stream: str, sound: SoundConfig) -> Batch:
    """The batch with nothing to see (ImageNet's mean colour) or nothing to hear (silence)."""
    if stream == "image":
        grey = jnp.asarray(np.round(models.IMAGENET_MEAN * 255), jnp.uint8)
        return batch | {"image": jnp.broadcast_to(grey, batch["image"].shape)}
    silence = (np.log10(sound.log_floor) - sound.mean) / sound.std
    return batch | {"audio": jnp.full_like(batch["audio"], silence)}


def common_classes(paths: Sequence[str], classes: int | None = None) -> list[str]:
    """The class names of prepared sets that are used together.

    Args:
      paths: the sets.
      classes: how many classes they must have; `None`: any number.

    Raises:
      UserError: there are no sets, their classes differ, or are not as many as `classes`.
    """
    require(bool(paths), NO_DATA)
    names = {path: records.class_names(path) for path in paths}
    check_classes(names)
    known = names[paths[0]]
    require(
        classes in (None, len(known)),
        f"head.classes={classes} does not match the labels: {paths[0]} has {len(known)} classes, set "
        f"--config.head.classes={len(known)}",
    )
    return known


def set_names(paths: Sequence[str]) -> dict[str, str]:
    """Name → path of each set: the folder's name, or the path where two folders are called alike."""
    require(bool(paths), NO_DATA)
    names = [pathlib.Path(path).name for path in paths]
    return {path if names.count(name) > 1 else name: path for path, name in zip(paths, names, strict=True)}
