"""The folder that a command writes into: made, collected here where it is on a store, its skipped clips listed.

Stores cannot append to a file, and TensorBoard, Matplotlib and Parquet want real ones. So the files of a folder on a
store are collected in one of this machine (a Mirror). What changes there is written to the store every minute, before
each checkpoint and at the end. Checkpoints themselves are not collected: `original` gives the path on the store to
which Orbax writes them.
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from av_mae.errors import ClipFailure, StoreError, UserError
from av_mae.storage import TEMPORARY, Folder, as_path, inside, is_url, replace_file

SKIPPED = "skipped.jsonl"  # clips that a command skipped, in its output folder
EVERY = 60.0  # seconds between looks at what has changed in a Mirror
LARGE = 1e9  # bytes that are fetched without a word
ATTEMPTS, PAUSE = 6, 10.0  # at the end, while the store does not answer; seconds between them
LEFT = ("best", "checkpoints", "checkpoints-damaged", "profile")  # folders that are not fetched
EVENTS = "events.out.tfevents"  # of earlier attempts; each attempt writes a file of its own


def make_workdir(path: str) -> pathlib.Path:
    """Makes the work directory, a path of this machine or on a store that can hold checkpoints.

    Raises:
      UserError: nothing can be written in it.
    """
    workdir = as_path(path)
    try:
        if is_url(path):
            folder, name = Folder(path), f".probe.{secrets.token_hex(4)}"
            folder.write(name, b"")
            folder.remove(name)
            return workdir
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            return workdir
    except StoreError as error:
        raise StoreError(f"--workdir={path}: {error}") from error
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={path}: {error.strerror}; name a folder that you may write to"
        ) from error


_mirrors: list["Mirror"] = []  # those that are open


def is_small(name: str) -> bool:
    """Whether a run that goes on needs this file of its work directory: no checkpoint, event file, plot or sound."""
    return is_shown(name) and "images" not in name.split("/")


def is_shown(name: str) -> bool:
    """Whether the page of a run needs this file of its work directory."""
    *folders, file = name.split("/")
    return not set(LEFT) & set(folders) and not file.startswith(EVENTS)


class Mirror:
    """A local folder that stands for one on a store. A context manager; several processes may have one each.

    Args:
      url: of the folder on the store.
      wanted: which files are fetched at the beginning, by their path in the folder.
      empty: which files are only made, without what they hold.
    """

    def __init__(
        self,
        url: str,
        wanted: Callable[[str], bool] = is_small,
        empty: Callable[[str], bool] = lambda _: False,
    ):
        self.url, self._store = url.rstrip("/"), Folder(url)
        self._wanted, self._empty = wanted, empty
        self._known: dict[str, tuple[int, int]] = {}
        self._turn, self._ended, self._warned = threading.Lock(), threading.Event(), False

    def __enter__(self) -> pathlib.Path:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="av_mae-"))
        try:
            self._pull()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._known = self._stamps()
        _mirrors.append(self)
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()
        return self.folder

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Writes what is left. Where the store does not take it the folder stays: StoreError, or beside `error` a line.

        An interruption is told the same way.
        """
        left = f"{self.url} does not take the last files of this run: they are in {self.folder}, copy them"
        self._ended.set()
        _mirrors.remove(self)
        try:
            self._thread.join()
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(PAUSE)
                if self.push():
                    shutil.rmtree(self.folder, ignore_errors=True)
                    return
        except BaseException:
            _warn(f"warning: {left}")
            raise
        if error is None:
            raise StoreError(left)
        _warn(f"warning: {left}")

    def push(self) -> bool:
        """Writes what has changed to the store; says once where that fails, and returns whether all is there."""
        with self._turn:
            now = self._stamps()
            try:
                for name, stamp in now.items():
                    if self._known.get(name) != stamp:
                        with contextlib.suppress(FileNotFoundError):  # removed just now: the next push removes it there
                            self._put(name)
                        self._known[name] = stamp
                for name in set(self._known) - set(now):
                    self._store.remove(name)
                    del self._known[name]
            except (OSError, UserError) as error:  # also a bucket that is gone
                if not self._warned:
                    print(f"warning: {error}; the work goes on, its files are in {self.folder} until the store "
                          "answers", file=sys.stderr, flush=True)  # fmt: skip
                self._warned = True
                return False
            if self._warned:
                print(f"{self.url} answers again: all files are written", file=sys.stderr, flush=True)
            self._warned = False
            return True

    def _put(self, name: str) -> None:
        """Writes a file by way of a copy: drivers fail where a large one, e.g. of metrics, grows meanwhile.

        What grows is never as large as shards of an export, which come here whole.
        """
        source, copy = self.folder / name, self.folder / f".put{TEMPORARY}"
        try:
            with contextlib.suppress(OSError):  # a full disk
                if source.stat().st_size < LARGE:
                    source = shutil.copyfile(source, copy)
            self._store.put(source, name, keep=True)
        finally:
            copy.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self.push()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file that is whole."""
        stamps = {}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (pathlib.Path(parent, name) for name in files):
                if not path.name.startswith(".") and not path.name.endswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # replaced just now
                        status = path.stat()
                        stamps[path.relative_to(self.folder).as_posix()] = status.st_size, status.st_mtime_ns
        return stamps

    def _pull(self) -> None:
        sizes = {name: entry["size"] for name, entry in self._store.details().items() if self._wanted(name)}
        needed = sum(size for name, size in sizes.items() if not self._empty(name))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.url} holds {needed / 1e9:.1f} GB to begin with, {self.folder.parent} has {free / 1e9:.1f} GB "
                "left: name a folder of its own for this output, or another TMPDIR"
            )
        if needed > LARGE:
            _warn(f"fetching {needed / 1e9:.1f} GB that {self.url} holds already to {self.folder}")
        for name in sorted(sizes):
            path = inside(self.folder, name)
            if self._empty(name):
                path.touch()
                continue
            try:
                self._store.fetch(name, path)
            except FileNotFoundError:  # removed since it was listed
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def collected(folder: str | os.PathLike[str], wanted: Callable[[str], bool] = is_small) -> Iterator[pathlib.Path]:
    """The local folder that a command writes into: `folder` itself, or a Mirror where that is on a store.

    Raises:
      StoreError: the store cannot be reached, at the beginning or at the end.
    """
    if not is_url(folder):
        yield pathlib.Path(folder)
        return
    with Mirror(os.fspath(folder), wanted) as local:
        yield local


def original(path: pathlib.Path) -> pathlib.Path:
    """The path that `path` stands for: the one on the store where a Mirror collects its files, else itself."""
    name = named(path)
    return path if name == os.fspath(path) else as_path(name)


def named(path: pathlib.Path) -> str:
    """As `original`, to be read by people: the path or the URL, of any store."""
    for mirror in _mirrors:
        if path.is_relative_to(mirror.folder):
            inside = path.relative_to(mirror.folder).as_posix()
            return mirror.url if inside == "." else f"{mirror.url}/{inside}"
    return os.fspath(path)


def push() -> None:
    """Writes what has changed in all mirrors to their stores."""
    for mirror in _mirrors:
        mirror.push()


def no_links(name: str, flags: int) -> int:
    """An opener for files that are appended to: where a link lies instead of the file, it fails.

    A folder from elsewhere may hold links to any file of the user's.
    """
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`; lines that are no JSON, as a killed run may leave one, are passed over."""
    lines = []
    for line in pathlib.Path(path).read_text().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return lines


def last_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that the lines of `read_metrics` say of their last step; empty where there are none."""
    known = [line for line in lines if isinstance(line, dict) and "step" in line]
    return {name: x for line in known if line["step"] == known[-1]["step"] for name, x in line.items()}


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
