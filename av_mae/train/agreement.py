"""What the processes of a run must agree in: code, versions, recipe, and one work directory that all of them share."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from av_mae import recipes
from av_mae.checkpoint import first_difference
from av_mae.console import note
from av_mae.errors import UserError
from av_mae.lock import held
from av_mae.storage import Folder
from av_mae.train.sharding import gather_values

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SEEN_WITHIN = 4.0  # seconds after which every host should see a new file of a shared folder
MOST_SKEW = 2.0  # seconds between two clocks from which on the user is told


@functools.cache
def code_hash() -> str:
    """Hash of the package's source files and of their names."""
    root, digest = pathlib.Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def held_by_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a folder for all processes of this run: the first one does it, see `workdir.held`.

    Raises:
      UserError: another run holds the folder, or the processes do not share it; the same on every process.
    """
    with contextlib.ExitStack() as stack:
        refused = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(held(folder))
            except UserError as error:
                refused = str(error)
        if message := gather_values([refused])[0]:
            raise UserError(message)
        check_shared(Folder(folder))
        yield


def check_shared(folder: Folder) -> None:
    """Looks on every process for a file that the first one has just written into the folder.

    Where hosts have folders of their own under one name, each would keep a part of every checkpoint: none is whole.

    Raises:
      UserError: a process does not see it; the same on every process.
    """
    if jax.process_count() == 1:
        return
    name = f".shared.{gather_values([secrets.token_hex(8)])[0]}"
    written = True
    if jax.process_index() == 0:
        try:
            folder.write(name, b"")
        except OSError:  # the command itself will say so
            written = False
    if not gather_values([written])[0]:
        return
    until, seen = time.monotonic() + SEEN_WITHIN, False
    while not seen and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if folder.is_local:
                os.listdir(folder.url)  # network file systems look again
            seen = folder.exists(name)
        time.sleep(0 if seen else 0.1)
    found = gather_values([(socket.gethostname(), seen)])
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            folder.remove(name)
    for number, (host, seen) in enumerate(found):
        if not seen:
            raise UserError(
                f"{folder} is not one folder for all processes: process {number} on {host} does not see what process 0 "
                f"on {found[0][0]} writes there; name a folder that all hosts share"
            )


def identity(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """What must be alike, as JSON has it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "code": code_hash(),
        "python": platform.python_version(),
        "versions": versions,
        "workdir": str(workdir),
        "config": recipes.to_dict(config),
    }


def check_alike(hosts: Sequence[str], identities: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError that names the first process that is unlike process 0, and in what."""
    for number, theirs in enumerate(identities):
        difference = first_difference(identities[0], theirs)
        if difference is not None:
            name, first, other = difference
            raise UserError(
                f"the processes of a run must be alike, but {name} is {first!r} on process 0 ({hosts[0]}) "
                f"and {other!r} on process {number} ({hosts[number]}): start all with the same command, "
                "code and versions"
            )


def clock_warning(hosts: Sequence[str], clocks: Sequence[float]) -> str:
    """What to say of clocks (s) that were read at the same moment; '' where they agree."""
    slow, fast = clocks.index(min(clocks)), clocks.index(max(clocks))
    skew = clocks[fast] - clocks[slow]
    if skew <= MOST_SKEW:
        return ""
    return (
        f"warning: the clock of process {fast} ({hosts[fast]}) is {skew:.1f} s ahead of that of process {slow} "
        f"({hosts[slow]}): times in logs and checkpoints will not fit together; remote stores refuse clocks that "
        "are minutes off"
    )


def check_processes(config: Any, workdir: pathlib.Path) -> None:
    """Compares all processes of the run; every process must call this before anything that they do together.

    Raises:
      UserError: see `check_alike`; the same on every process.
    """
    if jax.process_count() == 1:
        return
    ours = identity(config, workdir)
    digest = hashlib.sha256(json.dumps(ours).encode()).hexdigest()
    multihost_utils.sync_global_devices("clocks")
    clock = time.time()
    hosts, clocks, digests = zip(*gather_values([(socket.gethostname(), clock, digest)]))
    if len(set(digests)) > 1:
        check_alike(hosts, gather_values([ours]))
    warning = clock_warning(hosts, clocks)
    if warning:
        note(warning)
