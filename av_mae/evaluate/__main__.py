"""`python -m av_mae.evaluate`: one evaluation of a checkpoint; prints its table and writes results.json."""

import argparse
import importlib
import pathlib

import jax

from av_mae import recipes
from av_mae.config import EvaluationConfig
from av_mae.console import quiet_libraries
from av_mae.errors import SkippedFile, UserError, run_command
from av_mae.evaluate.config import CONFIGS, CompareConfig
from av_mae.model_card import add_evaluation
from av_mae.train.hosts import add_process_arguments, check_processes, joined

# Each module has run(config, workdir) -> Report; it is imported when asked for.
TASKS = {
    "reconstruction": "av_mae.evaluate.reconstruction",
    "compare": "av_mae.evaluate.compare",
    **{task: "av_mae.evaluate.task" for task in CONFIGS},
}
KINDS = {"reconstruction": EvaluationConfig, "compare": CompareConfig, **CONFIGS}


def kind_of(values: dict) -> type:
    """The dataclass of a recipe, by its task. Raises UserError for an unknown task."""
    task = values.get("task")
    if task not in KINDS:
        raise UserError(f"task={task!r} must be one of {', '.join(KINDS)}")
    return KINDS[task]


def main(argv: list[str]) -> None:
    """Loads the recipe, runs its task and writes `config.json` and `results.json` into the workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.evaluate",
        description="Measures a checkpoint on held-out clips; a task with a head trains it first. Resumes by itself.",
        epilog="example: python -m av_mae.evaluate --config=configs/reconstruction.py:demo --workdir=runs/evaluation "
        "--config.init=runs/demo",
    )
    recipes.add_config_argument(parser, *KINDS.values())
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where results.json and pictures go, and the checkpoints of a head",
    )
    add_process_arguments(parser)
    arguments, overrides = recipes.parse_arguments(parser, argv)
    config = recipes.load_recipe(arguments.config, overrides, kind_of)
    quiet_libraries()
    workdir = pathlib.Path(arguments.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        recipes.save(config, workdir / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={arguments.workdir}: {error.strerror}") from error
    with joined(arguments):
        check_processes(config, workdir.absolute())
        report = importlib.import_module(TASKS[config.task]).run(config, workdir)
        if jax.process_index() == 0:
            report.save(workdir / "results.json")
            SkippedFile(workdir).add(report.failures)
            if not isinstance(config, CompareConfig):  # a comparison is of several runs
                add_evaluation(config.init, workdir, config.task, config.data.path, report)
            print(report.table)


if __name__ == "__main__":
    run_command(main)
