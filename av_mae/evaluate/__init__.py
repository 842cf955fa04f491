"""Evaluations of a checkpoint: a module per task, all entered in `task.TASKS`; `compare` is a table of several."""

import importlib


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.evaluate`."""
    importlib.import_module(f"{__name__}.__main__").main(argv)  # which stands above all else in this folder
