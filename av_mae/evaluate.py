"""`python -m av_mae.evaluate`: one evaluation of a checkpoint; prints its table and writes results.json."""

import argparse
import importlib
import pathlib

from av_mae import recipes
from av_mae.config import EvaluationConfig
from av_mae.errors import UserError, run_command

# Each module has run(config, workdir) -> Report; it is imported when asked for.
TASKS = {"reconstruction": "av_mae.evaluation.reconstruction"}


def main(argv: list[str]) -> None:
    """Loads the recipe, runs its task and writes `config.json` and `results.json` into the workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.evaluate", description="Measures a checkpoint on held-out clips.",
        epilog="example: python -m av_mae.evaluate --config=configs/reconstruction.py:demo --workdir=runs/evaluation "
               "--config.init=runs/demo")
    recipes.add_config_argument(parser, EvaluationConfig)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where results.json and pictures go")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    config = recipes.load_recipe(arguments.config, overrides, EvaluationConfig)
    if config.task not in TASKS:
        raise UserError(f"task={config.task!r} must be one of {', '.join(TASKS)}")
    workdir = pathlib.Path(arguments.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        recipes.save(config, workdir / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={arguments.workdir}: {error.strerror}") from error
    report = importlib.import_module(TASKS[config.task]).run(config, workdir)
    report.save(workdir / "results.json")
    print(report.table)


if __name__ == "__main__":
    run_command(main)
