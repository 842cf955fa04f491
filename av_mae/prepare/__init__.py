"""From a data set's clips to a prepared set: decoding in processes of their own, shards, report."""

import importlib


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.prepare`."""
    importlib.import_module(f"{__name__}.__main__").main(argv)  # which stands above all else in this folder
