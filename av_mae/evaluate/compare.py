"""A table of pretrainings by tasks and seeds: every cell is one evaluation in a folder of its own."""

import dataclasses
import itertools
import json
import pathlib
import statistics
from typing import NamedTuple

import jax
import numpy as np

from av_mae import plots, recipes
from av_mae.checkpoint import first_difference
from av_mae.checkpoint_files import find_checkpoint
from av_mae.console import first_line, note
from av_mae.errors import UserError, one_line
from av_mae.evaluate import run as task_run
from av_mae.evaluate.bootstrap import Metric, Report
from av_mae.evaluate.task import TaskConfig, task_class
from av_mae.models.config import require, require_bounds
from av_mae.storage import replace_file

RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class ComparedRow:
    """A pretraining to compare: `checkpoint` in the folder of runs, or the sizes of it with `random_weights`.

    `command` makes the checkpoint. `tasks` names those that it is measured on (none: all), `overrides` (KEY=VALUE)
    change their recipes.
    """

    name: str
    checkpoint: str
    command: str = ""
    random_weights: bool = False
    tasks: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ComparedTask:
    """A task to compare by: its `recipe` (FILE:VARIANT), the set in the folder of runs, changes of the recipe
    (KEY=VALUE), and which of its `figures` are shown."""

    name: str
    recipe: str
    data: str
    figures: tuple[str, ...]
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A table of pretrainings (rows) by tasks, each measured with every seed. `runs` is the folder that the rows'
    checkpoints and the tasks' sets lie in."""

    task: str = "compare"
    runs: str = "runs"
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[ComparedRow, ...] = ()
    tasks: tuple[ComparedTask, ...] = ()

    def __post_init__(self):
        require_bounds(self)
        require(len(self.seeds) > 0, "seeds=() must hold at least one seed")
        for what in ("seeds", "rows", "tasks"):
            names = [getattr(entry, "name", entry) for entry in getattr(self, what)]
            require(len(set(names)) == len(names), f"{what} must have different names, got {names}")
        known = {task.name for task in self.tasks}
        for row in self.rows:
            require(set(row.tasks) <= known, f"row {row.name!r} has tasks={row.tasks}; the table has {sorted(known)}")


class Cell(NamedTuple):
    """One evaluation of the table."""

    row: ComparedRow
    task: ComparedTask
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name.replace(' ', '_')}/{self.task.name}/{self.seed}"

    def config(self, runs: pathlib.Path) -> TaskConfig:
        """The recipe of this evaluation."""
        values = (
            *self.task.overrides,
            *self.row.overrides,
            f"init={runs / self.row.checkpoint}",
            f"seed={self.seed}",
            f"data.path={runs / self.task.data}",
            f"random_weights={self.row.random_weights}",
        )
        return recipes.load_recipe(
            self.task.recipe,
            [f"{recipes.PREFIX}{value}" for value in values],
            lambda recipe: task_class(recipe["task"]).config_class,
        )


class Entry(NamedTuple):
    """A metric of a row over the seeds that gave it: mean, standard deviation (NaN for one seed), each seed's value,
    the lowest and highest ends of the seeds' intervals, and the number of seeds that were to give it."""

    mean: float
    deviation: float
    values: list[float]
    low: float
    high: float
    seeds: int

    def __str__(self):
        done = len(self.values)
        missing = f" ({done} of {self.seeds} seeds)" if done < self.seeds else ""
        return f"{self.mean:.3f}" + ("" if done < 2 else f" ± {self.deviation:.3f}") + missing


Results = dict[Cell, dict]  # the contents of each cell's results.json
Table = dict[tuple[str, str, str], Entry]  # by row, task and metric


def run(config: CompareConfig, workdir: pathlib.Path) -> Report:
    """Measures every cell that is not yet, and writes `comparison.md` and `comparison.png` after each.

    A cell that cannot be measured is named with its reason, and tried again by the next call.

    Raises:
      UserError: a checkpoint is missing; the message has the command that makes it.
    """
    runs = pathlib.Path(config.runs)
    for row in config.rows:
        try:
            find_checkpoint(str(runs / row.checkpoint))
        except UserError as error:
            raise UserError(
                f"the row {row.name!r} needs a checkpoint in {runs / row.checkpoint}, there is none; "
                f"make it with: {row.command}"
            ) from error
    todo, results, failed = cells(config), {}, {}
    for number, cell in enumerate(todo):
        note(f"{cell.name}, cell {number + 1} of {len(todo)}")
        try:
            results[cell] = measured(cell, cell.config(runs), workdir / cell.name)
        except Exception as error:  # whatever goes wrong in one cell must not end the others
            failed[cell.name] = one_line(str(error) if isinstance(error, UserError) else first_line(error))
            note(f"{cell.name} failed: {failed[cell.name]}")
        jax.clear_caches()  # no two cells share a program
        table = gather(config, results)
        report = make_report(config, table, results, failed)
        if jax.process_index() == 0:
            replace_file(workdir / "comparison.md", report.table + "\n")
            plots.save_png(workdir / "comparison.png", draw(config, table))
    return report


def cells(config: CompareConfig) -> list[Cell]:
    """All evaluations, those of the first seed first."""
    return [
        Cell(row, task, seed)
        for seed in config.seeds
        for task in config.tasks
        for row in config.rows
        if not row.tasks or task.name in row.tasks
    ]


def measured(cell: Cell, config: TaskConfig, folder: pathlib.Path) -> dict:
    """The cell's `results.json`, which is made where it is not there yet. Keys that recipes did not have when it was
    made count as their defaults.

    Raises:
      UserError: it is there, of another recipe or checkpoint.
    """
    path = folder / RESULTS
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        report = task_run.run(config, folder)
        if jax.process_index() == 0:
            recipes.save(config, folder / "config.json")
            report.save(path)
        return report.to_json()
    results = json.loads(path.read_text())
    now = {"config": recipes.to_dict(config), "checkpoint": task_run.identity(find_checkpoint(config.init))}
    measured_config = recipes.to_dict(recipes.from_dict(results["config"], type(config)))
    difference = first_difference(now, {"config": measured_config, "checkpoint": results["checkpoint"]})
    if difference is not None:
        name, here, there = difference
        raise UserError(
            f"{folder} holds the results of another evaluation: {name} is {there} in it and {here} now; "
            "move the folder away, or give another --workdir"
        )
    return results


def gather(config: CompareConfig, results: Results) -> Table:
    """Every row's metrics over the seeds that gave a number."""
    table = {}
    for row, (task, name) in itertools.product(config.rows, columns(config)):
        cells = [metrics for cell, metrics in results.items() if (cell.row.name, cell.task.name) == (row.name, task)]
        found = [metrics[name] for metrics in cells if metrics.get(name, {}).get("value") is not None]
        if found:
            values, lows, highs = ([metric[part] for metric in found] for part in ("value", "low", "high"))
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            mean, ends = statistics.fmean(values), (min(lows), max(highs))
            table[row.name, task, name] = Entry(mean, deviation, values, *ends, seeds=len(config.seeds))
    return table


def columns(config: CompareConfig) -> list[tuple[str, str]]:
    """(task, metric) of each column."""
    return [(task.name, name) for task in config.tasks for name in task.figures]


def make_report(config: CompareConfig, table: Table, results: Results, failed: dict[str, str]) -> Report:
    """Metrics ROW/TASK/FIGURE: means over the seeds, with the lowest and highest ends of the seeds' intervals."""
    named = {"/".join(key): entry for key, entry in table.items()}
    metrics = {name: Metric(entry.mean, entry.low, entry.high) for name, entry in named.items()}
    deviation = lambda entry: None if len(entry.values) < 2 else entry.deviation
    details = {
        "config": recipes.to_dict(config),
        "seeds": {name: {"deviation": deviation(entry), "values": entry.values} for name, entry in named.items()},
        "failed": failed,
        "checkpoints": {cell.row.name: found["checkpoint"] for cell, found in results.items()},
    }
    clips, skipped = (sum(found[name] for found in results.values()) for name in ("clips", "skipped"))
    return Report(metrics, clips, skipped, markdown(config, table, details), details)


def markdown(config: CompareConfig, table: Table, details: dict) -> str:
    """The table, the rows' checkpoints, and what failed. An entry of fewer than all seeds says so."""
    heads = " | ".join(f"{task}: {name}" for task, name in columns(config))
    lines = [f"| pretraining | {heads} |", "|---|" + "--:|" * len(columns(config))]
    for row in config.rows:
        cells = [str(table.get((row.name, *column), "–")) for column in columns(config)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, config.seeds))
    over = f"seeds {seeds}." if len(config.seeds) > 1 else f"seed {seeds} alone."
    lines += ["", f"Mean ± standard deviation over {over}"]
    for name, random in ((row.name, row.random_weights) for row in config.rows if row.name in details["checkpoints"]):
        checkpoint = one_line("{path}, step {step}".format(**details["checkpoints"][name]))
        lines.append(f"- {name}: {'random weights in the sizes of ' if random else ''}{checkpoint}")
    return "\n".join(lines + [f"- failed: {name}: {reason}" for name, reason in details["failed"].items()])


def draw(config: CompareConfig, table: Table) -> np.ndarray:
    """Bars for every metric, a panel for each task."""
    bar = lambda entry: (entry.mean, entry.deviation) if entry else None
    names = [row.name for row in config.rows]
    panels = {
        task.name: {metric: [bar(table.get((name, task.name, metric))) for name in names] for metric in task.figures}
        for task in config.tasks
    }
    return plots.bars(panels, names)
