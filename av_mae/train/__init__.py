"""Pretraining, and the training of heads: the compiled step, the loop and its hooks, meshes and hosts."""

import importlib


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.train`."""
    importlib.import_module(f"{__name__}.__main__").main(argv)  # which stands above all else in this folder
