"""`python -m av_mae.view`: writes one page of a run's curves, images, sounds and results into its work directory."""

import argparse
import os
import pathlib
import tempfile
import webbrowser

from av_mae.errors import UserError, run_command
from av_mae.view import RUN_FILES, Workdir
from av_mae.view.page import PAGE_FILE, page


def write_page(folder: str) -> pathlib.Path:
    """Writes `view.html` into a work directory, in the place of an older one, and returns its path.

    Raises:
      UserError: the folder is missing, holds no run, or cannot be written to.
    """
    workdir = Workdir(folder)
    if not workdir.root.is_dir():
        raise UserError(f"--workdir={folder} must be a folder; there is none of that name")
    names = workdir.runs()
    if not names:
        raise UserError(
            f"--workdir={folder} holds no run: neither it nor a folder in it has {' or '.join(RUN_FILES)}; name "
            "the --workdir of av_mae.train or av_mae.evaluate, or a folder of several"
        )
    path = workdir.root / PAGE_FILE
    try:
        # A new file takes the page's name: what a link of that name leads to is not written to.
        with tempfile.NamedTemporaryFile(dir=workdir.root, prefix=".view_", delete=False) as file:
            file.write(page(workdir, names))
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def main(argv: list[str]) -> None:
    """Writes the page of a work directory."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.view",
        description=f"Writes {PAGE_FILE} into a work directory: curves, reconstructions, heat maps, separated sounds, "
        "results and skipped clips of a run, or of all runs in a folder. The page shows the run as it is now.",
        epilog="example: python -m av_mae.view --workdir=runs/demo --open    curves that move: tensorboard "
        "--logdir=runs/demo",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run's work directory, or a folder of several"
    )
    parser.add_argument("--open", action="store_true", help="also open the page in the browser")
    arguments = parser.parse_args(argv)
    path = write_page(arguments.workdir)
    print(path)
    if arguments.open and not webbrowser.open(path.as_uri()):
        print("there is no browser here: open the page yourself")


if __name__ == "__main__":
    run_command(main)
