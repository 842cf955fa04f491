"""Dry runs of the launchers: what they would do, word by word."""

import os
import pathlib
import shlex
import subprocess

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
TRAIN = ["--config=configs/pretrain.py:base", "--workdir=/nfs/a b", "--config.seed=3"]


def dry(folder: pathlib.Path, script: str, *options: str, train: list[str] = TRAIN) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a dry run in a folder; nothing but bash may be needed."""
    command = ["bash", str(LAUNCH / script), "--dry-run", "--logs=/logs", *options, *(["--", *train] if train else [])]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def words(text: str) -> list[list[str]]:
    """The lines of a dry run as a shell reads them."""
    return [shlex.split(line) for line in text.splitlines()]


def train_words(command: str) -> list[str]:
    """The arguments of av_mae.train in a command that a host runs."""
    return shlex.split(command.partition("launch/host.sh ")[2])
