"""`python -m av_mae.evaluate`: one evaluation of a checkpoint; prints its table and writes results.json."""

import argparse
from collections.abc import Mapping
from typing import Any

import jax

from av_mae import recipes
from av_mae.config import DataConfig
from av_mae.data.copies import copy_sets
from av_mae.errors import CHECKPOINT_STORES, LASTING_STORES, run_command
from av_mae.evaluate import compare, run
from av_mae.evaluate.task import TASKS, task_class
from av_mae.model_card import add_evaluation
from av_mae.train.agreement import check_processes, held_by_run
from av_mae.train.hosts import joined
from av_mae.train.run import read_command
from av_mae.workdir import SkippedFile, collected, make_workdir

URLS = {  # options that take those of stores
    "--workdir": CHECKPOINT_STORES,
    "--config.init": CHECKPOINT_STORES,
    "--config.data.path": LASTING_STORES,
    "--config.test_path": LASTING_STORES,
}


def kind_of(values: Mapping[str, Any]) -> type:
    """The dataclass of a recipe, by its task. Raises UserError for an unknown task."""
    task = values.get("task")
    return compare.CompareConfig if task == "compare" else task_class(task).config_class


def main(argv: list[str]) -> None:
    """Loads the recipe, runs its task and writes `config.json` and `results.json` into the workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.evaluate",
        description="Measures a checkpoint on held-out clips; a task with a head trains it first. Resumes by itself.",
        epilog="example: python -m av_mae.evaluate --config=configs/reconstruction.py:demo --workdir=runs/evaluation "
        "--config.init=runs/demo",
    )
    kinds = [*(task_class(name).config_class for name in TASKS), compare.CompareConfig]
    output = "where results.json and images/ go, and the checkpoints of a head"
    arguments, config = read_command(parser, argv, output, kind_of, kinds)
    absolute = make_workdir(arguments.workdir)
    with joined(arguments):
        check_processes(config, absolute)
        with held_by_run(absolute), collected(arguments.workdir) as workdir:
            if jax.process_index() == 0:
                recipes.save(config, workdir / "config.json")
            compared = isinstance(config, compare.CompareConfig)
            if not compared:
                test_sets = DataConfig(path=getattr(config, "test_path", "")).paths
                copy_sets([*DataConfig(path=config.data.path).paths, *test_sets], config.data.local)
            report = (compare if compared else run).run(config, workdir)
            if jax.process_index() == 0:
                report.save(workdir / "results.json")
                SkippedFile(workdir).add(report.failures)
                if not compared:  # a comparison is of several runs
                    add_evaluation(config.init, arguments.workdir, config.task, config.data.path, report)
                print(report.table)


if __name__ == "__main__":
    run_command(main, URLS)
