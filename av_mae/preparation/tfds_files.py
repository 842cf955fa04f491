"""What makes a folder of shards a TFDS data set: stored records and the files that describe them."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.splits import SplitDict
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.data import records
from av_mae.data.labels import encode_labels, labels_file
from av_mae.storage import Folder

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
        example = serializer.serialize_example(features.encode_example(records.complete(record, len(classes))))
        return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)

    return encode


def description_files(name: str, text: str, classes: Sequence[str], splits: Mapping[str, Split]) -> dict[str, bytes]:
    """The files of a TFDS data set besides its shards, the one that makes it readable last."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        builder = records.Builder(name, text, classes, {}, folder)
        template = ShardedFileTemplate(pathlib.Path(folder), dataset_name=name, filetype_suffix="array_record")
        builder.info.set_splits(SplitDict([
            tfds.core.SplitInfo(split, list(known.shard_lengths), known.bytes,
                                filename_template=template.replace(split=split))
            for split, known in splits.items()]))
        builder.info.write_to_directory(folder)
        files = {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir()) if path.is_file()}
    files |= {labels_file(split): encode_labels(known.labels) for split, known in splits.items()}
    return {file: files[file] for file in sorted(files, key=lambda file: (file == DESCRIPTION, file))}


@contextlib.contextmanager
def _quiet():
    """TFDS prints where it reads and writes."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def write_description(output: Folder, files: Mapping[str, bytes]) -> None:
    """Writes the files in their order."""
    for name, content in files.items():
        output.write(name, content)
