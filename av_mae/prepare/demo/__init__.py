"""The demo sets: made from a seed, clips with their annotations → mp4 files and ArrayRecord shards."""

import collections
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import ModuleType

from av_mae.console import Progress
from av_mae.errors import UserError, check_name
from av_mae.prepare.demo.clips import VARIANTS, encode_clip

MODULES = {"toy_band": "av_mae.prepare.demo.toy_band", "spoken_digits": "av_mae.prepare.demo.spoken_digits"}
CHUNK = 16  # clips per task of a worker


def load(dataset: str) -> ModuleType:
    """The module of a demo set: NAME, DESCRIPTION, CLASSES and compose(seed, split, index, variant) → Clip."""
    return importlib.import_module(MODULES[dataset])


def make_clips(dataset: str, variant: str, seed: int, split: str, indices: range, folder: str) -> list[dict]:
    """Composes clips and writes their mp4 files.

    Args:
        dataset: one of MODULES.
        variant: one of VARIANTS.
        seed: of the set.
        split: 'train' or 'test'.
        indices: of the clips.
        folder: takes the mp4 files.

    Returns:
        The clips' records.
    """
    compose, records = load(dataset).compose, []
    for index in indices:
        mp4, record = encode_clip(compose(seed, split, index, variant))
        (pathlib.Path(folder) / f"{record['id']}.mp4").write_bytes(mp4)
        records.append(record)
    return records


def _start_worker() -> None:
    """Leaves Ctrl-C to the command, and ends with it even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class ClipMaker:
    """Makes the clips of one set in `workers` processes (1: in this one). A context manager.

    Every clip depends on its index alone: the number of workers changes nothing.
    """

    def __init__(self, dataset: str, variant: str, seed: int, workers: int):
        self._clips = (dataset, variant, seed)
        self._workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "ClipMaker":
        if self._workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_start_worker
            )
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def records(self, split: str, clips: int, folder: str) -> Iterator[dict]:
        """The records of a split in order, as they are made; mp4 files go to `folder`."""
        tasks = (
            (*self._clips, split, range(start, min(start + CHUNK, clips)), folder) for start in range(0, clips, CHUNK)
        )
        chunks = (make_clips(*task) for task in tasks) if self._pool is None else self._spread(self._pool, tasks)
        for chunk in chunks:
            yield from chunk

    def _spread(self, pool: concurrent.futures.ProcessPoolExecutor, tasks: Iterable[tuple]) -> Iterator[list[dict]]:
        """Results in the order of the tasks, with a few tasks per worker under way."""
        pending: collections.deque = collections.deque()
        for task in tasks:
            pending.append(pool.submit(make_clips, *task))
            if len(pending) >= 3 * self._workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


SETTINGS_FILE = "prepare.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a prepared demo set depends on; stored with it. `recipe` counts changes of its clips and its records."""

    dataset: str
    variant: str
    clips: int
    test_clips: int
    seed: int
    recipe: int = 2

    def __post_init__(self):
        check_name("variant", self.variant, VARIANTS)
        for option in ("clips", "test_clips"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option}={getattr(self, option)} must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed} must be 0 or more")


def is_prepared(output: pathlib.Path, settings: Settings) -> bool:
    """Whether `output` holds just this set already. Raises UserError where it holds anything else."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder that is new or empty")
    if not any(output.iterdir()):
        return False
    stored = _read_settings(output)
    if stored is None:
        raise UserError(f"--output={output} holds other files; name a folder that is new or empty")
    wanted = dataclasses.asdict(settings)
    different = [
        f"{name}={stored.get(name)} (asked: {value})" for name, value in wanted.items() if stored.get(name) != value
    ]
    if different:
        raise UserError(
            f"--output={output} holds a set with {', '.join(different)}; name another folder or delete this one"
        )
    return True


def _read_settings(folder: pathlib.Path) -> dict | None:
    try:
        stored = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def prepare(settings: Settings, output: pathlib.Path, workers: int) -> None:
    """Makes the set in a folder beside `output` and renames it at the end."""
    from av_mae.prepare.shards import write_set  # TFDS takes a second to import, and workers import this module too

    unfinished = output.with_name(f"{output.name}.unfinished")
    _start_folder(unfinished, settings)
    dataset = load(settings.dataset)
    clips = {"train": settings.clips, "test": settings.test_clips}
    with (
        ClipMaker(settings.dataset, settings.variant, settings.seed, workers) as maker,
        Progress(sum(clips.values()), f"prepare {settings.dataset}") as progress,
    ):

        def split_records(split):
            folder = unfinished / "clips" / split
            folder.mkdir(parents=True)
            for record in maker.records(split, clips[split], os.fspath(folder)):
                yield record
                progress.update()

        write_set(
            unfinished,
            settings.dataset,
            dataset.DESCRIPTION,
            dataset.CLASSES,
            {split: functools.partial(split_records, split) for split in clips},
            max(clips.values()),
        )
    os.rename(unfinished, output)


def _start_folder(folder: pathlib.Path, settings: Settings) -> None:
    """Makes an empty folder with the settings, in place of what an interrupted run left there."""
    if folder.exists():
        if _read_settings(folder) is None:
            raise UserError(f"{folder}, needed while preparing, exists and is not of av_mae.prepare; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def run(settings: Settings, output: pathlib.Path, workers: int) -> str:
    """Makes the set where it is not there yet, and says so in a line."""
    if is_prepared(output, settings):
        return f"{output} already holds this set, nothing to do"
    started = time.monotonic()
    prepare(settings, output, workers)
    seconds, clips = time.monotonic() - started, settings.clips + settings.test_clips
    return (
        f"{output}: {settings.clips} training and {settings.test_clips} test clips of {settings.dataset} "
        f"({settings.variant}) in {seconds:.1f} s, {clips / seconds:.0f} clips/s"
    )
