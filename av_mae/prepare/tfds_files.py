"""What makes a folder of shards a TFDS data set: stored records and the files that describe them."""

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.splits import SplitDict
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.data import records
from av_mae.data.records import BYTES, VERSION, Labels, features, labels_file
from av_mae.storage import Folder

SHARD_CLIPS = 1000


# What a record holds of the fields that its maker does not know.
_NO_NUMBERS = np.zeros(0, np.int64)
UNKNOWN = {
    "labels": _NO_NUMBERS,
    "source": "",
    "source_start": np.float32(0),
    "boxes": np.zeros((0, 4), np.float32),
    "object_labels": _NO_NUMBERS,
    "sounding": _NO_NUMBERS,
    "box_annotators": _NO_NUMBERS,
    "annotators": np.int64(0),
    "masks": (),
    "mask_frames": _NO_NUMBERS,
    "sources": (),
}
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
        ordered = (
            (key, tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True))
            for key, example in examples
        )
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
        return tfds.core.DatasetInfo(
            builder=self, features=features(self._classes), description=self._text, disable_shuffling=True
        )

    def _split_generators(self, manager):
        return {split: self._generate_examples(records) for split, records in self._splits.items()}

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _StableWriter(self.info.file_format)

    def _generate_examples(self, records: Callable[[], Iterator[dict]]):
        for number, record in enumerate(records()):
            yield number, complete(record, len(self._classes))


def write_set(
    folder: str | os.PathLike,
    name: str,
    description: str,
    classes: Sequence[str],
    splits: Mapping[str, Callable[[], Iterator[dict]]],
    clips: int,
) -> None:
    """Writes a set's shards and its TFDS description into an existing `folder`.

    `splits` maps a split's name to a function that yields its records (see `complete`) in their final order; `clips` is
    the size of the largest split, by which the number of shards is chosen.
    """
    folder = pathlib.Path(folder)
    splits = {
        split: functools.partial(with_labels_file, folder / labels_file(split), make) for split, make in splits.items()
    }
    builder = Builder(name, description, classes, splits, os.fspath(folder / "tfds"))
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


def encode_labels(clips: Iterable[Sequence[int]]) -> bytes:
    """The content of a labels file, from the labels of each clip in stored order."""
    labels, content = Labels.of(clips), io.BytesIO()
    np.savez_compressed(content, counts=labels.counts.astype(np.int32), values=labels.values.astype(np.int32))
    return content.getvalue()


def with_labels_file(path: pathlib.Path, make: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The records that `make` yields; at their end their labels are written to `path`."""
    clips = []
    for record in make():
        clips.append(record.get("labels", ()))
        yield record
    path.write_bytes(encode_labels(clips))


DESCRIPTION = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """How many records each shard of a split has, the bytes of them all, and the labels of each."""

    shard_lengths: tuple[int, ...]
    bytes: int
    labels: tuple[Sequence[int], ...]


def encoder(classes: Sequence[str]) -> Callable[[Mapping[str, Any]], bytes]:
    """A function from a record (see records.complete) to the bytes that are stored; the same record, the same bytes."""
    features = records.features(classes)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def encode(record: Mapping[str, Any]) -> bytes:
        example = serializer.serialize_example(features.encode_example(complete(record, len(classes))))
        return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)

    return encode


def description_files(name: str, text: str, classes: Sequence[str], splits: Mapping[str, Split]) -> dict[str, bytes]:
    """The files of a TFDS data set besides its shards, the one that makes it readable last."""
    with tempfile.TemporaryDirectory() as folder, _silent():
        builder = Builder(name, text, classes, {}, folder)
        template = ShardedFileTemplate(pathlib.Path(folder), dataset_name=name, filetype_suffix="array_record")
        builder.info.set_splits(
            SplitDict(
                [
                    tfds.core.SplitInfo(
                        split, list(known.shard_lengths), known.bytes, filename_template=template.replace(split=split)
                    )
                    for split, known in splits.items()
                ]
            )
        )
        builder.info.write_to_directory(folder)
        files = {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir()) if path.is_file()}
    files |= {labels_file(split): encode_labels(known.labels) for split, known in splits.items()}
    return {file: files[file] for file in sorted(files, key=lambda file: (file == DESCRIPTION, file))}


@contextlib.contextmanager
def _silent():
    """TFDS prints where it reads and writes."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def write_description(output: Folder, files: Mapping[str, bytes]) -> None:
    """Writes the files in their order."""
    for name, content in files.items():
        output.write(name, content)
