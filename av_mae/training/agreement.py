"""What all processes of a run must have alike: recipe, work directory, code and versions; and their clocks."""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from av_mae import recipes
from av_mae.errors import UserError
from av_mae.training.checkpoint import first_difference, note
from av_mae.training.mesh import gather_texts

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MOST_SKEW = 2.0  # seconds between two clocks from which on the user is told


@functools.cache
def code_hash() -> str:
    """Hash of the package's source files and of their names."""
    root, digest = pathlib.Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def identity(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """What must be alike, as JSON has it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"code": code_hash(), "python": platform.python_version(), "versions": versions, "workdir": str(workdir),
            "config": recipes.to_dict(config)}


def check_alike(hosts: Sequence[str], identities: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError that names the first process that is unlike process 0, and in what."""
    for number, theirs in enumerate(identities):
        difference = first_difference(identities[0], theirs)
        if difference is not None:
            name, first, other = difference
            raise UserError(f"the processes of a run must be alike, but {name} is {first!r} on process 0 ({hosts[0]}) "
                            f"and {other!r} on process {number} ({hosts[number]}): start all with the same command, "
                            "code and versions")


def clock_warning(hosts: Sequence[str], clocks: Sequence[float]) -> str:
    """What to say of clocks (s) that were read at the same moment; '' where they agree."""
    slow, fast = clocks.index(min(clocks)), clocks.index(max(clocks))
    skew = clocks[fast] - clocks[slow]
    if skew <= MOST_SKEW:
        return ""
    return (f"warning: the clock of process {fast} ({hosts[fast]}) is {skew:.1f} s ahead of that of process {slow} "
            f"({hosts[slow]}): times in logs and checkpoints will not fit together; remote stores refuse clocks that "
            "are minutes off")


def check_processes(config: Any, workdir: pathlib.Path) -> None:
    """Compares all processes of the run; every process must call this before anything that they do together.

    Raises:
      UserError: see `check_alike`; the same on every process.
    """
    if jax.process_count() == 1:
        return
    ours = json.dumps(identity(config, workdir))
    multihost_utils.sync_global_devices("clocks")
    clock = time.time()
    seen = [json.loads(text) for text in gather_texts(
        [json.dumps([socket.gethostname(), clock, hashlib.sha256(ours.encode()).hexdigest()])])]
    hosts, clocks, hashes = zip(*seen)
    if len(set(hashes)) > 1:
        check_alike(hosts, [json.loads(text) for text in gather_texts([ours])])
    warning = clock_warning(hosts, clocks)
    if warning:
        note(warning)
