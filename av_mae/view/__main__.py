"""`python -m av_mae.view`: a local page of a run's curves, pictures, sounds and figures. It only reads."""

import argparse
import pathlib

from av_mae.errors import UserError, run_command
from av_mae.view.page import MARKS, Workdir
from av_mae.view.server import Server

PORT = 6008  # TensorBoard's is 6006
PORTS = range(65536)


def open_workdir(path: str) -> Workdir:
    """The work directory to show. Raises UserError where it is none, or holds no run."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise UserError(f"--workdir={path} must be a folder; there is none of that name")
    workdir = Workdir(folder)
    if not workdir.runs():
        raise UserError(
            f"--workdir={path} holds no run: neither it nor a folder in it has {' or '.join(MARKS)}; name "
            "the --workdir of av_mae.train or av_mae.evaluate, or a folder of several"
        )
    return workdir


def open_server(workdir: Workdir, port: int) -> Server:
    """The server, listening. Raises UserError for a port that cannot be had."""
    if port not in PORTS:
        raise UserError(f"--port={port} must be between 0 (any that is free) and {PORTS[-1]}")
    try:
        return Server(workdir, port)
    except OSError as error:
        raise UserError(
            f"cannot listen at --port={port}: {error.strerror}; name another, or 0 for any that is free"
        ) from error


def main(argv: list[str]) -> None:
    """Opens the page of a work directory and serves it until the process is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.view",
        description="Serves a local page of a run, or of all runs in a folder: curves, reconstructions, heat maps, "
        "separated sounds, results. It only reads, and only this machine can open it.",
        epilog="example: python -m av_mae.view --workdir=runs/demo    on another machine: ssh -L 6008:localhost:6008 "
        "HOST, then open http://localhost:6008",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run's work directory, or a folder of several"
    )
    parser.add_argument("--port", type=int, default=PORT, help="port to listen at (%(default)s); 0 takes a free one")
    arguments = parser.parse_args(argv)
    with open_server(open_workdir(arguments.workdir), arguments.port) as server:
        print(f"{server.url} shows {arguments.workdir}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    run_command(main)
