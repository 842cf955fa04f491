"""Records of prepared sets: their fields, the sets that hold them, and small sets kept in memory."""

import contextlib
import io
import os
import pathlib
import resource
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import soundfile
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.console import Progress
from av_mae.data import Record, Records
from av_mae.errors import UserError

VERSION = "2.0.0"  # raised with every change of the fields: other versions are refused
BYTES = np.object_  # what TFDS calls a string of bytes
OTHER_FILES = 512  # that a process may have open beside the shards of one set
_STORED = "dataset_info.json"
_BEGUN = "prepare.json"  # what av_mae.prepare writes first


class Labels(NamedTuple):
    """The classes of the clips of a set, in stored order: `counts` int64 [clips], how many each has, and `values` int64
    [sum of counts]. Clips whose classes are unknown have none."""

    counts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, clips: Iterable[Sequence[int]]) -> "Labels":
        """From the classes of each clip."""
        lists = [np.asarray(classes, np.int64) for classes in clips]
        return cls(np.array(list(map(len, lists)), np.int64), np.concatenate([np.zeros(0, np.int64), *lists]))

    @classmethod
    def joined(cls, sets: Sequence["Labels"]) -> "Labels":
        """Those of several sets, one after the other."""
        return cls(*(np.concatenate(parts) for parts in zip(*sets)))


# dtype and shape of the fields of a record; `str` is text, `()` one value, `None` any number of values.
FIELDS: dict[str, tuple[type, tuple[int | None, ...]]] = {
    "id": (str, ()),
    "labels": (np.int64, (None,)),
    "label": (np.int64, ()),
    "duration": (np.float32, ()),
    "source": (str, ()),
    "source_start": (np.float32, ()),
    "frames": (BYTES, (None,)),
    "frame_times": (np.float32, (None,)),
    "sound": (BYTES, ()),
    "boxes": (np.float32, (None, 4)),
    "object_labels": (np.int64, (None,)),
    "sounding": (np.int64, (None,)),
    "box_annotators": (np.int64, (None,)),
    "annotators": (np.int64, ()),
    "masks": (BYTES, (None,)),
    "mask_frames": (np.int64, (None,)),
    "sources": (BYTES, (None,)),
}

_LISTS: dict[type, str] = {np.int64: "int64_list", np.float32: "float_list"}  # of a tf.train.Feature


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; the class names are stored with the label."""
    made = {
        name: tfds.features.Text() if dtype is str else tfds.features.Tensor(shape=shape, dtype=dtype)
        for name, (dtype, shape) in FIELDS.items()
    }
    return tfds.features.FeaturesDict(made | {"label": tfds.features.ClassLabel(names=list(classes))})


def read_labels(path: str | os.PathLike[str], split: str) -> Labels:
    """The labels of a split: from its file, or, where it has none, from all records, which takes time.

    A record that cannot be read counts as without labels. Raises UserError as open_source.
    """
    source = open_source(path, split, ("labels",))
    stored = load_labels(pathlib.Path(path, labels_file(split)), len(source))
    if stored is not None:
        return stored
    clips: list[Sequence[int]] = []
    with Progress(len(source), f"reading the labels of {path}") as progress:
        for number in range(len(source)):
            clips.append(())
            with contextlib.suppress(OSError):
                clips[-1] = source[number]["labels"]
            progress.update()
    return Labels.of(clips)


def allow_open_files(shards: int) -> None:
    """Lets this process keep all shards of a set open, a file each; many systems allow 1,024 unless asked.

    Raises UserError where the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + OTHER_FILES
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"a set of {shards} shards needs about {needed} open files, this system allows {hard}: raise "
            f"its limit (ulimit -Hn {needed}), or prepare the set with larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class RecordSource:
    """Random access to one split of a prepared set. Can be pickled; each process opens the shards by itself.

    Only `fields` are decoded (`None` for all). A record that cannot be read raises OSError with its shard and the cause.
    """

    def __init__(self, path: str, split: str, fields: Sequence[str] | None = None):
        self.path, self.split, self.fields = path, split, fields
        self._source: Sequence[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def _open(self) -> Sequence[bytes]:
        if self._source is None:
            builder = tfds.builder_from_directory(self.path)
            split = builder.info.splits[self.split]
            self._shards, self._ends = sorted(split.filenames), np.cumsum(split.shard_lengths)
            allow_open_files(len(self._shards))
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split=self.split, deserialize_method=raw)
        return self._source

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> Record:
        source = self._open()
        try:
            content = source[int(index)]
        except RuntimeError as error:  # of ArrayRecord; the rest of its message is checksums and positions
            shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
            raise OSError(f"{shard} is damaged or cut off: {str(error).split(' (')[0].split(';')[0]}") from error
        stored = tf_example_pb2.Example.FromString(content).features.feature
        record: Record = {}
        # The same values as by TFDS's own parser, which is general and takes three times as long.
        for name in self.fields or FIELDS:
            dtype, shape = FIELDS[name]
            kind = _LISTS.get(dtype, "bytes_list")
            values = getattr(stored[name], kind).value
            if shape:
                array: np.ndarray = np.array(values, dtype)
                record[name] = array.reshape(-1, *shape[1:]) if len(shape) > 1 else array
            else:
                record[name] = values[0] if dtype is BYTES else values[0].decode() if dtype is str else dtype(values[0])
        return record

    def __repr__(self) -> str:
        return f"RecordSource(path={self.path!r}, split={self.split!r})"


def _stored_builder(path: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(
            f"data folder {path} does not exist; make a set with: python -m av_mae.prepare "
            f"--dataset=toy_band --output={path}"
        )
    if (path / _BEGUN).is_file() and not (path / _STORED).is_file():
        raise UserError(
            f"the set in {path} is not complete; run the command that prepares it again, it goes on where it stopped"
        )
    if not (path / _STORED).is_file():
        raise UserError(
            f"data folder {path} holds no prepared set (no {_STORED}); make one with: "
            "python -m av_mae.prepare --dataset=NAME --output=DIR"
        )
    builder = tfds.builder_from_directory(os.fspath(path))
    if str(builder.version) != VERSION:
        raise UserError(
            f"{path} holds records of version {builder.version}, this program reads version {VERSION}: "
            "delete the folder and prepare the set again"
        )
    return builder


def open_source(path: str | os.PathLike[str], split: str, fields: Sequence[str] | None = None) -> RecordSource:
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


def describe(path: str | os.PathLike[str]) -> Description:
    """What the prepared set in folder `path` holds. Raises UserError as open_source."""
    info = _stored_builder(path).info
    splits = {
        name: SplitSize(split.num_examples, split.num_shards, split.num_bytes) for name, split in info.splits.items()
    }
    return Description(info.name, " ".join(info.description.split()), class_names(path), splits)


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the classes of the prepared set in folder `path`, by number. Raises UserError as open_source."""
    return list(_stored_builder(path).info.features["label"].names)


def labels_file(split: str) -> str:
    """The file in a set's folder that holds the labels of a split's clips, for what needs those of all clips."""
    return f"labels-{split}.npz"


def load_labels(path: pathlib.Path, clips: int) -> Labels | None:
    """What a labels file of a split of `clips` clips holds; None where it is not there or damaged."""
    try:
        with np.load(path) as stored:
            labels = Labels(stored["counts"].astype(np.int64), stored["values"].astype(np.int64))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = len(labels.counts) == clips and labels.counts.sum() == len(labels.values)
    return labels if whole else None


class Cached:
    """Records as they are read the first time, kept until `limit` bytes are taken; later ones are read each time.

    Audio is kept as 16-bit WAV: decoding FLAC costs five times as much as reading that. Each process that reads has a
    cache of its own.
    """

    def __init__(self, records: Records, limit: float):
        self._records, self._limit = records, limit
        self._kept: dict[int, Record] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_bytes": 0}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if index in self._kept:
            return self._kept[index]
        record = self._records[index]
        if self._bytes < self._limit:
            record = record | {"sound": _decoded(record["sound"])}
            encoded = [record["sound"], *record["frames"], *record.get("masks", ()), *record.get("sources", ())]
            self._bytes += sum(map(len, encoded))
            if self._bytes <= self._limit:
                self._kept[index] = record
        return record


def _decoded(encoded: bytes) -> bytes:
    """Audio of up to 16 bits as WAV; any other, or one that cannot be decoded, as it is."""
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            samples, rate = file.read(dtype="int16"), file.samplerate
            if file.subtype != "PCM_16" or len(samples) < file.frames:
                return encoded
    except soundfile.LibsndfileError:
        return encoded
    decoded = io.BytesIO()
    soundfile.write(decoded, samples, rate, format="WAV", subtype="PCM_16")
    return decoded.getvalue()
