"""A real store on this machine: a GCS server on the loopback interface, spoken to by the same clients as Google's."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import fsspec
from train_processes import ROOT, free_port

BUCKET = "bucket"
# Read when gcsfs is imported, which then speaks gRPC to learn what kind of bucket it has; this server speaks HTTP.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Server:
    """gcs_server.py with its objects in a folder, so that it can vanish and come back."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self.port = folder, free_port()
        self._process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For the clients: gcsfs and TensorStore."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "FSSPEC_GCS_TOKEN": "anon",  # else every thread looks for credentials
        }

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        command = [f"--data-dir={self._folder}", "start", "--host=127.0.0.1", f"--port={self.port}"]
        with open(os.devnull, "w") as nothing:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "gcs_server.py"), *command], stdout=nothing, stderr=nothing
            )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def stop(self) -> None:
        """The store vanishes; its objects stay."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Server]:
    """A server with an empty bucket; this process' clients speak to it."""
    server, before = Server(folder), dict(os.environ)
    server.start()
    os.environ.update(server.environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    try:
        fsspec.filesystem("gs").mkdir(BUCKET)
        yield server
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
