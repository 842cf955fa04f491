"""The processes of this machine, by who started them."""

import os
import pathlib
import signal
import time


def processes() -> dict[int, tuple[int, bytes]]:
    """Process → the one that started it, and its command line."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
    return found


def below(pid: int) -> set[int]:
    """All processes that one started, and those that these started."""
    known = processes()
    found, fresh = set(), {pid}
    while fresh:
        fresh = {child for child, (parent, _) in known.items() if parent in fresh} - found
        found |= fresh
    return found


def kill_a_worker(root: int, kind: str, within: float = 240) -> int:
    """Kills (-9) a process below `root` that decodes a clip in a process of its own.

    Args:
        root: the process that started all of a cluster.
        kind: in the command line of the process to kill, the decoding process or one above it; '': its parent.
        within: seconds to wait for one.
    """
    until = time.monotonic() + within
    while time.monotonic() < until:
        known = processes()
        for pid in below(root):
            if b"bounded.serve" not in known.get(pid, (0, b""))[1]:
                continue
            victim = pid if kind else known[pid][0]
            while victim in known and kind.encode() not in known[victim][1]:
                victim = known[victim][0]
            if victim in known:
                os.kill(victim, signal.SIGKILL)
                return victim
        time.sleep(0.05)
    raise AssertionError(f"nothing decodes below process {root}")
