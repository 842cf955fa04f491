"""`av_mae COMMAND …` and `python -m av_mae COMMAND …`: the same as `python -m av_mae.COMMAND …`."""

import runpy
import sys

from av_mae import __version__
from av_mae.errors import UserError, check_name

COMMANDS = {
    "prepare": "clips and annotations, or a demo set → a prepared set for training",
    "inspect": "looks at a prepared set, and at what a command skipped",
    "train": "pretraining; goes on from where it was stopped",
    "evaluate": "one downstream task: trains its head where it has one, then measures",
    "view": "writes a page of a run's curves, images, sounds and results",
    "export": "embeddings as Parquet, or the encoder as a program or weights",
    "search": "finds clips by their embeddings",
    "convert": "published PyTorch weights → a checkpoint, and back",
    "benchmark": "timings, FLOPs and memory; plans for TPU pods",
}


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    example = "example: av_mae prepare --dataset=toy_band --output=runs/demo/data/toy_band"
    head = f"av_mae {__version__}: audio-visual masked autoencoders with early fusion"
    return "\n".join([head, "", "usage: av_mae COMMAND [--help] ...", "", *lines, "", example])


def main() -> None:
    """Runs the command that the first argument names; without one the overview is printed."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(__version__ if name == "--version" else overview())
        return
    try:
        check_name("command", name, tuple(COMMANDS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"av_mae {name}", *arguments]
    # As __main__, so that data workers of the command find the module that they belong to.
    runpy.run_module(f"av_mae.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
