"""The demo sets by name, and composing their clips in several processes."""

import collections
import concurrent.futures
import importlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

from av_mae.data import clip_writer

MODULES = {"toy_band": "av_mae.data.toy_band", "spoken_digits": "av_mae.data.spoken_digits"}
CHUNK = 16  # clips per task of a worker


def load(dataset: str):
    """The module of a demo set: NAME, DESCRIPTION, CLASSES and compose(seed, split, index, variant) → Clip."""
    return importlib.import_module(MODULES[dataset])


def make_clips(dataset: str, variant: str, seed: int, split: str, indices: range, folder: str) -> list[dict]:
    """Composes clips, writes their mp4 files into `folder` and gives their records."""
    compose, records = load(dataset).compose, []
    for index in indices:
        mp4, record = clip_writer.encode_clip(compose(seed, split, index, variant))
        (pathlib.Path(folder) / f"{record['id']}.mp4").write_bytes(mp4)
        records.append(record)
    return records


def _start_worker() -> None:
    """Leaves Ctrl-C to the command, and ends with it even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class ClipMaker:
    """Makes the clips of one set in `workers` processes (1: in this one). A context manager.

    Every clip depends on its place alone, so that the number of workers changes nothing.
    """

    def __init__(self, dataset: str, variant: str, seed: int, workers: int):
        self._clips = (dataset, variant, seed)
        self._workers = workers
        self._pool = None

    def __enter__(self) -> "ClipMaker":
        if self._workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self._workers, mp_context=context,
                                                                initializer=_start_worker)
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def records(self, split: str, clips: int, folder: str) -> Iterator[dict]:
        """The records of a split in order, as they are made; mp4 files go to `folder`."""
        tasks = ((*self._clips, split, range(start, min(start + CHUNK, clips)), folder)
                 for start in range(0, clips, CHUNK))
        chunks = self._spread(tasks) if self._pool is not None else (make_clips(*task) for task in tasks)
        for chunk in chunks:
            yield from chunk

    def _spread(self, tasks) -> Iterator[list[dict]]:
        """Results in the order of the tasks, with a few tasks per worker under way."""
        pending: collections.deque = collections.deque()
        for task in tasks:
            pending.append(self._pool.submit(make_clips, *task))
            if len(pending) >= 3 * self._workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
