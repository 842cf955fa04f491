"""The folder that a command writes into: made, held by one run at a time, its files written, its skipped clips listed.

The holder's name lies in `.lock.json` in the folder. A process that ends takes the file away; one that is killed leaves
it, and the next run sees that nobody holds it any more: on the same machine because the process is gone, on others
because its signs of life (the file's time) have ended.
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from av_mae.errors import RESTART, ClipFailure, UserError, check_local
from av_mae.storage import replace_file

LOCK = ".lock.json"
SKIPPED = "skipped.jsonl"  # clips that a command skipped, in its output folder
HEARTBEAT = 10.0  # seconds between signs of life
STALE = 90.0  # seconds without one after which a process of another machine counts as dead
HOLDER = {"host": str, "pid": int, "system": str, "started": str, "since": float}


def make_workdir(path: str) -> pathlib.Path:
    """Makes the work directory. Raises UserError where nothing can be written in it."""
    check_local("--workdir", path)
    workdir = pathlib.Path(path).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            return workdir
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={path}: {error.strerror}; name a folder that you may write to"
        ) from error


def no_links(name: str, flags: int) -> int:
    """An opener for files that are appended to: where a link lies instead of the file, it fails.

    A folder from elsewhere may hold links to any file of the user's.
    """
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def read_skipped(folder: str | os.PathLike[str]) -> list[ClipFailure]:
    """What `skipped.jsonl` in a folder holds; lines that were cut off are left out. Empty where there is no file."""
    try:
        lines = (pathlib.Path(folder) / SKIPPED).read_text(errors="replace").splitlines()
    except OSError:
        return []
    failures = []
    for line in lines:
        try:
            found = json.loads(line)
            failures.append(ClipFailure(*(str(found[name]) for name in ("clip", "stage", "cause"))))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return failures


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class SkippedFile:
    """`skipped.jsonl` in a local folder: a line per failed clip, stage and cause. Each comes once.

    Where the file cannot be written, e.g. on a full disk, `say` gets one warning and the work goes on.
    """

    def __init__(self, folder: str | os.PathLike[str], say: Callable[[str], None] = _warn):
        self._path, self._say, self._warned = pathlib.Path(folder) / SKIPPED, say, False
        self._known = set(read_skipped(folder))

    def add(self, failures: Iterable[ClipFailure]) -> None:
        """Appends what the file does not hold yet."""
        new = [failure for failure in dict.fromkeys(failures) if failure not in self._known]
        if not new:
            return
        self._known.update(new)
        try:
            with open(self._path, "ab+", opener=no_links) as file:
                whole = file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
                lines = "".join(json.dumps(failure.to_json()) + "\n" for failure in new)
                file.write((lines if whole else "\n" + lines).encode())
        except OSError as error:
            if not self._warned:
                self._say(f"warning: {self._path} cannot be written ({error.strerror or error}); the work goes on")
            self._warned = True


def write_skipped(
    folder: str | os.PathLike[str], failures: Iterable[ClipFailure], say: Callable[[str], None] = _warn
) -> None:
    """Writes `skipped.jsonl` anew, empty where nothing failed. A full disk is warned of."""
    path = pathlib.Path(folder) / SKIPPED
    try:
        replace_file(path, "")
    except OSError as error:
        say(f"warning: {path} cannot be written ({error.strerror or error}); the work goes on")
        return
    SkippedFile(folder, say).add(failures)


@contextlib.contextmanager
def held(folder: str | os.PathLike[str], beside: bool = False) -> Iterator[None]:
    """Holds a folder, which is made where it is missing, for this process alone. A store (URL) is not held.

    Where the lock cannot be written (a full disk) the run goes on without it, with a warning.

    Args:
      folder: the folder.
      beside: whether the lock lies beside the folder, which the command puts in its place as a whole.

    Raises:
      UserError: another process holds the folder; the message says which.
    """
    if "://" in os.fspath(folder):
        yield
        return
    folder, own = pathlib.Path(folder).absolute(), _describe()
    path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
    ended, new = threading.Event(), not path.parent.exists()
    problem = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, own, folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        if os.access(path.parent, os.W_OK):  # else the command itself will say that it cannot write
            message = f"warning: {path} cannot be written ({problem}): nothing keeps others out of this folder"
            print(message, file=sys.stderr, flush=True)
        yield
        return
    beat = threading.Thread(target=_show_life, args=(path, own, ended), name="workdir", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(OSError), _locked(path) as file:
            if _read(file) == own:
                path.unlink()
            if new:
                path.parent.rmdir()  # where nothing was written


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
        with open(path, "a+", opener=no_links) as file:
            with contextlib.suppress(OSError):  # some network file systems have no flock
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:  # else its holder has just taken it away
                yield file
                return


def _read(file: TextIO) -> dict[str, Any]:
    """The holder that the file names; empty where it names none, as in a damaged file."""
    file.seek(0)
    try:
        found = json.loads(file.read(10_000))
        known = {name: kind(found[name]) for name, kind in HOLDER.items()}
        datetime.datetime.fromtimestamp(known["since"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError):
        return {}
    return known if 0 < known["pid"] < 2**31 else {}


def _take(path: pathlib.Path, own: dict[str, Any], folder: pathlib.Path) -> None:
    with _locked(path) as file:
        holder = _read(file)
        with tempfile.TemporaryFile(dir=path.parent) as now:  # the time of the file's machine, whatever ours says
            silent = os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
        if holder and _lives(holder, own, silent):
            since = datetime.datetime.fromtimestamp(holder["since"]).isoformat(" ", "seconds")
            raise UserError(
                f"{folder} is held by process {holder['pid']} on {holder['host']} since {since}: wait "
                "for its end, stop it, or name another folder"
            )
        file.truncate(0)
        try:
            file.write(json.dumps(own))
            file.flush()
        except OSError:
            path.unlink()
            raise


def _lives(holder: dict[str, Any], own: dict[str, Any], silent: float) -> bool:
    """Whether the holder still works, `silent` seconds after its last sign of life."""
    if holder["system"] != own["system"]:
        return abs(silent) < STALE  # a time to come is no sign of life either
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        pass  # another user's
    except OSError:
        return False
    return _started(holder["pid"]) == holder["started"]


def _show_life(path: pathlib.Path, own: dict[str, Any], ended: threading.Event) -> None:
    """Gives signs of life; ends the process where another has taken the folder over, e.g. after a long suspension."""
    while not ended.wait(HEARTBEAT):
        try:
            with path.open(errors="replace") as file:
                holder = _read(file)
            if holder == own:
                os.utime(path)
                continue
        except OSError:  # a file system that is away for a moment
            continue
        if holder and not ended.is_set():
            print(f"error: process {holder['pid']} on {holder['host']} has taken {path.parent} over; "
                  "this one ends", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(RESTART)
