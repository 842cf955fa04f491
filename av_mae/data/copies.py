"""Prepared sets on stores, copied to a folder of this machine: training reads records at random, stores cannot.

A copy is never changed: its folder is named by what the store lists of the set (names, sizes, digests). A set that has
changed there is therefore another copy, into which the files that stayed are linked.
"""

import base64
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from typing import Any

from av_mae.console import Progress, note
from av_mae.errors import STORES, StoreError, UserError, check_local
from av_mae.storage import Folder, inside, is_url

MANIFEST = ".copied.json"  # in a whole copy: sizes, times and digests of its files
LOCK = ".lock"
THREADS = 16
KEPT_DAYS = 30.0  # after which a copy that nobody has used is removed when another one is made
LOCAL = "folder of this machine to which a prepared set on a store (gs://, s3://) is copied"  # the option --local
_OR_MOUNTED = "or give the folder where the store is mounted (gcsfuse, mount-s3)"
_copies: dict[str, pathlib.Path] = {}
_locks: list[Any] = []  # held while this process lives: a copy in use is not removed


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a prepared set: the path itself, or the copy of one on a store. Raises UserError without a copy."""
    check_local("data.path", os.fspath(path), STORES)
    if not is_url(path):
        return pathlib.Path(path)
    if os.fspath(path) not in _copies:
        raise UserError(
            f"data.path={path} is on a store: name a folder of each host with data.local=DIR, to which it is copied, "
            f"{_OR_MOUNTED}"
        )
    return _copies[os.fspath(path)]


def copy_set(path: str, local: str | None) -> None:
    """`copy_sets` for commands with the option --local. Raises UserError where it is not given, and needed."""
    if is_url(path) and not local:
        raise UserError(
            f"{path} is on a store: name a folder of this machine with --local=DIR, to which it is copied, "
            f"{_OR_MOUNTED}"
        )
    copy_sets([path], local or "")


def copy_sets(paths: Iterable[str], local: str) -> None:
    """Copies those of the sets that are on stores to the folder `local`; processes of one host share a copy.

    Raises:
      UserError: there is no room, or the folder cannot be written.
      StoreError: a store does not answer, or gives other bytes than it lists.
    """
    if not local:
        return
    check_local("data.local", local)
    for url in (path for path in paths if is_url(path) and path not in _copies):
        try:
            _copies[url] = _copy(Folder(url), pathlib.Path(local).absolute())
        except StoreError:
            raise
        except OSError as error:
            raise UserError(f"data.local={local} cannot be written: {error.strerror or error}") from error


def _copy(store: Folder, local: pathlib.Path) -> pathlib.Path:
    # Pictures of a set, e.g. what inspect draws, come and go.
    listed = {name: entry for name, entry in store.details().items() if not name.endswith((".png", ".html"))}
    if "dataset_info.json" not in listed:  # what else a folder may hold, e.g. videos, is not copied
        what = "holds no prepared set" if listed else "is no folder, or holds nothing"
        raise UserError(f"{store} {what}: name the folder of a set, or prepare one there with python -m av_mae.prepare")
    for entry in listed.values():  # an MD5 tells contents; what else a store has tells them in one place only
        entry["digest"] = entry["md5"] or f"{store} {entry['digest']}"
    version = hashlib.sha256(json.dumps([str(store), listed], sort_keys=True).encode()).hexdigest()[:12]
    target = local / f"{str(store).rpartition('/')[2]}-{version}"
    target.mkdir(parents=True, exist_ok=True)
    lock = open(target / LOCK, "a")
    _locks.append(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_whole(target, listed):
            _fetch(store, target, listed)
        _remove_old(local)
    except BlockingIOError:
        if not (target / MANIFEST).exists():
            note(f"another process copies {store} to {target}; waiting for its end")
    fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a process that copies, not for those that read
    if not is_whole(target, listed):
        raise StoreError(f"the copy of {store} in {target} is not whole, and other processes use it: start again")
    os.utime(target / MANIFEST)
    return target


def is_whole(target: pathlib.Path, listed: Mapping[str, Any]) -> bool:
    """Whether all files of a copy are there as they were copied; says what is not. Digests were compared then."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        for name in listed:
            status, known = (target / name).stat(), manifest[name]
            if [status.st_size, status.st_mtime_ns] != [known["size"], known["time"]]:
                raise ValueError(name)
    except FileNotFoundError as error:
        if not str(error.filename).endswith(MANIFEST):
            note(f"the copy in {target} lacks {error.filename}: it is copied again")
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        note(f"the copy in {target} has changed: it is copied again")
        return False
    return True


def _fetch(store: Folder, target: pathlib.Path, listed: Mapping[str, Any]) -> None:
    """Copies what is not there yet, in parallel, and writes the manifest at the end."""
    (target / MANIFEST).unlink(missing_ok=True)
    for left_behind in target.rglob(".*.part"):  # by a process that was killed
        left_behind.unlink()
    left = {name: entry for name, entry in listed.items() if not _is_known(target / name, entry)}
    taken = {name for name in left if _link_from_before(target, name, listed[name])}
    if taken:
        note(f"{store} has changed since it was copied: {len(taken)} of {len(listed)} files are as before")
    left = {name: entry for name, entry in left.items() if name not in taken}
    size, free = sum(entry["size"] for entry in left.values()), shutil.disk_usage(target).free
    if size > free:
        raise UserError(f"data.local={target.parent} has {free / 1e9:.1f} GB left, {store} needs {size / 1e9:.1f} GB")
    began = time.monotonic()
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as threads,
        Progress(max(1, round(size / 1e6)), f"copying {store}", "MB") as progress,
    ):
        done = 0
        futures = {threads.submit(_fetch_file, store, target, name, left[name]): name for name in left}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                done += left[futures[future]]["size"]
                progress.update(round(done / 1e6) - progress.done)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    note(f"{len(left)} files of {store} copied to {target}: {size / 1e6 / (time.monotonic() - began):.1f} MB/s")
    manifest = {}
    for name, entry in listed.items():
        status = (target / name).stat()
        manifest[name] = {"size": status.st_size, "time": status.st_mtime_ns, "digest": entry["digest"]}
    temporary = target / f"{MANIFEST}.part"
    temporary.write_text(json.dumps(manifest))
    os.replace(temporary, target / MANIFEST)


def _fetch_file(store: Folder, target: pathlib.Path, name: str, entry: Mapping[str, Any]) -> None:
    path = inside(target, name)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            store.fetch(name, temporary)
        except FileNotFoundError as error:
            raise StoreError(f"{store.path(name)} was removed while the set was copied: start again") from error
        if not _is_known(temporary, entry):
            raise StoreError(f"{store.path(name)} has come with other bytes than the store lists: start again")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_known(path: pathlib.Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the size, and the MD5 where the store tells it."""
    if not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    if not entry["md5"]:
        return path.name.endswith(".part")  # of a file from before nothing more is known
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() == entry["md5"]


def _link_from_before(target: pathlib.Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Links a file of another whole copy of the set, where the store lists the same digest."""
    for other in target.parent.glob(f"{target.name.rpartition('-')[0]}-*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(other.read_text())[name]
            status = (other.parent / name).stat()
            unchanged = [known["size"], known["time"]] == [status.st_size, status.st_mtime_ns]
            if unchanged and [known["size"], known["digest"]] == [entry["size"], entry["digest"]]:
                path = inside(target, name)
                path.unlink(missing_ok=True)
                os.link(other.parent / name, path)
                return True
    return False


def _remove_old(local: pathlib.Path) -> None:
    """Removes copies that nobody uses and nobody has used for KEPT_DAYS."""
    for manifest in local.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(OSError):
            if time.time() - manifest.stat().st_mtime < KEPT_DAYS * 86400:
                continue
            with open(manifest.with_name(LOCK), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(manifest.parent)
                note(f"{manifest.parent} was not used for {KEPT_DAYS:.0f} days: removed")
