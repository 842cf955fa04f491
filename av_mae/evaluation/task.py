"""A downstream task from checkpoint to figures: its head is trained by the loop of pretraining, then measured.

clips → Feed → the task's forward pass on the mesh → scores of each clip on the host → figures over resampled clips.
"""

import abc
import contextlib
import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import models, recipes
from av_mae.config import SoundConfig, TrainConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError
from av_mae.evaluation.figures import Bootstrap, Figure, Report
from av_mae.evaluation.rates import Rates
from av_mae.progress import Progress
from av_mae.task_config import TaskConfig
from av_mae.training.checkpoint import Checkpoints, load_params, note, read_meta
from av_mae.training.feed import Feed
from av_mae.training.hosts import Stopped
from av_mae.training.mesh import gather_texts, local_rows, row_shards
from av_mae.training.objective import Objective
from av_mae.training.run import first_state, open_run, train_from
from av_mae.training.step import Batch, Params, TrainState, TrainStep
from av_mae.training.stored import Stored, open_checkpoint

Clip = dict[str, np.ndarray]
CONDITIONS = ("", "swapped/", "blank/")
TASKS = {"classification": ("av_mae.evaluation.classification", "Classification"),
         "localization": ("av_mae.evaluation.localization", "Localization"),
         "neighbours": ("av_mae.evaluation.neighbours", "Neighbours"),
         "segmentation": ("av_mae.evaluation.segmentation", "Segmentation"),
         "separation": ("av_mae.evaluation.separation", "Separation")}


class Task(abc.ABC):
    """How a head is trained (`objective`), and how it is measured. A subclass per task.

    kind: the model's name in models.kinds. truth: what batches carry beside frame and sound. other: the stream
    ('image' or 'audio') that is exchanged for another clip's under `swapped/`, and for nothing under `blank/`.
    trains: whether there is a head to train; else the checkpoint's own model is measured. windows: places of each
    sound at which it is measured, spread over its length. conditions: which of CONDITIONS are measured.
    """

    kind: str
    trains: bool = True
    conditions: tuple[str, ...] = CONDITIONS
    windows: int = 1
    truth: tuple[str, ...] = ()
    other: str = "audio"
    objective: Objective

    def __init__(self, config: TaskConfig, stored: Stored):
        self.config, self.stored = config, stored
        self.sound = stored.config.data.sound

    @abc.abstractmethod
    def forward(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is measured of a batch: arrays [B, …] by name, under jit."""

    @abc.abstractmethod
    def score(self, clip: Clip) -> Any:
        """The scores of one clip, from its rows of what `forward` gave."""

    def combine(self, scores: list) -> Any:
        """One clip's scores from those of its windows, for tasks with several."""
        return scores[0]

    @abc.abstractmethod
    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        """Figures by name from the scores of all clips under each condition ('', 'swapped/', 'blank/')."""

    def picture(self, measured: "Measured", folder: pathlib.Path) -> None:
        """Pictures (and sounds): of the clips `measured.drawn`, or of all scores."""


class Measured:
    """Scores of the clips that could be read, in stored order.

    `skipped` names the others with their causes; `drawn` and `names` are clips for pictures and their ids.
    """

    def __init__(self):
        self.scores: list = []
        self.skipped: list[str] = []
        self.drawn: list[Clip] = []
        self.names: list[str] = []
        self.rates: dict[str, float] = {}

    def add(self, task: Task, arrays: Clip, host: dict[str, np.ndarray], drawn: list[int]) -> None:
        """Scores a batch's rows; those in `drawn` are kept for pictures. Every process must call this."""
        self.skipped += gather_texts([error for error in host["error"] if error])
        ids = gather_texts(list(host["id"]))
        for row in np.flatnonzero(arrays["valid"]):
            clip = {name: x[row] for name, x in arrays.items()}
            self.scores.append(task.score(clip))
            if row in drawn:
                self.drawn.append(clip)
                self.names.append(ids[row])


def make_task(config: TaskConfig, stored: Stored) -> Task:
    """The task that a recipe names."""
    module, name = TASKS[config.task]
    return getattr(importlib.import_module(module), name)(config, stored)


def run(config: TaskConfig, workdir: pathlib.Path) -> Report:
    """Trains the head where it is not trained yet, then measures it. The same call goes on where it was stopped.

    Raises:
      UserError: `init` is no checkpoint, the data does not fit, or the process was asked to stop while training.
    """
    if not config.init:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    stored = open_checkpoint(config.init)
    task = make_task(config, stored)
    step, state = train_head(task, config.run_config(stored.config, task.truth), workdir)
    measured = {prefix: measure_windows(task, step, state, prefix) for prefix in task.conditions}
    whole = measured[""]
    figures = task.figures({prefix: part.scores for prefix, part in measured.items()},
                           Bootstrap(len(whole.scores), config.seed, config.bootstrap))
    if config.pictures and jax.process_index() == 0:
        task.picture(whole, workdir / "images")
    details = {"config": recipes.to_dict(config), "checkpoint": identity(stored.folder), "skipped_clips": whole.skipped,
               **whole.rates}
    return Report(figures, len(whole.scores), len(whole.skipped), table(figures, whole), details)


def identity(folder: pathlib.Path) -> dict[str, Any]:
    """Which checkpoint an encoder came from: its place, step and the checksum of its arrays."""
    meta = read_meta(folder)
    return {"path": str(folder), "step": meta["step"], "checksum": meta["checksums"]["model"]}


def train_head(task: Task, config: TrainConfig, workdir: pathlib.Path) -> tuple[TrainStep, TrainState]:
    """The compiled step and the state at the end of training: from the workdir's checkpoints as far as they go."""
    with contextlib.ExitStack() as stack:
        step, data, last = stack.enter_context(open_run(config, task.objective))
        if not task.trains:
            return step, step.init(first_weights(task, step))
        labels = {"kind": task.kind, "head": recipes.to_dict(task.config.head), "init": str(task.stored.folder),
                  "random_weights": task.config.random_weights}
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep_last, config.keep_every, labels=labels)
        stack.callback(checkpoints.close)
        begin = first_state(step, checkpoints, config, lambda: first_weights(task, step))
        if begin.meta["step"] >= last:
            note(f"the head is trained: it has done {begin.meta['step']} of {last} steps")
            return step, begin.state
        end = train_from(config, workdir, step, begin, data, last, checkpoints, f"training the {task.kind}")
        if end.meta["step"] < last:
            raise Stopped
        return step, end.state


def first_weights(task: Task, step: TrainStep) -> Params | None:
    """The encoder of `init`, or all where nothing is trained; what else there is, and all where the recipe says so,
    begins at random."""
    if task.config.random_weights:
        return None
    abstract = step.abstract_state().model
    wanted = {name: x for name, x in abstract.items() if not task.trains or name.startswith("encoder.")}
    return load_params(str(task.stored.folder), wanted, partly=True)


def blank(batch: Batch, stream: str, sound: SoundConfig) -> Batch:
    """The batch with nothing to see (ImageNet's mean colour) or nothing to hear (silence)."""
    if stream == "image":
        grey = jnp.asarray(np.round(models.IMAGENET_MEAN * 255), jnp.uint8)
        return batch | {"image": jnp.broadcast_to(grey, batch["image"].shape)}
    silence = (np.log10(sound.log_floor) - sound.mean) / sound.std
    return batch | {"audio": jnp.full_like(batch["audio"], silence)}


def measure_windows(task: Task, step: TrainStep, state: TrainState, prefix: str) -> Measured:
    """`measure` with the scores of each clip's windows combined."""
    parts = [measure(task, step, state, prefix, (number + 0.5) / task.windows) for number in range(task.windows)]
    parts[0].scores = [task.combine(list(scores)) for scores in zip(*(part.scores for part in parts), strict=True)]
    return parts[0]


def measure(task: Task, step: TrainStep, state: TrainState, prefix: str, place: float) -> Measured:
    """Scores of every held-out clip, with the other stream right (''), 'swapped/' or 'blank/'; `place` of the window
    in the sound: 0 the first, 1 the last that it holds."""
    config, model, shards = task.config, step.config.model, row_shards(step.mesh)
    size = -(-config.test_batch_size // shards) * shards
    source = dataclasses.replace(step.config.data, split=config.test_split, weights=None)

    def forward(model, batch):
        shown = blank(batch, task.other, task.sound) if prefix == "blank/" else batch
        return batch | task.forward(model, shown)

    compiled, measured = step.forward(forward), Measured()
    swap = task.other if prefix == "swapped/" else ""
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(open_evaluation_data(source, model.image.size, model.audio.size, size,
                                                        local_rows(step.rows, size), swap, config.test_clips,
                                                        place))
        feed = stack.enter_context(Feed(data, step.rows, source.prefetch))
        progress = stack.enter_context(Progress(data.clips, f"measuring {prefix.rstrip('/') or 'right'}"))
        drawn = np.linspace(0, data.clips - 1, 0 if prefix else config.pictures).astype(int).tolist()
        rates = Rates(feed)
        for number, (host, batch) in enumerate(feed):
            arrays = jax.device_get(rates.timed(compiled, state, batch))
            measured.add(task, arrays, host, [place - number * size for place in drawn])
            progress.update(min(size, data.clips - number * size))
        measured.rates |= rates.figures(size, compiled, state, batch)
    if not measured.scores:
        raise UserError(f"none of the clips of {source.path} can be read; the first error: {measured.skipped[0]}")
    return measured


def table(figures: dict[str, Figure], measured: Measured) -> str:
    """Figures, a line each, and what was skipped."""
    width = max(map(len, figures))
    lines = [f"{len(measured.scores)} clips measured, {len(measured.skipped)} skipped"]
    lines += [f"  {name:<{width}}  {figure}" for name, figure in figures.items()]
    return "\n".join([*lines, *(f"skipped {clip}" for clip in measured.skipped[:5])])
