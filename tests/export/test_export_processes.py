"""Exports in processes of their own: killed on the way, several of them, with workers that read."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_export import STREAMS, expected, read, write_checkpoint, write_media, write_set

from av_mae.export import tables

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIPS = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint `run`, a prepared set `set` and media `media`."""
    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "run")
    write_set(folder / "set", CLIPS, broken=(11,))
    write_media(folder / "media", ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"])
    return folder


def start(folder: pathlib.Path, data: str, output: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "av_mae.export",
        f"--checkpoint={folder / 'run'}",
        f"--data={folder / data}",
        f"--output={folder / output}",
        "--batch_size=4",
        "--shard_clips=4",
        *arguments,
    ]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        message = process.communicate(timeout=600)[1]
        assert process.returncode == 0, message


def shards(folder: pathlib.Path, output: str) -> list[pathlib.Path]:
    return sorted((folder / output / tables.FOLDER).glob("*.parquet"))


def assert_same_files(folder: pathlib.Path, ours: str, wanted: str) -> None:
    assert [path.name for path in shards(folder, ours)] == [path.name for path in shards(folder, wanted)] != []
    for path in [*shards(folder, wanted), folder / wanted / "failures.parquet"]:
        assert (folder / ours / path.relative_to(folder / wanted)).read_bytes() == path.read_bytes(), path


def test_killed_twice(folder):
    """SIGKILL after the first shards, twice, each time later: the files are those of an undisturbed export."""
    finish(start(folder, "set:test", "whole", "--workers=0"))
    for count in (2, 5):
        process = start(folder, "set:test", "killed", "--workers=0")
        while len(shards(folder, "killed")) < count and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and len(shards(folder, "killed")) < CLIPS // 4
    finish(start(folder, "set:test", "killed", "--workers=0"))
    assert_same_files(folder, "killed", "whole")
    found, wanted = read(folder / "whole"), expected(folder / "run", folder / "set")
    for stream in STREAMS:
        np.testing.assert_allclose(found[stream], wanted[stream], rtol=0, atol=1e-5)


@pytest.mark.parametrize("data,workers", [("set:test", 2), ("media", 0)])
def test_two_processes_and_workers(folder, data, workers):
    """Each process writes its shards; together they are those of one process without workers."""
    one, two = f"one-{data[:3]}-{workers}", f"two-{data[:3]}-{workers}"
    finish(start(folder, data, one, "--workers=0", "--stride=0.5"))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    finish(
        *(
            start(
                folder,
                data,
                two,
                f"--workers={workers}",
                "--stride=0.5",
                f"--coordinator=localhost:{port}",
                f"--process_id={process}",
                "--process_count=2",
            )
            for process in range(2)
        )
    )
    assert_same_files(folder, two, one)
