"""Records of prepared sets: their fields, and the sets that hold them."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import resource
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from av_mae import console
from av_mae.console import Progress
from av_mae.data import Record
from av_mae.data.copies import folder_of
from av_mae.errors import UserError

VERSION = "2.0.0"  # raised with every change of the fields: other versions are refused
BYTES = np.object_  # what TFDS calls a string of bytes
OTHER_FILES = 512  # that a process may have open beside the shards of one set
_STORED, _FEATURES, _CLASSES = "dataset_info.json", "features.json", "label.labels.txt"
_MODULE = "tensorflow_datasets.core.features"  # as features.json names the classes of TFDS; compared, never imported
_NO_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # of shards' names
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
    """The TFDS features of a record; the class names are stored with the label.

    Raises UserError for names that a line of a file cannot hold: blank ones, such with line ends or control characters,
    and those that differ in spaces around them or in how accents are encoded alone.
    """
    for name in classes:
        if not name.strip() or _NO_LINE.search(name):
            raise UserError(f"class name {name!r} is blank, or holds a line end or what cannot be printed: rename it")
    looks = collections.Counter(unicodedata.normalize("NFC", name.strip()) for name in classes)
    if twice := [name for name, count in looks.items() if count > 1]:
        raise UserError(f"class name {twice[0]!r} stands for several classes: rename one of them")
    made = {
        name: tfds.features.Text() if dtype is str else tfds.features.Tensor(shape=shape, dtype=dtype)
        for name, (dtype, shape) in FIELDS.items()
    }
    label = tfds.features.ClassLabel(names=list(classes), doc=_names_digest(classes))
    return tfds.features.FeaturesDict(made | {"label": label})


def _names_digest(classes: Sequence[str]) -> str:
    """What features.json says of the names, which lie in a file of their own and have no other check."""
    return f"SHA-256 of the names: {hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()}"


def read_labels(path: str | os.PathLike[str], split: str) -> Labels:
    """The labels of a split: from its file, or, where it has none, from all records, which takes time.

    A record that cannot be read counts as without labels. Raises UserError as open_source.
    """
    source = open_source(path, split, ("labels",))
    stored = load_labels(folder_of(path) / labels_file(split), len(source))
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

    Only `fields` are decoded (`None` for all). A record that cannot be read raises OSError with shard and cause.
    """

    def __init__(self, path: str, split: str, fields: Sequence[str] | None = None):
        self.path, self.split, self.fields = path, split, fields

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    @functools.cached_property
    def _source(self) -> Sequence[bytes]:
        split = describe(self.path).splits[self.split]
        filled = [(shard, length) for shard, length in zip(split.shards, split.lengths, strict=True) if length]
        self._shards, self._ends = [shard for shard, _ in filled], np.cumsum([length for _, length in filled])
        allow_open_files(len(filled))
        opened: Sequence[bytes] = ArrayRecordDataSource([f"{self.path}/{name}[0:{length}]" for name, length in filled])
        return opened

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        source, record = self._source, {}
        try:
            stored = tf_example_pb2.Example.FromString(source[int(index)]).features.feature
            # The same values as by TFDS's own parser, which is general and takes three times as long.
            for name in self.fields or FIELDS:
                dtype, shape = FIELDS[name]
                values = getattr(stored[name], _LISTS.get(dtype, "bytes_list")).value
                if shape:
                    array: np.ndarray = np.array(values, dtype)
                    record[name] = array.reshape(-1, *shape[1:]) if len(shape) > 1 else array
                elif dtype is BYTES:
                    record[name] = values[0]
                else:
                    record[name] = values[0].decode() if dtype is str else dtype(values[0])
        except (RuntimeError, IndexError, ValueError, message.DecodeError) as error:
            # the rest of ArrayRecord's messages, RuntimeErrors, is checksums and positions
            read = not isinstance(error, RuntimeError)
            cause = f"record {index} lacks fields" if read else str(error).split(" (")[0].split(";")[0]
            shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
            raise OSError(f"{shard} is damaged or cut off: {cause}") from error
        return record

    def __repr__(self) -> str:
        return f"RecordSource(path={self.path!r}, split={self.split!r})"


class Split(NamedTuple):
    """The files of a split in order, how many clips each holds, and the bytes of all records."""

    shards: list[str]
    lengths: list[int]
    bytes: int

    @property
    def clips(self) -> int:
        return sum(self.lengths)


class Description(NamedTuple):
    """A prepared set: its name, what its maker says of it, its classes' names by number, and its splits by name."""

    name: str
    text: str
    classes: list[str]
    splits: dict[str, Split]


def _damaged(path: pathlib.Path, file: str, cause: str) -> UserError:
    return UserError(f"the set in {path} is damaged: prepare it again ({file}: {cause})")


def _read_json(path: pathlib.Path, file: str) -> dict[str, Any]:
    try:
        value = json.loads((path / file).read_bytes().decode())
    except FileNotFoundError:
        raise _damaged(path, file, "is not there") from None
    except OSError as error:
        raise UserError(f"{path / file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, file, f"is no UTF-8 JSON file, {console.first_line(error)}") from error
    if not isinstance(value, dict):
        raise _damaged(path, file, "is no JSON object")
    return value


def describe(path: str | os.PathLike[str]) -> Description:
    """What the prepared set in folder `path` holds. Raises UserError as open_source.

    The set's files are compared with what this program writes; nothing that they name is imported.
    """
    path = folder_of(path)
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
    info = _read_json(path, _STORED)
    if info.get("version") != VERSION and isinstance(info.get("version"), str):
        raise UserError(
            f"{path} holds records of version {info['version']}, this program reads version {VERSION}: "
            "delete the folder and prepare the set again"
        )
    try:
        name, text = str(info["name"]), " ".join(str(info.get("description", "")).split())
        if info["version"] != VERSION or info["fileFormat"] != "array_record" or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError("version, file format or name are none of a prepared set")
        splits = {str(split["name"]): _split(name, split) for split in info["splits"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, _STORED, console.first_line(error)) from error
    return Description(name, text, _read_classes(path), splits)


def _split(name: str, stored: dict[str, Any]) -> Split:
    """A split of the set `name` as its description has it. Raises ValueError, KeyError or TypeError."""
    split, lengths = stored["name"], [int(length) for length in stored.get("shardLengths", ())]
    if not re.fullmatch(r"\w[\w.-]*", split) or stored.get("filepathTemplate", _TEMPLATE) != _TEMPLATE:
        raise ValueError(f"split {split!r} or its files are named in another way")
    if min(lengths, default=0) < 0:
        raise ValueError(f"split {split!r} has shards of {min(lengths)} records")
    count = len(lengths)
    shards = [f"{name}-{split}.array_record-{number:05d}-of-{count:05d}" for number in range(count)]
    return Split(shards, lengths, int(stored.get("numBytes", 0)))


def _read_classes(path: pathlib.Path) -> list[str]:
    """The class names of a set, after a look at whether its fields are those of this program."""
    stored = _read_json(path, _FEATURES)
    try:
        fields = stored["featuresDict"]["features"]
        for name in sorted(fields.keys() | FIELDS.keys()):
            if name not in fields or name not in FIELDS or _kind_of(fields[name]) != _expected_kind(name):
                raise ValueError(f"field {name!r} is none that this program writes")
        count = int(fields["label"]["classLabel"].get("numClasses", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, _FEATURES, console.first_line(error)) from error
    try:
        content = (path / _CLASSES).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise _damaged(path, _CLASSES, getattr(error, "strerror", None) or "is no UTF-8 text") from error
    names = content.removesuffix("\n").split("\n") if count else []
    if len(names) != count or not content.endswith("\n"):
        raise _damaged(path, _CLASSES, f"holds {len(names)} names of {count} classes, or is cut off")
    if names and fields["label"].get("description", digest := _names_digest(names)) != digest:
        raise _damaged(path, _CLASSES, "holds other names than were stored, or in another order")
    return names


def _kind_of(field: dict[str, Any]) -> tuple[str, str, list[str]]:
    """The class, dtype and shape that features.json names for a field."""
    tensor = field.get("tensor", {})
    return field["pythonClassName"], tensor.get("dtype", ""), tensor.get("shape", {}).get("dimensions", [])


def _expected_kind(name: str) -> tuple[str, str, list[str]]:
    dtype, shape = FIELDS[name]
    if name == "label" or dtype is str:
        kind = "class_label_feature.ClassLabel" if name == "label" else "text_feature.Text"
        return f"{_MODULE}.{kind}", "", []
    dimensions = ["-1" if size is None else str(size) for size in shape]
    return f"{_MODULE}.tensor_feature.Tensor", "string" if dtype is BYTES else np.dtype(dtype).name, dimensions


def open_source(path: str | os.PathLike[str], split: str, fields: Sequence[str] | None = None) -> RecordSource:
    """The records of one split of the prepared set in folder `path`, in stored order, with all or some `fields`.

    Raises UserError where the folder, the set or the split is not there, the set is of another version, or the split
    is empty.
    """
    path = folder_of(path)
    splits = describe(path).splits
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}")
    if not splits[split].clips:
        raise UserError(f"split {split!r} of {path} holds no clips")
    for shard in splits[split].shards:
        file = pathlib.Path(path, shard)
        if not file.is_file():
            raise UserError(f"{path} lacks the shard {file} of split {split!r}; prepare the set again")
    return RecordSource(os.fspath(path), split, fields)


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the classes of the prepared set in folder `path`, by number. Raises UserError as open_source."""
    return describe(path).classes


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
