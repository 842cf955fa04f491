"""A downstream task from checkpoint to figures: its head is trained by the loop of pretraining, then measured.

clips → Feed → the task's forward pass on the mesh → scores of each clip on the host → figures over resampled clips.
"""

import abc
import contextlib
import dataclasses
import importlib
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae import models, recipes
from av_mae.checkpoint import Checkpoint, Checkpoints, TrainState, load_params, open_checkpoint, read_meta
from av_mae.config import SoundConfig, TrainConfig
from av_mae.console import Progress, note
from av_mae.data.pipeline import open_evaluation_data
from av_mae.data.plans import MakePlan, Plan
from av_mae.errors import ClipFailure, UserError, batch_failures
from av_mae.evaluate.bootstrap import Bootstrap, Figure, Report
from av_mae.evaluate.clips import missing_clips
from av_mae.evaluate.config import TaskConfig
from av_mae.models import kinds
from av_mae.models.kinds import Params
from av_mae.train.hosts import Stopped
from av_mae.train.loop import Feed
from av_mae.train.optimizer import Length, Multipliers, encoder_multipliers
from av_mae.train.run import first_state, open_run, train_from
from av_mae.train.sharding import gather_failures, gather_texts, local_rows, row_shards
from av_mae.train.step import Batch, Objective, Rows, TrainStep


class Finetuning(Objective):
    """A model of `kind` with the head of the recipe on the encoder of a checkpoint; `loss(model, rows)` gives [B].

    Learning rates: those of the encoder times `encoder_rate` (0: frozen), those of its layers by `layer_decay`.
    """

    def __init__(
        self, kind: str, config: TaskConfig, checkpoint: Checkpoint, loss: Callable[[nnx.Module, Rows], jax.Array]
    ):
        self.kind, self.config, self.encoder_config, self.loss = kind, config, checkpoint.config.model, loss

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return kinds.build_model(self.kind, self.encoder_config, self.config.head, rngs)

    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        return self.loss(model, rows), {}

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return encoder_multipliers(
            params, self.config.encoder_rate, self.config.layer_decay, self.encoder_config.layers
        )

    def trained(self, name: str) -> bool:
        return self.config.encoder_rate > 0 or not name.startswith("encoder.")


REPEATS = 3


class Rates:
    """Times a forward pass in a loop over the batches of a feed; the first batch, which compiles, does not count."""

    def __init__(self, feed: Feed):
        self._feed, self._seconds, self._waited = feed, [], 0.0

    def timed(self, forward: Callable, *args) -> Any:
        """forward(*args), waited for."""
        start = time.perf_counter()
        result = jax.block_until_ready(forward(*args))
        self._seconds.append(time.perf_counter() - start)
        if len(self._seconds) == 1:
            self._waited = self._feed.wait_seconds
        return result

    def figures(self, batch_size: int, forward: Callable, *args) -> dict[str, float]:
        """`clips_per_second` of the loop (forward passes and waiting for input) and `encoder_clips_per_second` of the
        same pass again and again on one batch. Nothing where the loop had one batch only."""
        batches = len(self._seconds) - 1
        if batches < 1:
            return {}
        seconds = sum(self._seconds[1:]) + self._feed.wait_seconds - self._waited
        alone = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(forward(*args))
            alone.append(time.perf_counter() - start)
        return {
            "clips_per_second": batches * batch_size / seconds,
            "encoder_clips_per_second": batch_size / float(np.median(alone)),
        }


Clip = dict[str, np.ndarray]
CONDITIONS = ("", "swapped/", "blank/")
TASKS = {
    "classification": ("av_mae.evaluate.classification", "Classification"),
    "localization": ("av_mae.evaluate.localization", "Localization"),
    "neighbours": ("av_mae.evaluate.neighbours", "Neighbours"),
    "segmentation": ("av_mae.evaluate.segmentation", "Segmentation"),
    "separation": ("av_mae.evaluate.separation", "Separation"),
}


class Task(abc.ABC):
    """How a head is trained (`objective`), and how it is measured. A subclass per task.

    kind: the model's name in models.kinds. annotations: what batches carry beside frame and sound. other: the stream
    ('image' or 'audio') that is exchanged for another clip's under `swapped/`, and for nothing under `blank/`.
    classes: how many the labels or pixels of masks have, where there are several. trains: whether there is a head to
    train; else the checkpoint's own model is measured. conditions: which of CONDITIONS are measured. plan: what is
    measured of which clips (None: see EvaluationData). details: for results.json. missing: what could not be measured
    because clips are not there.
    """

    kind: str
    trains: bool = True
    conditions: tuple[str, ...] = CONDITIONS
    plan: MakePlan | None = None
    classes: int = 0
    annotations: tuple[str, ...] = ()
    other: str = "audio"
    objective: Objective

    def __init__(self, config: TaskConfig, checkpoint: Checkpoint):
        self.config, self.checkpoint = config, checkpoint
        self.sound = checkpoint.config.data.sound
        self.details: dict[str, Any] = {}
        self.missing: list[str] = []

    @abc.abstractmethod
    def forward(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is measured of a batch: arrays [B, …] by name, under jit."""

    @abc.abstractmethod
    def score(self, clip: Clip) -> Any:
        """The scores of one item of the plan, from its rows of the batch and of what `forward` gave."""

    def combine(self, scores: list) -> Any:
        """A clip's (or a mixture's) scores from those of its items."""
        return scores[0]

    @abc.abstractmethod
    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        """Figures by name from the scores of all clips under each condition ('', 'swapped/', 'blank/')."""

    def picture(self, measured: "Measured", folder: pathlib.Path) -> None:
        """Pictures (and sounds): of the clips `measured.drawn`, or of all scores."""


class Measured:
    """What was measured of a plan under one condition.

    items: group of the plan → scores of its items that could be read; scores: the same combined. `failures`
    are the clips that could not be read; `drawn` and `names` are items for pictures and their clips' ids.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.items: dict[int, list] = {}
        self.scores: dict[int, Any] = {}
        self.failures: list[ClipFailure] = []
        self.drawn: list[Clip] = []
        self.names: list[str] = []
        self.rates: dict[str, float] = {}

    def add(self, task: Task, arrays: Clip, host: dict[str, np.ndarray], drawn: list[int]) -> None:
        """Scores a batch's rows; those in `drawn` are kept for pictures. Every process must call this."""
        self.failures += gather_failures(batch_failures(host))
        ids = gather_texts(list(host["id"]))
        for row in np.flatnonzero(arrays["valid"]):
            clip = {name: x[row] for name, x in arrays.items()}
            self.items.setdefault(int(self.plan.group[clip["index"]]), []).append(task.score(clip))
            if row in drawn:
                self.drawn.append(clip)
                self.names.append(ids[row])


def make_task(config: TaskConfig, checkpoint: Checkpoint) -> Task:
    """The task that a recipe names."""
    module, name = TASKS[config.task]
    return getattr(importlib.import_module(module), name)(config, checkpoint)


def run(config: TaskConfig, workdir: pathlib.Path) -> Report:
    """Trains the head where it is not trained yet, then measures it. The same call goes on where it was stopped.

    Raises:
      UserError: `init` is no checkpoint, the data does not fit, or the process was asked to stop while training.
    """
    if not config.init:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    checkpoint = open_checkpoint(config.init)
    task = make_task(config, checkpoint)
    step, state = train_head(task, config.run_config(checkpoint.config, task.annotations, task.classes), workdir)
    measured = {prefix: measure(task, step, state, prefix) for prefix in task.conditions}
    return report(task, measured, workdir)


def report(task: Task, measured: dict[str, Measured], workdir: pathlib.Path) -> Report:
    """Figures over the clips (or mixtures) that were measured under every condition, and pictures of them.

    What annotations name and the sets do not hold is counted, and listed in `missing.txt`.
    """
    config, whole = task.config, measured[""]
    groups = [group for group in whole.scores if all(group in part.scores for part in measured.values())]
    if not groups:
        raise UserError(
            f"none of the {whole.plan.groups} clips can be measured under every condition; the "
            f"first error: {next(part.failures[0] for part in measured.values() if part.failures)}"
        )
    figures = task.figures(
        {prefix: [part.scores[group] for group in groups] for prefix, part in measured.items()},
        Bootstrap(len(groups), config.seed, config.bootstrap),
    )
    failures = list(dict.fromkeys(itertools.chain.from_iterable(part.failures for part in measured.values())))
    missing = [*missing_clips(config.test_data.paths, config.test_split), *task.missing]
    if jax.process_index() == 0:
        if config.pictures:
            task.picture(whole, workdir / "images")
        if missing:
            (workdir / "missing.txt").write_text("\n".join(missing) + "\n")
    details = {
        "items": sum(len(whole.items[group]) for group in groups),
        "missing": len(missing),
        **task.details,
        "config": recipes.to_dict(config),
        "checkpoint": identity(task.checkpoint.folder),
        "skipped_clips": [str(failure) for failure in failures],
        **whole.rates,
    }
    skipped = whole.plan.groups - len(groups)
    return Report(
        figures,
        len(groups),
        skipped,
        table(figures, len(groups), skipped, [*map(str, failures), *missing]),
        details,
        failures,
    )


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
        labels = {
            "kind": task.kind,
            "head": recipes.to_dict(task.config.head),
            "init": str(task.checkpoint.folder),
            "random_weights": task.config.random_weights,
        }
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
    return load_params(str(task.checkpoint.folder), wanted, partly=True)


def blank(batch: Batch, stream: str, sound: SoundConfig) -> Batch:
    """The batch with nothing to see (ImageNet's mean colour) or nothing to hear (silence)."""
    if stream == "image":
        grey = jnp.asarray(np.round(models.IMAGENET_MEAN * 255), jnp.uint8)
        return batch | {"image": jnp.broadcast_to(grey, batch["image"].shape)}
    silence = (np.log10(sound.log_floor) - sound.mean) / sound.std
    return batch | {"audio": jnp.full_like(batch["audio"], silence)}


def measure(task: Task, step: TrainStep, state: TrainState, prefix: str) -> Measured:
    """Scores of every held-out clip, with the other stream right (''), 'swapped/' or 'blank/'."""
    config, model, shards = task.config, step.config.model, row_shards(step.mesh)
    size = -(-config.test_batch_size // shards) * shards
    source = dataclasses.replace(step.config.data, path=config.test_data.path, split=config.test_split, weights=None)

    def forward(model, batch):
        shown = blank(batch, task.other, task.sound) if prefix == "blank/" else batch
        return batch | task.forward(model, shown)

    compiled = step.forward(forward)
    swap = task.other if prefix == "swapped/" else ""
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(
            open_evaluation_data(
                source,
                model.image.size,
                model.audio.size,
                size,
                local_rows(step.rows, size),
                swap=swap,
                most=config.test_clips,
                make_plan=task.plan,
            )
        )
        measured, items = Measured(data.plan), len(data.plan)
        feed = stack.enter_context(Feed(data, step.rows, source.prefetch))
        progress = stack.enter_context(Progress(items, f"measuring {prefix.rstrip('/') or 'right'}"))
        drawn = np.linspace(0, items - 1, 0 if prefix else config.pictures).astype(int).tolist()
        rates = Rates(feed)
        for number, (host, batch) in enumerate(feed):
            arrays = jax.device_get(rates.timed(compiled, state, batch))
            measured.add(task, arrays, host, [index - number * size for index in drawn])
            progress.update(min(size, items - number * size))
        measured.rates |= rates.figures(size, compiled, state, batch)
    if not measured.items:
        raise UserError(f"none of the clips of {source.path} can be read; the first error: {measured.failures[0]}")
    measured.scores = {group: task.combine(scores) for group, scores in measured.items.items()}
    return measured


def table(figures: dict[str, Figure], clips: int, skipped: int, causes: list[str]) -> str:
    """Figures, a line each, and what was left out."""
    width = max(map(len, figures))
    lines = [f"{clips} clips measured, {skipped} skipped"]
    lines += [f"  {name:<{width}}  {figure}" for name, figure in figures.items()]
    return "\n".join([*lines, *(f"left out: {cause}" for cause in causes[:5])])
