"""Folders on this machine or on any store that fsspec knows (gs://, s3://, memory://, …), by one small interface.

`as_path` is the one place where text becomes a path that checkpoints lie at.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any, cast

from av_mae.errors import CHECKPOINT_STORES, STORES, StoreError, UserError, check_local, one_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TEMPORARY = ".part"  # the ending of a file that is being written
_EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text names a folder on a store, or none of this machine's at least."""
    return "://" in os.fspath(text)


def as_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """An absolute path of this machine, or one on a store that can hold checkpoints (gs://), with the same methods.

    Raises:
      UserError: the text is the URL of another store or has an odd name, or the store's driver is missing.
    """
    if not is_url(text):
        return pathlib.Path(text).absolute()
    check_local("path", os.fspath(text), CHECKPOINT_STORES)
    folder = Folder(text)
    bucket, *names = folder.url.partition("://")[2].split("/")
    if set(folder.url) & set("*?[") or {"", ".", ".."} & {bucket, *names}:
        raise UserError(f"{folder}: a name with *, ? or [ would stand for others too, and //, . or .. for another one: "
                        "name another folder")  # fmt: skip
    folder.connect()
    from etils import epath

    return cast(pathlib.Path, epath.Path(folder.url))


def remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder with all in it, a path of this machine or one of `as_path`; what fails is left."""
    if is_url(folder):
        with contextlib.suppress(Exception):  # each driver has errors of its own
            cast(Any, folder).rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a folder with all in it; both are of this machine, or on one store. Raises OSError."""
    if not is_url(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    with reached(source):
        system = Folder(source)._system
        system.mv(os.fspath(source), os.fspath(target), recursive=True)
        system.invalidate_cache()


@contextlib.contextmanager
def fetched(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder of this machine with the files of one of `as_path`: itself, or a copy for as long as it is needed."""
    if not is_url(folder):
        yield folder
        return
    store = Folder(folder)
    with tempfile.TemporaryDirectory(prefix="av_mae-") as copy:
        names = store.files()
        for name in names:
            store.fetch(name, inside(pathlib.Path(copy), name))
        yield pathlib.Path(copy, "." if names else "nothing")


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file that a store names, its folder made. Raises UserError where the name leads out of `folder`."""
    path = folder / name
    try:
        if ".." in name.split("/") or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the store holds an object named {name!r}, which leads out of its folder: remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise FileExistsError(errno.EEXIST, "a folder has this name")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"the store's object {name!r} can be no file here ({error.strerror}): remove it") from error
    return path


def put_tree(source: pathlib.Path, url: str) -> None:
    """Copies a file, or a folder with all in it, to a store; of a folder the files at its top come last.

    Raises:
      StoreError: the store does not take them.
    """
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    for path in sorted(files, key=lambda path: (-len(path.parts), path)):
        inside = path.relative_to(source).as_posix() if source.is_dir() else ""
        folder, _, name = f"{url.rstrip('/')}/{inside}".rstrip("/").rpartition("/")
        Folder(folder).put(path, name, keep=True)


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all, instead of the one that is there; a link is replaced and not followed.

    Several processes, also of several machines, may write the same file: the last one's stays.

    Raises:
      OSError: it cannot be written.
    """
    if is_url(path):
        folder, _, name = os.fspath(path).rpartition("/")
        Folder(folder).write(name, content.encode() if isinstance(content, str) else content)
        return
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def reached(url: object, bucket: bool = False) -> Iterator[None]:
    """What drivers of stores raise becomes a StoreError, but for a file to read that is not there.

    Args:
      url: what is read or written; what a local path raises stays as it is. A full disk of this machine is a UserError.
      bucket: whether what is not there is the bucket (UserError): something is written, or listed.
    """
    try:
        yield
    except (UserError, StoreError):
        raise
    except Exception as error:
        if not is_url(str(url)) or isinstance(error, FileNotFoundError) and not bucket:
            raise
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(
                f"{url} cannot be copied here: {error}; make room, or set TMPDIR to another disk"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{url}: there is no such bucket; make it, or name another one") from error
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{url} cannot be reached or used: {cause}; check the address, its credentials and the network"
        ) from error


class Folder:
    """A folder, named by a path or a URL. Can be pickled. Paths within it use '/' and are relative to it."""

    def __init__(self, url: str | os.PathLike[str]):
        self.url = os.fspath(url)
        if self.url.startswith("file://"):
            self.url = urllib.parse.unquote(self.url.removeprefix("file://"))
        self.is_local = not is_url(self.url)
        scheme = self.url.partition("://")[0]
        if not self.is_local and scheme not in STORES:
            raise UserError(f"{self.url}: {scheme}:// is no store that is known; known are {', '.join(STORES)}")
        if scheme in _EXTRAS and not re.match(r"\w+://[^/]+", self.url):
            raise UserError(f"{self.url} names no bucket: {scheme}://BUCKET/FOLDER")
        self.url = self.url.rstrip("/") or "/"

    def __str__(self) -> str:
        return self.url

    def connect(self) -> None:
        """Raises UserError where the store's driver is missing, and nothing else: no address is asked yet."""
        if not self.is_local:
            self._system  # noqa: B018

    def path(self, name: str) -> str:
        """The whole path or URL of a file."""
        return f"{self.url.rstrip('/')}/{name}"

    def files(self, below: str = "") -> list[str]:
        """All files below a subfolder, sorted; none where it is not there. Hidden files and folders are left out."""
        if self.is_local:
            found = [
                os.path.relpath(os.path.join(folder, name), self.url).replace(os.sep, "/")
                for folder, files in _walk(pathlib.Path(self.path(below) if below else self.url))
                for name in files
            ]
        else:
            with reached(self.url, bucket=True):
                self._system.invalidate_cache()  # others write here too
                start = self._stripped(self.path(below) if below else self.url)
                root = self._stripped(self.url)
                found = [name.removeprefix(root).lstrip("/") for name in self._system.find(start)]
        return sorted(name for name in found if _is_shown(name))

    def details(self) -> dict[str, dict[str, Any]]:
        """Of each file of a store that is not hidden its size, its digest as the store has it, and its MD5 or ''."""
        with reached(self.url, bucket=True):
            self._system.invalidate_cache()  # others write here too
            root, found = self._stripped(self.url), self._system.find(self._stripped(self.url), detail=True)
        details = {}
        for path, info in found.items():
            name, md5 = path.removeprefix(root).lstrip("/"), info.get("md5Hash") or ""
            # A time, where a store has no digest, changes with every write.
            digest = md5 or next((info[key] for key in ("ETag", "etag", "mtime", "created") if info.get(key)), "")
            if _is_shown(name):
                details[name] = {"size": int(info["size"]), "digest": str(digest), "md5": md5}
        return details

    def exists(self, name: str) -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        with reached(self.url):
            self._system.invalidate_cache()
            return bool(self._system.exists(self._stripped(self.path(name))))

    def read(self, name: str) -> bytes:
        """Raises OSError."""
        if self.is_local:
            return pathlib.Path(self.path(name)).read_bytes()
        with reached(self.url):
            return bytes(self._system.cat_file(self._stripped(self.path(name))))

    def open(self, name: str) -> io.BufferedReader:
        """The file, to be read and closed. Raises OSError."""
        if self.is_local:
            return open(self.path(name), "rb")
        with reached(self.url):
            return cast(io.BufferedReader, self._system.open(self._stripped(self.path(name)), "rb"))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, in place of one that is there."""
        if not self.is_local:  # a store shows an object when it is complete
            with reached(self.url, bucket=True):
                self._system.pipe_file(self._stripped(self.path(name)), content)
            return
        path = pathlib.Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)

    def put(self, file: str | os.PathLike[str], name: str, keep: bool = False) -> None:
        """Moves a whole local file here under its final name; it must lie in this folder where that is local.

        keep: whether it also stays where it is, which is for stores.
        """
        if self.is_local:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, self.path(name))
        else:
            os.stat(file)  # else its lack would be the bucket's
            with reached(self.url, bucket=True):
                self._system.put_file(os.fspath(file), self._stripped(self.path(name)))
            if not keep:
                os.unlink(file)

    def fetch(self, name: str, file: str | os.PathLike[str]) -> None:
        """Copies a file to one of this machine. Raises OSError."""
        if self.is_local:
            shutil.copyfile(self.path(name), file)
            return
        with reached(self.url):
            self._system.get_file(self._stripped(self.path(name)), os.fspath(file))

    def remove(self, name: str) -> None:
        if self.is_local:
            pathlib.Path(self.path(name)).unlink(missing_ok=True)
        elif self.exists(name):
            with reached(self.url):
                self._system.rm_file(self._stripped(self.path(name)))

    def remove_empty(self, name: str) -> None:
        """Removes a subfolder that holds nothing; stores have none."""
        if self.is_local and os.path.isdir(self.path(name)):
            os.rmdir(self.path(name))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_system"}

    @functools.cached_property
    def _system(self) -> Any:
        import fsspec

        protocol = self.url.split("://")[0]
        # Others write here too, and Orbax has clients of its own: what one has listed would be out of date.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
        for name in ("gcsfs", "botocore", "s3fs"):  # of what fails they print tracebacks, besides raising it
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError, OSError) as error:  # a driver that is missing, or cannot be loaded
            package = _EXTRAS.get(protocol)
            needed = f"pip install {package}" if package else f"install what fsspec needs for {protocol}://"
            raise UserError(f"{self.url}: {str(error).splitlines()[0]}; {needed}") from error

    def _stripped(self, url: str) -> str:
        return self._system._strip_protocol(url)


def _is_shown(name: str) -> bool:
    """Whether an object is a file that is not hidden. Consoles and mounts of stores mark folders by 'name/'."""
    return name != "" and not name.endswith("/") and not any(part.startswith(".") for part in name.split("/"))


def _walk(root: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files; links are followed, but no folder is entered twice, and none of the kernel's own.

    From /proc a link leads to the root of the disk. Of a folder that may not be read a line is printed.
    """

    def say(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # which `files` finds empty
            message = f"warning: {error.filename} cannot be read ({error.strerror}): what is in it is left out"
            print(one_line(message), file=sys.stderr, flush=True)

    entered = {"/proc", "/sys", "/dev"}
    for folder, names, files in os.walk(root, followlinks=True, onerror=say):
        real = os.path.realpath(folder)
        if real in entered:
            names.clear()
            continue
        entered.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder, files
