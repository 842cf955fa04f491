"""Prepared sets → host batches on Grain.

source → shuffled anew in each epoch (or drawn by class) → repeated → mixed → decoded and augmented → this host's rows
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
from typing import Any

import grain
import grain.multiprocessing
import numpy as np
from absl import flags

from av_mae.config import DataConfig
from av_mae.console import Progress
from av_mae.data.audio import check_sound
from av_mae.data.loading import FIELDS, RECORD_FIELDS, Chosen, ClipLoader, ClipSource, HostBatches, batch_fields
from av_mae.data.plans import MIDDLE, Clips, Plan, each_clip, each_mask, random_mixtures
from av_mae.data.records import Cached, Labels
from av_mae.errors import UserError

_GOLDEN = (5**0.5 - 1) / 2


def clip_weights(labels: Labels) -> np.ndarray:
    """How often each clip comes, float64 [clips] with sum 1: proportional to the sum, over its classes, of 1 / (clips
    of the class), as is usual for AudioSet (PSLA, arXiv 2102.01243; AudioMAE). A clip without classes never comes.

    Raises ValueError where no clip has a class.
    """
    if not len(labels.values):
        raise ValueError("no clip has a class")
    clips = np.repeat(np.arange(len(labels.counts)), labels.counts)
    weights = np.bincount(clips, 1 / np.bincount(labels.values)[labels.values], len(labels.counts))
    return weights / weights.sum()


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


class Balanced(grain.MapDataset):
    """Clips drawn by weight, endlessly; which one stands at position p depends on seed and p alone.

    Each epoch of as many draws as there are clips divides 0…1 evenly and shuffles the divisions, so that a clip of
    weight w comes within 1 of w · clips times; where the divisions begin moves on from epoch to epoch, so that over
    epochs each clip comes in proportion to its weight.
    """

    def __init__(self, clips: grain.MapDataset, weights: np.ndarray, seed: int):
        super().__init__(clips)
        self._ends = np.cumsum(weights)
        self._ends[np.flatnonzero(weights)[-1] :] = 1.0  # whatever rounding left of it
        self._order = grain.MapDataset.range(len(weights)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        clips = len(self._ends)
        draw = (self._order[index] + (0.5 + index // clips * _GOLDEN) % 1) / clips
        return self._parent[int(np.searchsorted(self._ends, draw, side="right"))]


MakePlan = Callable[[Clips], Plan]
_ENDLESS = sys.maxsize
_SHARED_MEMORY = "/dev/shm"
_GRACE = 30.0  # seconds that a worker lives on after SIGTERM


class BatchIterator:
    """Iterates over host batches; `close()` stops its workers."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches: grain.DatasetIterator | None = batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        for array in batch.values():
            if isinstance(array, grain.multiprocessing.SharedMemoryArray):
                _give_up_name(array)
        return batch

    def close(self) -> None:
        """Stops the workers and drops the batches that they had ready, and with them their shared memory."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()


def read_ahead(batches: grain.MapDataset, workers: int, prefetch: int, batch_bytes: int) -> BatchIterator:
    """Computes batches of about `batch_bytes`, in order, `prefetch` ahead: in a thread, or in `workers` processes."""
    # Without workers one thread keeps a few batches ready; a worker computes one batch after the other.
    reading = grain.ReadOptions(
        num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else max(1, prefetch)
    )
    ahead = max(1, prefetch // max(1, workers))
    dataset = batches.to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; the commands here use argparse
            flags.FLAGS.mark_as_parsed()
        dataset = _without_full_shared_memory(dataset, batch_bytes * workers * (2 * ahead + 2))
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), _prepare_worker)
    return BatchIterator(iter(dataset))


class _Batches:
    """What training and evaluation data share: iterators with workers, and their end."""

    def __init__(
        self,
        clips: grain.MapDataset,
        data: DataConfig,
        image_size: tuple[int, int],
        audio_size: tuple[int, int],
        batch_size: int,
        rows: np.ndarray,
    ):
        self._dataset, self._data, self._fields = clips, data, batch_fields(data, image_size, audio_size)
        self._batch_size, self._rows = batch_size, np.asarray(rows)
        self._open = weakref.WeakSet()
        if self._rows.size == 0 or self._rows.min() < 0 or self._rows.max() >= batch_size:
            raise UserError(f"this host's rows must lie in the global batch: batch_size={batch_size}, rows={rows}")

    def host_batches(self, first: int, total: int = _ENDLESS) -> HostBatches:
        """Random access to this host's batches of the clips at global positions `first` … `total`, in this process."""
        return HostBatches(self._dataset, self._fields, self._batch_size, self._rows, first, total)

    def _iterate(self, first: int, total: int) -> BatchIterator:
        batches = self.host_batches(first, total)
        iterator = read_ahead(batches, self._data.workers, self._data.prefetch, self._batch_bytes())
        self._open.add(iterator)
        return iterator

    def _batch_bytes(self) -> int:
        return len(self._rows) * sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self._fields.values()
        )

    def close(self) -> None:
        """Stops the workers of every iterator; none of them can be used afterwards."""
        for iterator in list(self._open):
            iterator.close()
        self._open.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TrainingData(_Batches):
    """Endless shuffled, augmented host batches; a context manager. `clips`: records per epoch, all sets together.

    `sources`: random access to records, one per set; `weights` mixes them, None shuffles all of them as one set.
    `labels`: of each set, to balance classes by (None: every clip once per epoch).
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        data: DataConfig,
        image_size: tuple[int, int],
        audio_size: tuple[int, int],
        seed: int,
        batch_size: int,
        rows: np.ndarray,
        labels: Sequence[Labels] | None = None,
    ):
        self.clips = sum(len(source) for source in sources)
        seeds = np.random.SeedSequence(seed).generate_state(len(sources) + 1).tolist()
        sets = [grain.MapDataset.source(source) for source in sources]
        if data.weights is None:
            sets = [grain.MapDataset.concatenate(sets)]
            labels = labels and [Labels.joined(labels)]
        if labels:
            order = [Balanced(clips, clip_weights(own), own_seed) for clips, own, own_seed in zip(sets, labels, seeds)]
        else:
            order = [clips.shuffle(seed=own_seed).repeat() for clips, own_seed in zip(sets, seeds)]
        mixture = order[0] if len(order) == 1 else grain.MapDataset.mix(order, data.weights)
        if data.mix > 1:
            mixture = Chosen(mixture, len(mixture), functools.partial(following, data.mix - 1))
        loader = ClipLoader(data, tuple(image_size), tuple(audio_size), augment=True)
        super().__init__(mixture.random_map(loader, seed=seeds[-1]), data, image_size, audio_size, batch_size, rows)

    def batches(self, position: int) -> BatchIterator:
        """Host batches from the global clip count `position` on, without reading what came before.

        With b = len(rows): `image` uint8 [b, H, W, 3], `audio` float32 [b, mels, frames], `label` int32 [b], `start`
        float32 [b] (s), `index` int32 [b] (global clip count), `valid` bool [b], `id` and `error` str [b], and what
        `data.annotations` asks for. A clip that fails is zeros, `valid` False.
        """
        return self._iterate(position, _ENDLESS)


class EvaluationData(_Batches):
    """The items of a plan in order, without augmentation: iterable (anew each time), `len` batches.

    Batches are those of TrainingData, `index` being the item's number in `plan`; the last one is padded with `valid`
    False and empty `id` and `error`. With `swap` 'image' or 'audio' that stream is another clip's. `most`: only so many
    of the stored clips (0: all). `make_plan` None: that of `usual_plan`.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        data: DataConfig,
        image_size: tuple[int, int],
        audio_size: tuple[int, int],
        batch_size: int,
        rows: np.ndarray,
        swap: str = "",
        most: int = 0,
        make_plan: MakePlan | None = None,
    ):
        stored = sum(len(source) for source in sources)
        clips = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])
        known = Clips(stored, most, functools.partial(read_field, clips))
        self.clips = known.count
        self.plan = (make_plan or usual_plan(data))(known)
        if swap:
            self.plan = self.plan.with_swaps()
        chosen = Chosen(clips, len(self.plan), self.plan.item)
        loader = ClipLoader(data, tuple(image_size), tuple(audio_size), augment=False, swap=swap)
        super().__init__(chosen.random_map(loader, seed=0), data, image_size, audio_size, batch_size, rows)

    def __len__(self) -> int:
        return -(-len(self.plan) // self._batch_size)

    def __iter__(self) -> BatchIterator:
        return self._iterate(0, len(self.plan))

    def clip(self, index: int) -> dict:
        """The fields of one clip, by its index in the stored order; of one that fails `id` and `error` alone."""
        return self._dataset[index]


def usual_plan(data: DataConfig) -> MakePlan:
    """Mixtures of clips where clips are mixed, else each annotated frame where masks are wanted, else each clip."""
    if data.mix > 1:
        return functools.partial(random_mixtures, mixed=data.mix)
    return each_mask if "mask" in data.annotations else each_clip


def read_field(clips: Sequence[dict], field: str, count: int) -> list[Any]:
    """A field of the first `count` records, None where a record cannot be read."""
    values = []
    with Progress(count, f"reading {field}") as progress:
        for number in range(count):
            record = clips[number]
            values.append(None if "error" in record else record[field])
            progress.update()
    return values


def following(mixed: int, position: int) -> tuple[int, range, dict[str, Any]]:
    """The clip at `position` with the `mixed` clips that come after it: in training they are mixed with it."""
    return position, range(position + 1, position + 1 + mixed), MIDDLE


def open_training_data(
    data: DataConfig,
    image_size: tuple[int, int],
    audio_size: tuple[int, int],
    seed: int,
    batch_size: int,
    rows: np.ndarray,
) -> TrainingData:
    """Opens the sets of `data` for training.

    image_size: (H, W); audio_size: (mels, frames); batch_size: clips of the global batch; rows: those of its rows
    that this host holds. Raises UserError where the data is not there or the settings cannot work.
    """
    sources = open_sources(data, audio_size)
    labels = _open_labels(data) if data.balanced else None
    return TrainingData(sources, data, image_size, audio_size, seed, batch_size, rows, labels)


def open_evaluation_data(
    data: DataConfig,
    image_size: tuple[int, int],
    audio_size: tuple[int, int],
    batch_size: int,
    rows: np.ndarray,
    swap: str = "",
    most: int = 0,
    make_plan: MakePlan | None = None,
) -> EvaluationData:
    """Opens the sets of `data` for evaluation; arguments as in EvaluationData, errors as in open_training_data."""
    return EvaluationData(
        open_sources(data, audio_size), data, image_size, audio_size, batch_size, rows, swap, most, make_plan
    )


def open_sources(data: DataConfig, audio_size: tuple[int, int]) -> list[ClipSource]:
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
    from av_mae.data import records  # brings in TFDS

    if {"label", "labels"} & set(data.annotations) and len(data.paths) > 1:
        check_classes({path: records.class_names(path) for path in data.paths})
    fields = dict.fromkeys((*FIELDS, *(field for name in data.annotations for field in RECORD_FIELDS[name])))
    stored = [records.open_source(path, data.split, tuple(fields)) for path in data.paths]
    return [
        ClipSource(path, Cached(source, data.cache * 1e9) if data.cache else source)
        for path, source in zip(data.paths, stored)
    ]


def _open_labels(data: DataConfig) -> list[Labels]:
    """The labels of each set. Raises UserError where one has none, or sets taken as one have different classes."""
    from av_mae.data import records

    if data.weights is None and len(data.paths) > 1:
        check_classes({path: records.class_names(path) for path in data.paths})
    labels = [records.read_labels(path, data.split) for path in data.paths]
    for path, own in zip(data.paths, labels):
        if not len(own.values):
            raise UserError(f"data.balanced=True needs classes, but no clip of {path} (split {data.split!r}) has one")
    return labels


def _without_full_shared_memory(dataset: grain.IterDataset, needed: int) -> grain.IterDataset:
    """Lets batches travel through pipes where they would not fit in shared memory (64 MB in many containers).

    A process that writes beyond it is killed by SIGBUS, without a message.
    """
    if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < needed:
        options = grain.experimental.DatasetOptions(min_shm_size=_ENDLESS)
        return grain.experimental.WithOptionsIterDataset(dataset, options)
    return dataset


def _give_up_name(array: grain.multiprocessing.SharedMemoryArray) -> None:
    """The memory lives as long as the array; without its name nothing is left behind however the process ends."""
    array.shm.unlink()
    array._unlink_on_del = False


def _prepare_worker(index: int, count: int) -> None:
    """Runs first in each worker process: it shares the fate of its parent, not of the terminal."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # whoever imports JAX in a worker must not take the accelerator
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A signal to the whole job must leave the workers alive while the trainer saves.
    signal.signal(signal.SIGTERM, lambda *_: _in_background(lambda: (time.sleep(_GRACE), os._exit(1))))
    _in_background(_end_with_parent)


def _in_background(action: Callable[[], object]) -> None:
    threading.Thread(target=action, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers; they would hold their memory for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
