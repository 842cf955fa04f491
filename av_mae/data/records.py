"""Prepared sets: records in ArrayRecord shards that `tfds.builder_from_directory` reads, TensorFlow or not.

A record is a dict; c labels, k frames, n boxes, j masks, m clean sounds, any of them may be 0:

`id` str · `labels` int64 [c], the classes of the clip, the most important first · `label` int64, the first of them
(-1: unknown), written by itself · `duration` float32 seconds · `source` str, the recording that the clip was cut from,
and `source_start` float32, the second of it where the clip begins ('' and 0: unknown) · `frames` k JPEG bytes ·
`frame_times` float32 [k] seconds of the clip · `sound` FLAC bytes, mono, the whole clip.

What is known of its objects, for the frame at the clip's middle: `boxes` float32 [n, 4] as (ymin, xmin, ymax, xmax) in
0…1 of the frame's height and width · `object_labels` int64 [n], classes (-1: unknown) · `sounding` int64 [n], 1 where
what is in the box sounds, 0 where it is silent · `box_annotators` int64 [n], the annotator (0 … `annotators` - 1) who
drew each box · `annotators` int64, how many looked at the frame (0: boxes are unknown; without a box that sounds,
nothing in the frame sounds).

`masks` j PNG bytes, 8-bit greyscale, of what sounds, and `mask_frames` int64 [j], the place in `frames` of the frame
that each describes, ascending. Pixels are 0 for background and 255 for what sounds, or, in a set with several classes
of pixels, the number of the class, which is that of `label` (class 0 is the background).

`sources` m times FLAC bytes, the clean sounds in `sound`, that of the (first) sounding object first.
"""

import contextlib
import functools
import io
import logging
import math
import os
import pathlib
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.data.labels import Labels, labels_file, load_labels, with_labels_file
from av_mae.errors import UserError
from av_mae.progress import Progress

VERSION = "2.0.0"  # raised with every change of the fields: other versions are refused
SHARD_CLIPS = 1000
BYTES = np.object_  # what TFDS calls a string of bytes
OTHER_FILES = 512  # that a process may have open beside the shards of one set
_STORED = "dataset_info.json"
_BEGUN = "prepare.json"  # what av_mae.prepare writes first


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; the class names are stored with the label."""
    def numbers(dtype: type, *shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype)

    return tfds.features.FeaturesDict({
        "id": tfds.features.Text(),
        "labels": numbers(np.int64, None),
        "label": tfds.features.ClassLabel(names=list(classes)),
        "duration": numbers(np.float32),
        "source": tfds.features.Text(),
        "source_start": numbers(np.float32),
        "frames": numbers(BYTES, None),
        "frame_times": numbers(np.float32, None),
        "sound": numbers(BYTES),
        "boxes": numbers(np.float32, None, 4),
        "object_labels": numbers(np.int64, None),
        "sounding": numbers(np.int64, None),
        "box_annotators": numbers(np.int64, None),
        "annotators": numbers(np.int64),
        "masks": numbers(BYTES, None),
        "mask_frames": numbers(np.int64, None),
        "sources": numbers(BYTES, None),
    })


# What a record holds of the fields that its maker does not know.
_NO_NUMBERS = np.zeros(0, np.int64)
UNKNOWN = {"labels": _NO_NUMBERS, "source": "", "source_start": np.float32(0), "boxes": np.zeros((0, 4), np.float32),
           "object_labels": _NO_NUMBERS, "sounding": _NO_NUMBERS, "box_annotators": _NO_NUMBERS,
           "annotators": np.int64(0), "masks": (), "mask_frames": _NO_NUMBERS, "sources": ()}
_PER_BOX = ("boxes", "object_labels", "sounding", "box_annotators")


def complete(record: Mapping, classes: int) -> dict:
    """A record as it is stored, from the fields that its maker knows: `id`, `duration`, `frames`, `frame_times`,
    `sound` and any of UNKNOWN. `label` is not given but taken from `labels`.

    Raises ValueError where a field is missing, unknown or of another length than those that belong to it, or a label is
    none of the `classes`.
    """
    needed = {"id", "duration", "frames", "frame_times", "sound"}
    wrong = (needed - record.keys()) | (record.keys() - needed - UNKNOWN.keys())
    if wrong:
        raise ValueError(f"record {record.get('id')!r}: missing or unknown fields {', '.join(sorted(wrong))}")
    whole = UNKNOWN | record
    for names in (_PER_BOX, ("masks", "mask_frames"), ("frames", "frame_times")):
        lengths = [len(whole[name]) for name in names]
        if len(set(lengths)) > 1:
            raise ValueError(f"record {record['id']!r}: {', '.join(names)} must be equally long, got {lengths}")
    highest = max([-1, *whole["labels"], *whole["object_labels"]])
    if highest >= classes:
        raise ValueError(f"record {record['id']!r}: label {highest} is none of {classes} classes")
    whole["label"] = int(whole["labels"][0]) if len(whole["labels"]) else -1
    return whole | {name: np.array(whole[name], BYTES) for name in ("frames", "masks", "sources")}


class _StableWriter(tfds.core.ExampleWriter):
    """Writes records with their fields in a fixed order: protobuf's own order changes from process to process."""

    def write(self, path, examples):
        ordered = ((key, tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True))
                   for key, example in examples)
        try:
            return super().write(path, ordered)
        except RuntimeError as error:  # so says ArrayRecord that the file system refused, e.g. on a full disk
            raise OSError(f"{error}") from error


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the records it is given, in their order."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # nothing to download; TFDS would look for lists of checksums beside this file
    url_infos: Mapping = {}

    def __init__(self, name: str, description: str, classes: Sequence[str], splits: Mapping, folder: str):
        self.name, self._text, self._classes, self._splits = name, description, classes, splits
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features(self._classes), description=self._text,
                                     disable_shuffling=True)

    def _split_generators(self, manager):
        return {split: self._generate_examples(records) for split, records in self._splits.items()}

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _StableWriter(self.info.file_format)

    def _generate_examples(self, records: Callable[[], Iterator[dict]]):
        for number, record in enumerate(records()):
            yield number, complete(record, len(self._classes))


def write_set(folder: str | os.PathLike, name: str, description: str, classes: Sequence[str],
              splits: Mapping[str, Callable[[], Iterator[dict]]], clips: int) -> None:
    """Writes a set's shards and its TFDS description into an existing `folder`.

    `splits` maps a split's name to a function that yields its records (see `complete`) in their final order; `clips` is
    the size of the largest split, by which the number of shards is chosen.
    """
    folder = pathlib.Path(folder)
    splits = {split: functools.partial(with_labels_file, folder / labels_file(split), make)
              for split, make in splits.items()}
    builder = Builder(name, description, classes, splits, os.fspath(folder / "tfds"))
    download = tfds.download.DownloadConfig(num_shards=math.ceil(clips / SHARD_CLIPS))
    with _quiet():
        builder.download_and_prepare(download_config=download)
    for path in pathlib.Path(builder.data_path).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "tfds")


def read_labels(path: str | os.PathLike, split: str) -> Labels:
    """The labels of a split: from its file, or, where it has none, from all records, which takes time.

    A record that cannot be read counts as without labels. Raises UserError as open_source.
    """
    source = open_source(path, split, ("labels",))
    stored = load_labels(pathlib.Path(path, labels_file(split)), len(source))
    if stored is not None:
        return stored
    clips = []
    with Progress(len(source), f"reading the labels of {path}") as progress:
        for number in range(len(source)):
            clips.append(())
            with contextlib.suppress(OSError):
                clips[-1] = source[number]["labels"]
            progress.update()
    return Labels.of(clips)


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS's own bars and messages away; the command shows its own."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def allow_open_files(shards: int) -> None:
    """Lets this process keep all shards of a set open, a file each; many systems allow 1,024 unless asked.

    Raises UserError where the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + OTHER_FILES
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"a set of {shards} shards needs about {needed} open files, this system allows {hard}: raise "
                        f"its limit (ulimit -Hn {needed}), or prepare the set with larger shards")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class RecordSource:
    """Random access to one split of a prepared set. Can be pickled; each process opens the shards by itself.

    Only `fields` are decoded (None: all). A record that cannot be read raises OSError with its shard and the cause.
    """

    def __init__(self, path: str, split: str, fields: Sequence[str] | None = None):
        self.path, self.split, self.fields = path, split, fields
        self._source = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def _open(self):
        if self._source is None:
            builder = tfds.builder_from_directory(self.path)
            split = builder.info.splits[self.split]
            self._shards, self._ends = sorted(split.filenames), np.cumsum(split.shard_lengths)
            allow_open_files(len(self._shards))
            self._source = builder.as_data_source(split=self.split,
                                                  deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        return self._source

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> dict:
        source = self._open()
        try:
            content = source[int(index)]
        except RuntimeError as error:  # of ArrayRecord; the rest of its message is checksums and places
            shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
            raise OSError(f"{shard} is damaged or cut off: {str(error).split(' (')[0].split(';')[0]}") from error
        stored = tf_example_pb2.Example.FromString(content).features.feature
        return {name: _PARSERS[name](stored[name]) for name in self.fields or _PARSERS}

    def __repr__(self) -> str:
        return f"RecordSource(path={self.path!r}, split={self.split!r})"


# The same values as by TFDS's own parser, which is general and takes three times as long.
def _text(stored) -> str:
    return stored.bytes_list.value[0].decode()


def _bytes(stored) -> bytes:
    return stored.bytes_list.value[0]


def _byte_strings(stored) -> np.ndarray:
    return np.array(stored.bytes_list.value, BYTES)


def _integer(stored) -> np.int64:
    return np.int64(stored.int64_list.value[0])


def _integers(stored) -> np.ndarray:
    return np.array(stored.int64_list.value, np.int64)


def _float(stored) -> np.float32:
    return np.float32(stored.float_list.value[0])


def _floats(stored) -> np.ndarray:
    return np.array(stored.float_list.value, np.float32)


_PARSERS: dict[str, Callable] = {
    "id": _text, "labels": _integers, "label": _integer, "duration": _float, "source": _text, "source_start": _float,
    "frames": _byte_strings, "frame_times": _floats, "sound": _bytes,
    "boxes": lambda stored: _floats(stored).reshape(-1, 4), "object_labels": _integers, "sounding": _integers,
    "box_annotators": _integers, "annotators": _integer, "masks": _byte_strings, "mask_frames": _integers,
    "sources": _byte_strings}


def _stored_builder(path: str | os.PathLike):
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"data folder {path} does not exist; make a set with: python -m av_mae.prepare "
                        f"--dataset=toy_band --output={path}")
    if (path / _BEGUN).is_file() and not (path / _STORED).is_file():
        raise UserError(f"the set in {path} is not complete; run the command that prepares it again, it goes on where "
                        "it stopped")
    if not (path / _STORED).is_file():
        raise UserError(f"data folder {path} holds no prepared set (no {_STORED}); make one with: "
                        "python -m av_mae.prepare --dataset=NAME --output=DIR")
    builder = tfds.builder_from_directory(os.fspath(path))
    if str(builder.version) != VERSION:
        raise UserError(f"{path} holds records of version {builder.version}, this program reads version {VERSION}: "
                        "delete the folder and prepare the set again")
    return builder


def open_source(path: str | os.PathLike, split: str, fields: Sequence[str] | None = None) -> RecordSource:
    """The records of one split of the prepared set in folder `path`, in stored order, with all or some `fields`.

    Raises UserError where the folder, the set or the split is not there, the set is of another version, or the split
    is empty.
    """
    splits = _stored_builder(path).info.splits
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}")
    if not splits[split].num_examples:
        raise UserError(f"split {split!r} of {path} holds no clips")
    missing = [os.fspath(shard) for shard in splits[split].filepaths if not pathlib.Path(shard).is_file()]
    if missing:
        raise UserError(f"{path} lacks the shard {missing[0]} of split {split!r}; prepare the set again")
    return RecordSource(os.fspath(path), split, fields)


class SplitSize(NamedTuple):
    clips: int
    shards: int
    bytes: int


class Description(NamedTuple):
    """A prepared set: its name, what its maker says of it, its classes' names by number, and its splits by name."""

    name: str
    text: str
    classes: list[str]
    splits: dict[str, SplitSize]


def describe(path: str | os.PathLike) -> Description:
    """What the prepared set in folder `path` holds. Raises UserError as open_source."""
    info = _stored_builder(path).info
    splits = {name: SplitSize(split.num_examples, split.num_shards, split.num_bytes)
              for name, split in info.splits.items()}
    return Description(info.name, " ".join(info.description.split()), class_names(path), splits)


def class_names(path: str | os.PathLike) -> list[str]:
    """The names of the classes of the prepared set in folder `path`, by number. Raises UserError as open_source."""
    return list(_stored_builder(path).info.features["label"].names)
