"""Folders on this machine or on any store that fsspec knows (gs://, s3://, memory://, …), by one small interface."""

import contextlib
import functools
import os
import pathlib
import secrets
import urllib.parse
from collections.abc import Iterator
from typing import Any

from av_mae.errors import UserError

TEMPORARY = ".part"  # the ending of a file that is being written
STORES = ("gs", "gcs", "s3", "hdfs", "az", "abfs", "memory")  # of those that fsspec knows; servers of files are none
_EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all, instead of the one that is there; a link is replaced and not followed.

    Several processes, also of several machines, may write the same file: the last one's stays.

    Raises:
      OSError: it cannot be written.
    """
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


class StoreError(OSError):
    """A store that does not answer, or refuses. The message says which, why, and what to do."""


class Folder:
    """A folder, named by a path or a URL. Can be pickled. Paths within it use '/' and are relative to it."""

    def __init__(self, url: str | os.PathLike[str]):
        self.url = os.fspath(url)
        if self.url.startswith("file://"):
            self.url = urllib.parse.unquote(self.url.removeprefix("file://"))
        self.is_local = "://" not in self.url
        scheme = self.url.partition("://")[0]
        if not self.is_local and scheme not in STORES:
            raise UserError(f"{self.url}: {scheme}:// is no store that is known; known are {', '.join(STORES)}")
        self.url = self.url.rstrip("/") or "/"

    def __str__(self) -> str:
        return self.url

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
            with self._reached():
                self._system.invalidate_cache()  # others write here too
                start = self._stripped(self.path(below) if below else self.url)
                root = self._stripped(self.url)
                found = [name.removeprefix(root).lstrip("/") for name in self._system.find(start)]
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    def exists(self, name: str) -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        with self._reached():
            self._system.invalidate_cache()
            return bool(self._system.exists(self._stripped(self.path(name))))

    def read(self, name: str) -> bytes:
        """Raises OSError."""
        if self.is_local:
            return pathlib.Path(self.path(name)).read_bytes()
        with self._reached():
            return bytes(self._system.cat_file(self._stripped(self.path(name))))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, in place of one that is there."""
        if not self.is_local:  # a store shows an object when it is complete
            with self._reached():
                self._system.pipe_file(self._stripped(self.path(name)), content)
            return
        path = pathlib.Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)

    def put(self, file: str | os.PathLike[str], name: str) -> None:
        """Moves a whole local file here under its final name; it must lie in this folder where that is local."""
        if self.is_local:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, self.path(name))
        else:
            with self._reached():
                self._system.put_file(os.fspath(file), self._stripped(self.path(name)))
            os.unlink(file)

    def remove(self, name: str) -> None:
        if self.is_local:
            pathlib.Path(self.path(name)).unlink(missing_ok=True)
        elif self.exists(name):
            with self._reached():
                self._system.rm_file(self._stripped(self.path(name)))

    def remove_empty(self, name: str) -> None:
        """Removes a subfolder that holds nothing; stores have none."""
        if self.is_local and os.path.isdir(self.path(name)):
            os.rmdir(self.path(name))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_system"}

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What drivers of stores raise becomes a StoreError, but for a file that is not there."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StoreError(
                f"{self.url} cannot be reached or used: {cause}; check the address, its credentials and the network"
            ) from error

    @functools.cached_property
    def _system(self) -> Any:
        import fsspec

        protocol = self.url.split("://")[0]
        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError, OSError) as error:  # a driver that is missing, or cannot be loaded
            package = _EXTRAS.get(protocol)
            needed = f"pip install {package}" if package else f"install what fsspec needs for {protocol}://"
            raise UserError(f"{self.url}: {str(error).splitlines()[0]}; {needed}") from error

    def _stripped(self, url: str) -> str:
        return self._system._strip_protocol(url)


def _walk(root: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files; links are followed, but no folder is entered twice, and none of the kernel's own.

    From /proc a link leads to the root of the disk.
    """
    entered = {"/proc", "/sys", "/dev"}
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            names.clear()
            continue
        entered.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder, files
