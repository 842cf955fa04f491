"""A folder is held by one run at a time: `.lock.json` in it names the process.

A process that ends takes the file away; one that is killed leaves it, and the next run sees that nobody holds the
folder any more: on the same machine because the process is gone; on others because no sign of life comes (the file's
time, on a store a number in it), for which it waits.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from av_mae.errors import RESTART, UserError, one_line
from av_mae.storage import Folder, is_url
from av_mae.workdir import no_links

LOCK = ".lock.json"
HEARTBEAT = 10.0  # seconds between signs of life
STALE = 90.0  # seconds without one after which a process of another machine counts as dead
SETTLED = 2.0  # seconds after which a lock on a store is looked at again: another may have written at the same time
LONGEST = 10_000  # characters of a lock that are looked at
HOLDER = {"host": str, "pid": int, "system": str, "started": str, "since": float}


@contextlib.contextmanager
def held(folder: str | os.PathLike[str], beside: bool = False) -> Iterator[None]:
    """Holds a folder, which is made where it is missing, for this process alone.

    Where the lock cannot be written (a full disk) the run goes on without it, with a warning.

    Args:
      folder: the folder, a path or the URL of one on a store.
      beside: whether the lock lies beside the folder, which the command puts in its place as a whole.

    Raises:
      UserError: another process holds the folder; the message says which.
    """
    lock = StoreLock(Folder(folder)) if is_url(folder) else FileLock(pathlib.Path(folder).absolute(), beside)
    try:
        _take_when_free(lock)
    except OSError as error:
        if isinstance(lock, StoreLock) or os.access(lock.path.parent, os.W_OK):  # else the command itself will say so
            problem = error.strerror or error
            message = f"warning: {lock} cannot be written ({problem}): nothing keeps others out of this folder"
            print(message, file=sys.stderr, flush=True)
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_show_life, args=(lock, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(OSError):
            lock.release()


class FileLock:
    """The lock of a folder of this machine, or of a file system that several machines share."""

    def __init__(self, folder: pathlib.Path, beside: bool):
        self.folder, self.own = folder, _describe()
        self.path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
        self._new = not self.path.parent.exists()
        self._seen: float | None = None  # the time of the file, when another's sign of life was looked for

    def __str__(self) -> str:
        return str(self.path)

    def take(self) -> dict[str, Any] | None:
        """Takes the lock, or returns who holds it and may be dead. Raises UserError where it is held; OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path) as file:
            holder = _parse(_content(file))
            with tempfile.TemporaryFile(dir=self.path.parent) as now:  # the time of the file's machine
                stamp = os.fstat(file.fileno()).st_mtime
                silent = os.fstat(now.fileno()).st_mtime - stamp
            if holder and holder["system"] == self.own["system"]:
                if _lives(holder):
                    raise _refused(self.folder, holder)
            elif holder and abs(silent) < STALE:  # a time to come is no sign of life either
                if self._seen not in (None, stamp):
                    raise _refused(self.folder, holder)
                self._seen = stamp
                return holder
            file.truncate(0)
            try:
                file.write(json.dumps(self.own))
                file.flush()
            except OSError:
                self.path.unlink()
                raise
        return None

    def show_life(self) -> dict[str, Any]:
        """Renews the sign of life; returns the holder, another one where the lock was taken over. Raises OSError."""
        with self.path.open(errors="replace") as file:
            holder = _parse(_content(file))
        if holder == self.own:
            os.utime(self.path)
        return holder

    def release(self) -> None:
        """Takes the lock away. Raises OSError."""
        with _locked(self.path) as file:
            if _parse(_content(file)) == self.own:
                self.path.unlink()
            if self._new:
                self.path.parent.rmdir()  # where nothing was written


class StoreLock:
    """The lock of a folder on a store. Its sign of life is a number that grows: clocks of machines differ."""

    def __init__(self, folder: Folder):
        self.folder, self.own, self._beats = folder, _describe(), 0
        self._seen: tuple[float, str] | None = None  # when the first look was, and what was there

    def __str__(self) -> str:
        return self.folder.path(LOCK)

    def take(self) -> dict[str, Any] | None:
        """As FileLock.take."""
        text = self._text()
        holder = _parse(text)
        if holder and holder["system"] == self.own["system"]:
            if _lives(holder):
                raise _refused(self.folder, holder)
        elif holder:
            self._seen = self._seen or (time.monotonic(), text)
            if text != self._seen[1]:
                raise _refused(self.folder, holder)
            if time.monotonic() < self._seen[0] + STALE:
                return holder
        self._write()
        time.sleep(SETTLED)
        holder = _parse(self._text())
        if holder and holder != self.own:
            raise _refused(self.folder, holder)
        return None

    def show_life(self) -> dict[str, Any]:
        """As FileLock.show_life."""
        holder = _parse(self._text())
        if holder == self.own:
            self._write()
        return holder

    def release(self) -> None:
        """As FileLock.release."""
        if _parse(self._text()) == self.own:
            self.folder.remove(LOCK)

    def _text(self) -> str:
        try:
            return self.folder.read(LOCK).decode(errors="replace")[:LONGEST]
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        self._beats += 1
        self.folder.write(LOCK, json.dumps(self.own | {"beats": self._beats}).encode())


def _take_when_free(lock: FileLock | StoreLock) -> None:
    """Takes a lock whose holder does not live; where only its signs of life can tell, waits for one, STALE at most."""
    told = False
    while (holder := lock.take()) is not None:
        if not told:
            print(
                f"{lock.folder} was held by process {holder['pid']} on {holder['host']}; waiting up to {STALE:.0f} s "
                "to see whether that still works",
                file=sys.stderr,
                flush=True,
            )
        told = True
        time.sleep(1.0)


def _refused(folder: object, holder: dict[str, Any]) -> UserError:
    since = datetime.datetime.fromtimestamp(holder["since"]).isoformat(" ", "seconds")
    return UserError(
        f"{folder} is held by process {holder['pid']} on {holder['host']} since {since}: wait for its end, stop it, or "
        "name another folder"
    )


def _describe() -> dict[str, Any]:
    """Who this process is. `system` tells whether process numbers mean the same: one boot, one container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        system = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        system = socket.gethostname()
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "system": system, "started": _started(pid), "since": time.time()}


def _started(pid: int) -> str:
    """When a process began, in the kernel's own count; numbers of processes come again. '' where that is not known.

    'ended' for one that its parent has not yet asked for its status.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if stat[0] in "ZX" else stat[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[TextIO]:
    """The file at `path`, made where it is missing, that nobody else reads or writes meanwhile."""
    while True:
        with open(path, "a+", errors="replace", opener=no_links) as file:
            with contextlib.suppress(OSError):  # some network file systems have no flock
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:  # else its holder has just taken it away
                yield file
                return


def _content(file: TextIO) -> str:
    file.seek(0)
    return file.read(LONGEST)


def _parse(text: str) -> dict[str, Any]:
    """The holder that a lock names; empty where it names none, as in a damaged file."""
    try:
        found = json.loads(text)
        known = {name: kind(found[name]) for name, kind in HOLDER.items()}
        datetime.datetime.fromtimestamp(known["since"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError):
        return {}
    known["host"] = one_line(known["host"])  # it is printed
    return known if 0 < known["pid"] < 2**31 else {}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether a holder of this machine still works."""
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        pass  # another user's
    except OSError:
        return False
    return _started(holder["pid"]) == holder["started"]


def _show_life(lock: FileLock | StoreLock, ended: threading.Event) -> None:
    """Gives signs of life; ends the process where another has taken the folder over, e.g. after a long suspension."""
    while not ended.wait(HEARTBEAT):
        try:
            holder = lock.show_life()
        except (OSError, UserError):  # a file system, store or bucket that is away for a moment
            continue
        if holder and holder != lock.own and not ended.is_set():
            print(
                f"error: process {holder['pid']} on {holder['host']} has taken {lock.folder} over; this one ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(RESTART)
