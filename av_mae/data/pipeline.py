"""Prepared sets → host batches on Grain.

source → shuffled anew in each epoch (or sampled by class) → repeated → mixed → decoded and augmented → this host's rows
of each global batch → worker processes. The clip at global position p, and every random draw for it, depends on seed
and p alone, so that any number of hosts and workers sees the same order, and resuming is a slice at a position.
"""

import functools
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import grain.multiprocessing
import numpy as np
from absl import flags

from av_mae.config import DataConfig
from av_mae.console import Progress
from av_mae.data import records
from av_mae.data.audio import check_sound
from av_mae.data.cache import Cached
from av_mae.data.frames import Size
from av_mae.data.loading import ANNOTATION_FIELDS, FIELDS, ClipLoader, ClipSource, HostBatches, WithOthers, batch_fields
from av_mae.data.plans import MIDDLE, Clips, MakePlan, usual_plan
from av_mae.data.records import Labels
from av_mae.errors import UserError, WorkerKilled

_GOLDEN = (5**0.5 - 1) / 2
_ENDLESS = sys.maxsize
_SHARED_MEMORY = "/dev/shm"
_GRACE = 30.0  # seconds that a worker lives on after SIGTERM


def clip_weights(labels: Labels) -> np.ndarray:
    """How often each clip comes, float64 [clips] with sum 1: proportional to the sum, over its classes, of 1 / (clips
    of the class), as is usual for AudioSet (PSLA, arXiv 2102.01243; AudioMAE). A clip without classes never comes.

    Raises ValueError where no clip has a class.
    """
    if not len(labels.values):
        raise ValueError("no clip has a class")
    clips = np.repeat(np.arange(len(labels.counts)), labels.counts)
    weights = np.bincount(clips, 1 / np.bincount(labels.values)[labels.values], len(labels.counts))
    return np.asarray(weights / weights.sum())


def check_classes(sets: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where sets (the names of their classes by path), whose labels are used together, number their
    classes differently."""
    (first, expected), *others = sets.items()
    for path, classes in others:
        both = itertools.zip_longest(expected, classes)
        different = next((number for number, (name, other) in enumerate(both) if name != other), None)
        if different is not None:
            names = [repr(known[different]) if different < len(known) else "missing" for known in (expected, classes)]
            raise UserError(
                f"{first} ({len(expected)} classes) and {path} ({len(classes)}) have different class lists: "
                f"class {different} is {names[0]} and {names[1]}. Sets whose labels are used together need "
                "the same: prepare them with one list, or take one of them"
            )


class StratifiedSampling(grain.MapDataset):
    """Clips sampled by weight, endlessly, by stratified sampling; the clip at position p depends on seed and p alone.

    Each epoch has as many draws as there are clips: one from each of as many equal strata of 0…1, in shuffled order, so
    that a clip of weight w comes within 1 of w · clips times. The strata's offset moves on from epoch to epoch, so that
    over epochs each clip comes in proportion to its weight.
    """

    def __init__(self, clips: grain.MapDataset, weights: np.ndarray, seed: int):
        super().__init__(clips)
        self._ends = np.cumsum(weights)
        self._ends[np.flatnonzero(weights)[-1] :] = 1.0  # whatever rounding left of it
        self._order = grain.MapDataset.range(len(weights)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        clips = len(self._ends)
        draw = (self._order[index] + (0.5 + index // clips * _GOLDEN) % 1) / clips
        return self._parent[int(np.searchsorted(self._ends, draw, side="right"))]


class BatchIterator:
    """Iterates over host batches; `close()` stops its workers."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches: grain.DatasetIterator | None = batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            raise StopIteration
        try:
            batch: dict[str, np.ndarray] = next(self._batches)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise WorkerKilled(
                "a process that reads clips was killed from outside, most likely because memory ran out (fewer "
                "workers need less); the same command goes on from what was saved"
            ) from error
        for array in batch.values():
            # The memory lives as long as the array; without its name nothing is left behind however the process ends.
            if isinstance(array, grain.multiprocessing.SharedMemoryArray):
                array.shm.unlink()
                array._unlink_on_del = False
        return batch

    def close(self) -> None:
        """Stops the workers and drops the batches that they had ready, and with them their shared memory."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()


def read_ahead(batches: grain.MapDataset, workers: int, prefetch: int, batch_bytes: int) -> BatchIterator:
    """Computes batches ahead of their use, in order.

    Args:
      batches: random access to batches.
      workers: processes that compute them; 0 for a thread of this process.
      prefetch: batches that are kept ready.
      batch_bytes: size of a batch, about.
    """
    # Without workers one thread keeps a few batches ready; a worker computes one batch after the other.
    threads, ready = (0, 0) if workers else (1, max(1, prefetch))
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ready))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; the commands here use argparse
            flags.FLAGS.mark_as_parsed()
        ahead = max(1, prefetch // workers)
        # Batches travel through pipes where they would not fit in shared memory (64 MB in many containers): a process
        # that writes beyond it is killed by SIGBUS, without a message.
        needed = batch_bytes * workers * (2 * ahead + 2)
        if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < needed:
            options = grain.experimental.DatasetOptions(min_shm_size=_ENDLESS)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), _prepare_worker)
    return BatchIterator(iter(dataset))


def _prepare_worker(index: int, count: int) -> None:
    """Runs first in each worker process: it shares the fate of its parent, not of the terminal."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # whoever imports JAX in a worker must not take the accelerator
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A signal to the whole job must leave the workers alive while the trainer saves. A parent that was killed cannot
    # stop its workers; they would hold their memory for ever.
    signal.signal(signal.SIGTERM, lambda *_: _end_after(functools.partial(time.sleep, _GRACE)))
    parent = multiprocessing.parent_process()
    if parent is not None:
        _end_after(parent.join)


def _end_after(wait: Callable[[], None]) -> None:
    """Ends this process once `wait`, in the background, returns."""

    def end() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class _Batches:
    """What training and evaluation data share: iterators with workers, and their end."""

    def __init__(self, clips: grain.MapDataset, loader: ClipLoader, seed: int, batch_size: int, rows: np.ndarray):
        self._dataset, self._data = clips.random_map(loader, seed=seed), loader.data
        self._fields = batch_fields(loader.data, loader.image_size, loader.audio_size)
        self._batch_size, self._rows = batch_size, np.asarray(rows)
        self._open: weakref.WeakSet[BatchIterator] = weakref.WeakSet()
        if self._rows.size == 0 or self._rows.min() < 0 or self._rows.max() >= batch_size:
            raise UserError(f"this host's rows must lie in the global batch: batch_size={batch_size}, rows={rows}")

    def host_batches(self, first: int, total: int = _ENDLESS) -> HostBatches:
        """Random access to this host's batches of the clips at global positions `first` … `total`, in this process."""
        return HostBatches(self._dataset, self._fields, self._batch_size, self._rows, first, total)

    def _iterate(self, first: int, total: int) -> BatchIterator:
        row_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self._fields.values())
        iterator = read_ahead(
            self.host_batches(first, total), self._data.workers, self._data.prefetch, len(self._rows) * row_bytes
        )
        self._open.add(iterator)
        return iterator

    def close(self) -> None:
        """Stops the workers of every iterator; none of them can be used afterwards."""
        for iterator in list(self._open):
            iterator.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrainingData(_Batches):
    """Endless shuffled, augmented host batches; a context manager. `clips`: records per epoch, all sets together.

    Args:
      sources: random access to records, one per set. `data.weights` mix them; `None` shuffles all of them as one set.
      data: how clips are read and augmented.
      image_size: (H, W) of the images.
      audio_size: (mels, frames) of the log-mels.
      batch_size: clips of a global batch.
      rows: those of its rows that this host holds.
      seed: of order and augmentation.
      labels: of each set, to balance classes by; `None` for every clip once per epoch.

    Raises:
      UserError: `rows` are not in the batch.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        data: DataConfig,
        image_size: Size,
        audio_size: Size,
        batch_size: int,
        rows: np.ndarray,
        *,
        seed: int,
        labels: Sequence[Labels] | None = None,
    ):
        self.clips = sum(len(source) for source in sources)
        seeds = np.random.SeedSequence(seed).generate_state(len(sources) + 1).tolist()
        sets = [grain.MapDataset.source(source) for source in sources]
        if data.weights is None:
            sets = [grain.MapDataset.concatenate(sets)]
            labels = labels and [Labels.joined(labels)]
        if labels:
            order = [
                StratifiedSampling(clips, clip_weights(own), own_seed)
                for clips, own, own_seed in zip(sets, labels, seeds)
            ]
        else:
            order = [clips.shuffle(seed=own_seed).repeat() for clips, own_seed in zip(sets, seeds)]
        clips = order[0] if len(order) == 1 else grain.MapDataset.mix(order, data.weights)
        if data.mix > 1:
            clips = WithOthers(clips, len(clips), functools.partial(with_following, data.mix - 1))
        loader = ClipLoader(data, tuple(image_size), tuple(audio_size), augment=True)
        super().__init__(clips, loader, seeds[-1], batch_size, rows)

    def batches(self, position: int) -> BatchIterator:
        """Host batches from the global clip count `position` on, without reading what came before.

        With b = len(rows): `image` uint8 [b, H, W, 3], `audio` float32 [b, mels, frames], `label` int32 [b], `start`
        float32 [b] (s), `index` int32 [b] (global clip count), `valid` bool [b], `id`, `stage` and `cause` str
        [b], and what `data.annotations` ask for. A clip that fails is zeros, `valid` False; `stage` and `cause` say
        why, '' where nothing failed.
        """
        return self._iterate(position, _ENDLESS)


def with_following(count: int, position: int) -> tuple[int, range, dict[str, Any]]:
    """The clip at `position` with the `count` clips that come after it: in training they are mixed with it."""
    return position, range(position + 1, position + 1 + count), MIDDLE


class EvaluationData(_Batches):
    """The items of a plan in order, without augmentation: iterable (anew each time), `len` batches.

    Batches are those of TrainingData, `index` being the item's number in `plan`; the last one is padded with `valid`
    False and empty `id`, `stage` and `cause`.

    Args:
      sources, data, image_size, audio_size, batch_size, rows: see TrainingData.
      swap: 'image' or 'audio' takes that stream from another clip.
      most: only so many of the stored clips (0: all).
      make_plan: draws up the plan; `None` for plans.usual_plan.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        data: DataConfig,
        image_size: Size,
        audio_size: Size,
        batch_size: int,
        rows: np.ndarray,
        *,
        swap: str = "",
        most: int = 0,
        make_plan: MakePlan | None = None,
    ):
        stored = sum(len(source) for source in sources)
        clips = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])

        def read(field: str, count: int) -> list[Any]:
            with Progress(count, f"reading {field}") as progress:
                values = []
                for number in range(count):
                    record = clips[number]
                    values.append(None if "failure" in record else record[field])
                    progress.update()
            return values

        known = Clips(stored, most, read)
        self.clips = known.count
        self.plan = (make_plan or usual_plan(data))(known)
        if swap:
            self.plan = self.plan.with_swaps()
        loader = ClipLoader(data, tuple(image_size), tuple(audio_size), augment=False, swap=swap)
        super().__init__(WithOthers(clips, len(self.plan), self.plan.item), loader, 0, batch_size, rows)

    def __len__(self) -> int:
        return -(-len(self.plan) // self._batch_size)

    def __iter__(self) -> BatchIterator:
        return self._iterate(0, len(self.plan))

    def clip(self, index: int) -> dict[str, Any]:
        """The fields of one clip, by its index in the plan; of one that fails no arrays."""
        clip: dict[str, Any] = self._dataset[index]
        return clip


def open_training_data(
    data: DataConfig, image_size: Size, audio_size: Size, seed: int, batch_size: int, rows: np.ndarray
) -> TrainingData:
    """Opens the sets of `data` for training; arguments as in TrainingData.

    Raises UserError where the data is not there or the settings cannot work.
    """
    sources, labels = open_sources(data, audio_size), None
    if data.balanced:
        if data.weights is None:  # taken as one set
            check_classes({path: records.class_names(path) for path in data.paths})
        labels = [records.read_labels(path, data.split) for path in data.paths]
        empty = next((path for path, own in zip(data.paths, labels) if not len(own.values)), None)
        if empty is not None:
            raise UserError(f"data.balanced=True needs classes, but no clip of {empty} (split {data.split!r}) has one")
    return TrainingData(sources, data, image_size, audio_size, batch_size, rows, seed=seed, labels=labels)


def open_evaluation_data(
    data: DataConfig, image_size: Size, audio_size: Size, batch_size: int, rows: np.ndarray, **options: Any
) -> EvaluationData:
    """Opens the sets of `data` for evaluation; arguments as in EvaluationData, errors as in open_training_data."""
    return EvaluationData(open_sources(data, audio_size), data, image_size, audio_size, batch_size, rows, **options)


def open_sources(data: DataConfig, audio_size: Size) -> list[ClipSource]:
    """The records of each set of `data`, with the fields that its batches need. Errors as in open_training_data."""
    if not data.paths:
        raise UserError(
            f"data.path must name at least one prepared set, got {data.path!r}; "
            "make one with python -m av_mae.prepare --output=DIR"
        )
    if audio_size[0] != data.sound.mels:
        raise UserError(
            f"the model's sound has {audio_size[0]} rows, data.sound.mels={data.sound.mels}; they must be equal"
        )
    check_sound(data.sound)
    if {"label", "labels"} & set(data.annotations):
        check_classes({path: records.class_names(path) for path in data.paths})
    fields = dict.fromkeys((*FIELDS, *(field for name in data.annotations for field in ANNOTATION_FIELDS[name])))
    stored = [records.open_source(path, data.split, tuple(fields)) for path in data.paths]
    return [
        ClipSource(path, Cached(source, data.cache * 1e9) if data.cache else source)
        for path, source in zip(data.paths, stored)
    ]
