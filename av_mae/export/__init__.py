"""What leaves the package: embeddings in tables, encoders as programs, and the index that searches embeddings."""

import importlib


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.export`."""
    importlib.import_module(f"{__name__}.__main__").main(argv)  # which stands above all else in this folder
