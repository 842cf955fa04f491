"""Prepared sets: records in ArrayRecord shards that `tfds.builder_from_directory` reads, TensorFlow or not.

A record is a dict; n objects, k frames, m sources, any of them may be 0:

`id` str · `label` int64, the class (-1: unknown) · `duration` float32 seconds · `frames` k JPEG bytes ·
`frame_times` float32 [k] seconds · `sound` FLAC bytes, mono, the whole clip · `boxes` float32 [n, 4] as (ymin, xmin,
ymax, xmax) in 0…1 · `object_labels` int64 [n] · `sounding` int64, index of the sounding object (-1: unknown) ·
`mask` PNG bytes, 255 at the sounding object's pixels (empty: unknown) · `sources` m times FLAC bytes, the clean
sounds, that of the sounding object first.
"""

import contextlib
import io
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.errors import UserError

VERSION = "1.0.0"
SHARD_CLIPS = 1000
BYTES = np.object_  # what TFDS calls a string of bytes
_STORED = "dataset_info.json"


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; the class names are stored with the label."""
    tensor = tfds.features.Tensor
    return tfds.features.FeaturesDict({
        "id": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=list(classes)),
        "duration": tensor(shape=(), dtype=np.float32),
        "frames": tensor(shape=(None,), dtype=BYTES),
        "frame_times": tensor(shape=(None,), dtype=np.float32),
        "sound": tensor(shape=(), dtype=BYTES),
        "boxes": tensor(shape=(None, 4), dtype=np.float32),
        "object_labels": tensor(shape=(None,), dtype=np.int64),
        "sounding": tensor(shape=(), dtype=np.int64),
        "mask": tensor(shape=(), dtype=BYTES),
        "sources": tensor(shape=(None,), dtype=BYTES),
    })


class _StableWriter(tfds.core.ExampleWriter):
    """Writes records with their fields in a fixed order: protobuf's own order changes from process to process."""

    def write(self, path, examples):
        ordered = ((key, tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True))
                   for key, example in examples)
        try:
            return super().write(path, ordered)
        except RuntimeError as error:  # so says ArrayRecord that the file system refused, e.g. on a full disk
            raise OSError(f"{error}") from error


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
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
            lists = {name: np.array(record[name], BYTES) for name in ("frames", "sources")}
            yield number, record | lists


def write_set(folder: str | os.PathLike, name: str, description: str, classes: Sequence[str],
              splits: Mapping[str, Callable[[], Iterator[dict]]], clips: int) -> None:
    """Writes a set's shards and its TFDS description into an existing `folder`.

    `splits` maps a split's name to a function that yields its records in their final order; `clips` is the size of
    the largest split, by which the number of shards is chosen.
    """
    folder = pathlib.Path(folder)
    builder = _Builder(name, description, classes, splits, os.fspath(folder / "tfds"))
    download = tfds.download.DownloadConfig(num_shards=math.ceil(clips / SHARD_CLIPS))
    with _quiet():
        builder.download_and_prepare(download_config=download)
    for path in pathlib.Path(builder.data_path).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "tfds")


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


class RecordSource:
    """Random access to one split of a prepared set. Can be pickled; each process opens the shards by itself.

    Only `fields` are decoded (None: all).
    """

    def __init__(self, path: str, split: str, fields: Sequence[str] | None = None):
        self.path, self.split, self.fields = path, split, fields
        self._source = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def _open(self):
        if self._source is None:
            self._source = tfds.builder_from_directory(self.path).as_data_source(
                split=self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        return self._source

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> dict:
        stored = tf_example_pb2.Example.FromString(self._open()[int(index)]).features.feature
        return {name: _PARSERS[name](stored[name]) for name in self.fields or _PARSERS}

    def __repr__(self) -> str:
        return f"RecordSource(path={self.path!r}, split={self.split!r})"


# The same values as by TFDS's own parser, which is general and takes three times as long.
_PARSERS: dict[str, Callable] = {
    "id": lambda stored: stored.bytes_list.value[0].decode(),
    "label": lambda stored: np.int64(stored.int64_list.value[0]),
    "duration": lambda stored: np.float32(stored.float_list.value[0]),
    "frames": lambda stored: np.array(stored.bytes_list.value, BYTES),
    "frame_times": lambda stored: np.array(stored.float_list.value, np.float32),
    "sound": lambda stored: stored.bytes_list.value[0],
    "boxes": lambda stored: np.array(stored.float_list.value, np.float32).reshape(-1, 4),
    "object_labels": lambda stored: np.array(stored.int64_list.value, np.int64),
    "sounding": lambda stored: np.int64(stored.int64_list.value[0]),
    "mask": lambda stored: stored.bytes_list.value[0],
    "sources": lambda stored: np.array(stored.bytes_list.value, BYTES),
}


def _stored_builder(path: str | os.PathLike):
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"data folder {path} does not exist; make a set with: python -m av_mae.prepare "
                        f"--dataset=toy_band --output={path}")
    if not (path / _STORED).is_file():
        raise UserError(f"data folder {path} holds no prepared set (no {_STORED}); make one with: "
                        "python -m av_mae.prepare --dataset=NAME --output=DIR")
    return tfds.builder_from_directory(os.fspath(path))


def open_source(path: str | os.PathLike, split: str, fields: Sequence[str] | None = None) -> RecordSource:
    """The records of one split of the prepared set in folder `path`, in stored order, with all or some `fields`.

    Raises UserError where the folder, the set or the split is not there, or the split is empty.
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


def class_names(path: str | os.PathLike) -> list[str]:
    """The names of the classes of the prepared set in folder `path`, by number. Raises UserError as open_source."""
    return list(_stored_builder(path).info.features["label"].names)
