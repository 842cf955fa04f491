"""One task run in a work directory: its head is trained by the loop of pretraining, then measured on held-out clips.

clips → Prefetch → the task's forward pass on the mesh → scores of each clip on the host → metrics over resampled clips.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from av_mae import recipes
from av_mae.checkpoint import Checkpoints, TrainState, load_params, open_checkpoint
from av_mae.checkpoint_files import read_meta
from av_mae.config import DataConfig, TrainConfig
from av_mae.console import Progress, note
from av_mae.data.copies import folder_of
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError, one_line
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Report
from av_mae.evaluate.task import Condition, Measurable, Measured, Task, TaskConfig, task_class
from av_mae.models.config import require
from av_mae.models.kinds import Params
from av_mae.storage import replace_file
from av_mae.train.hosts import Stopped
from av_mae.train.loop import Prefetch
from av_mae.train.optimizer import run_length
from av_mae.train.run import Run, first_state, open_run, train_from
from av_mae.train.sharding import local_rows, make_mesh, row_shards
from av_mae.train.step import TrainStep, fitted_mesh

REPORT = "report.json"  # of a prepared set: what was found when it was prepared
REPEATS = 3


class Rates:
    """Times a forward pass in a loop over the batches of `prefetch`; the first batch compiles and does not count."""

    def __init__(self, prefetch: Prefetch):
        self._prefetch, self._waited = prefetch, 0.0
        self._seconds: list[float] = []

    def timed(self, forward: Callable, *args) -> Any:
        """forward(*args), waited for."""
        start = time.perf_counter()
        result = jax.block_until_ready(forward(*args))
        self._seconds.append(time.perf_counter() - start)
        if len(self._seconds) == 1:
            self._waited = self._prefetch.wait_seconds
        return result

    def metrics(self, batch_size: int, forward: Callable, *args) -> dict[str, float]:
        """`clips_per_second` of the loop (forward passes and waiting for input) and `encoder_clips_per_second` of the
        same pass again and again on one batch. Nothing where the loop had one batch only."""
        batches = len(self._seconds) - 1
        if batches < 1:
            return {}
        seconds = sum(self._seconds[1:]) + self._prefetch.wait_seconds - self._waited
        for _ in range(REPEATS):
            self.timed(forward, *args)
        return {
            "clips_per_second": batches * batch_size / seconds,
            "encoder_clips_per_second": batch_size / float(np.median(self._seconds[-REPEATS:])),
        }


def run(config: Measurable, workdir: pathlib.Path) -> Report:
    """Trains the head where it is not trained yet, then measures it. The same call goes on where it was stopped.

    Raises:
      UserError: `init` is no checkpoint, the data does not fit, or the process was asked to stop while training.
    """
    require(bool(config.init), "no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    sets = config.held_out.sets
    checkpoint = open_checkpoint(config.init)
    task = task_class(config.task)(config, checkpoint)
    step, state = trained(task, config.run_config(checkpoint.config, task.annotations, task.classes), workdir)
    states = {False: state}
    if any(condition.untrained for condition in task.conditions):
        states[True] = step.init(task.untrained_weights())
    measured = {
        name: {
            condition.name: measure(task, step, states[condition.untrained], condition, name)
            for condition in task.conditions
        }
        for name in sets
    }
    return make_report(task, measured, workdir)


def trained(task: Task, config: TrainConfig, workdir: pathlib.Path) -> tuple[TrainStep, TrainState]:
    """The compiled step and the state at the end of training: from the workdir's checkpoints as far as they go."""
    if not task.trains:
        mesh = make_mesh(fitted_mesh(config, task.objective))
        config = dataclasses.replace(config, batch_size=row_shards(mesh), grad_accumulation=1)
        step = TrainStep(config, mesh, run_length(config, 1), task.objective)
        return step, step.init(first_weights(task, step))
    labels = {
        "kind": task.kind,
        "head": recipes.to_dict(task.config.head),
        "init": str(task.checkpoint.folder),
        "random_weights": task.config.random_weights,
    }
    kept = workdir / "checkpoints", config.keep_last, config.keep_every
    with (
        open_run(config, task.objective) as (step, data, last),
        contextlib.closing(Checkpoints(*kept, labels=labels)) as checkpoints,
    ):
        begin = first_state(step, checkpoints, config, lambda: first_weights(task, step))
        if begin.meta["step"] >= last:
            note(f"the head is trained: it has done {begin.meta['step']} of {last} steps")
            return step, begin.state
        end = train_from(Run(config, workdir, step, data, last, checkpoints, f"training the {task.kind}"), begin)
        if not end.meta["ended"]:
            raise Stopped
        return step, end.state


def first_weights(task: Task, step: TrainStep) -> Params | None:
    """The encoder of `init`, or the whole model where nothing is trained; other weights begin at random, and so do all
    where the recipe says so (`None`)."""
    if isinstance(task.config, TaskConfig) and task.config.random_weights:
        return None
    abstract: Mapping[str, Any] = step.abstract_state().model
    wanted = {name: x for name, x in abstract.items() if not task.trains or name.startswith("encoder.")}
    return load_params(str(task.checkpoint.folder), wanted, partly=True)


def measure(task: Task, step: TrainStep, state: TrainState, condition: Condition, name: str) -> Measured:
    """Scores of every held-out clip of the set `name` under one condition."""
    held_out, model, shards = task.config.held_out, step.config.model, row_shards(step.mesh)
    size = -(-held_out.batch_size // shards) * shards
    source = dataclasses.replace(step.config.data, path=held_out.sets[name], split=held_out.split, weights=None)
    compiled = step.forward(lambda model, batch: batch | task.forward_under(condition, model, batch))
    compiled_drawn = step.forward(task.forward_drawn)
    opened = open_evaluation_data(
        source,
        model.image.size,
        model.audio.size,
        size,
        local_rows(step.rows, size),
        swap=condition.swap,
        most=held_out.clips,
        make_plan=task.plan,
    )
    what = "/".join(filter(None, (name, condition.name.rstrip("/") or "right")))
    with (
        opened as data,
        Prefetch(data, step.rows, source.prefetch) as prefetch,
        Progress(len(data.plan), one_line(f"measuring {what}")) as progress,
    ):
        measured, items = Measured(name, data.plan), len(data.plan)
        pictures = task.config.pictures if condition == task.conditions[0] else 0
        drawn = np.unique(np.linspace(0, items - 1, pictures).astype(int))
        rates = Rates(prefetch)
        for number, (host, batch) in enumerate(prefetch):
            arrays = jax.device_get(rates.timed(compiled, state, batch))
            rows = drawn[(drawn >= number * size) & (drawn < (number + 1) * size)] - number * size
            if len(rows):
                arrays |= jax.device_get(compiled_drawn(state, batch))
            measured.add(task, arrays, host, rows.tolist())
            progress.update(min(size, items - number * size))
        measured.rates |= rates.metrics(size, compiled, state, batch)
    if not measured.items:
        first = one_line(str(measured.failures[0]))
        raise UserError(f"none of the clips of {source.path} can be read; the first error: {first}")
    measured.scores = {group: task.combine(scores) for group, scores in measured.items.items()}
    return measured


def make_report(task: Task, measured: Mapping[str, Mapping[str, Measured]], workdir: pathlib.Path) -> Report:
    """Metrics over the clips (or mixtures) that were measured under every condition, and plots of them.

    What annotations name and the sets do not hold is counted, and listed in `missing.txt`; the ids of the clips that
    the metrics count are written to `ids.json`.

    Args:
      task: what was measured.
      measured: set → condition → what was measured.
      workdir: for plots and lists.
    """
    config = task.config
    metrics: dict[str, Metric] = {}
    tables, ids = [], {}
    clips = groups = items = 0
    for name, parts in measured.items():
        common = common_groups(parts)
        scores = {condition: [part.scores[group] for group in common] for condition, part in parts.items()}
        found = task.metrics(scores, Bootstrap(len(common), config.seed, config.bootstrap))
        metrics |= {f"{name}/{metric}" if name else metric: value for metric, value in found.items()}
        whole = next(iter(parts.values()))
        tables.append(task.table(one_line(name), found, len(common), whole.plan.groups - len(common)))
        ids[name] = list(itertools.chain.from_iterable(dict.fromkeys(whole.ids[group]) for group in common))
        clips, groups = clips + len(common), groups + whole.plan.groups
        items += sum(len(whole.items[group]) for group in common)
        if whole.drawn and jax.process_index() == 0:
            task.plot(whole, workdir / "images")
    every = [part for parts in measured.values() for part in parts.values()]
    failures = list(dict.fromkeys(itertools.chain.from_iterable(part.failures for part in every)))
    paths = DataConfig(path=",".join(config.held_out.sets.values())).paths
    missing = [*missing_clips(paths, config.held_out.split), *task.missing]
    listed = json.dumps(ids[""] if list(ids) == [""] else ids, indent=0) + "\n"
    if jax.process_index() == 0:
        replace_file(workdir / "ids.json", listed)
        if missing:
            replace_file(workdir / "missing.txt", "".join(one_line(clip) + "\n" for clip in missing))
    details = {
        "items": items,
        "missing": len(missing),
        "ids_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        **task.details,
        "config": recipes.to_dict(config),
        "checkpoint": identity(task.checkpoint.folder),
        "skipped_clips": [str(failure) for failure in failures],
        **every[0].rates,
    }
    # Ids and causes come from the prepared set: nothing in them may move the cursor of a terminal.
    tables += [one_line(f"left out: {cause}") for cause in [*map(str, failures), *missing][:5]]
    return Report(metrics, clips, groups - clips, "\n".join(tables), details, failures)


def common_groups(parts: Mapping[str, Measured]) -> list[int]:
    """The groups of a plan that were measured under every condition. Raises UserError where there are none."""
    whole = next(iter(parts.values()))
    groups = [group for group in whole.scores if all(group in part.scores for part in parts.values())]
    if not groups:
        first = next(part.failures[0] for part in parts.values() if part.failures)
        raise UserError(
            f"none of the {whole.plan.groups} clips can be measured under every condition; the first error: "
            f"{one_line(str(first))}"
        )
    return groups


def identity(folder: pathlib.Path) -> dict[str, Any]:
    """Which checkpoint an encoder came from: its folder, step and the checksum of its arrays."""
    meta = read_meta(folder)
    return {"path": str(folder), "step": meta["step"], "checksum": meta["checksums"]["model"]}


def missing_clips(paths: Sequence[str], split: str) -> Iterator[str]:
    """Clips of a split that the annotations name and the prepared sets do not hold, a line each with the cause.

    Read from what `av_mae.prepare` reported beside the shards; demo sets have no annotations and no report.
    """
    for path in paths:
        report = folder_of(path) / REPORT
        if not report.is_file():
            continue
        try:
            findings = json.loads(report.read_text())["findings"]
            yield from (
                f"{path}: clip {finding['clip']}: {finding['message']}"
                for finding in findings
                if finding["cause"] == "missing" and finding["split"] in ("", split)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{report} is damaged ({error!r}): prepare the set again, or delete the file") from error
