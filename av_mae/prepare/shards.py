"""Shards of a prepared set and the files that make a folder of shards a TFDS data set.

A shard is written so that it is there whole or not at all; it is finished when its summary is there. Summaries, and
files being written, lie in the set's folder UNFINISHED, which is gone when the set is complete.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.splits import SplitDict
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.data.records import BYTES, VERSION, Labels, features, labels_file
from av_mae.errors import UserError
from av_mae.prepare.clips import Outcome
from av_mae.prepare.readers.catalogue import Finding, SourceClip
from av_mae.storage import TEMPORARY, Folder

DESCRIPTION = "dataset_info.json"
UNFINISHED = "unfinished"
# Measured with 300 kB records: reading one of a group of 4 costs 4 times as much, of 16 20 times; JPEG and FLAC do not
# get smaller, and not trying saves a fifth of the time.
WRITER_OPTIONS = "group_size:1,uncompressed"
SHARD_CLIPS = 1000  # of sets that write_set writes
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


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` of the `count` parts of a split, and its clips in the order of their records."""

    dataset: str
    split: str
    number: int
    count: int
    clips: tuple[SourceClip, ...]

    @property
    def file(self) -> str:
        return f"{self.dataset}-{self.split}.array_record-{self.number:05d}-of-{self.count:05d}"

    @property
    def summary(self) -> str:
        return f"{UNFINISHED}/{self.split}-{self.number:05d}.json"


def plan(dataset: str, clips: Sequence[SourceClip], seed: int, shard_clips: int) -> list[Shard]:
    """The shards of all splits.

    The order within a split is that of hashes of seed and id: the clips of a shard are a random sample, and depend on
    nothing else.

    Args:
        dataset: name of the set.
        clips: in any order.
        seed: of the order.
        shard_clips: clips per shard.
    """
    shards = []
    for split in sorted({clip.split for clip in clips}):
        ordered = sorted((clip for clip in clips if clip.split == split), key=lambda clip: _order(seed, clip.id))
        parts = [tuple(ordered[start : start + shard_clips]) for start in range(0, len(ordered), shard_clips)]
        shards += [Shard(dataset, split, number, len(parts), part) for number, part in enumerate(parts)]
    return shards


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def unfinished(output: Folder, plan: Sequence[Shard]) -> list[Shard]:
    """The shards that are yet to be written."""
    there = set(output.files(UNFINISHED))
    return [shard for shard in plan if shard.summary not in there]


def write_shard(
    output: Folder,
    shard: Shard,
    outcomes: Iterable[tuple[SourceClip, Outcome]],
    encode: Callable[[dict[str, Any]], bytes],
) -> None:
    """Writes the records of a shard's clips, then its summary: {'stored', 'bytes', 'clips', 'findings'}.

    Args:
        output: folder of the set.
        shard: what to write.
        outcomes: each clip of the shard and what became of it, in order.
        encode: a record → the bytes that are stored (see `encoder`).
    """
    summary: dict[str, Any] = {"stored": 0, "bytes": 0, "clips": [], "findings": []}
    folder = output.path(UNFINISHED) if output.is_local else tempfile.gettempdir()
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{shard.file}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        writer = ArrayRecordWriter(temporary, WRITER_OPTIONS)
        for content in _records(shard, outcomes, encode, summary):
            writer.write(content)
        writer.close()
    except RuntimeError as error:  # so says ArrayRecord that the file system refused, e.g. on a full disk
        raise OSError(str(error)) from error
    output.put(temporary, shard.file)
    output.write(shard.summary, json.dumps(summary).encode())


def _records(
    shard: Shard,
    outcomes: Iterable[tuple[SourceClip, Outcome]],
    encode: Callable[[dict[str, Any]], bytes],
    summary: dict[str, Any],
) -> Iterator[bytes]:
    for clip, outcome in outcomes:
        summary["findings"] += [
            dataclasses.astuple(Finding(cause, clip.id, stage, message, shard.split))
            for cause, stage, message in outcome.findings
        ]
        if outcome.record is not None:
            content = encode(outcome.record)
            summary["stored"] += 1
            summary["bytes"] += len(content)
            summary["clips"].append({"id": clip.id, "labels": list(clip.labels), **outcome.facts})
            yield content


def clean_up(output: Folder, shards: Sequence[Shard], everything: bool) -> None:
    """Removes what a killed run left: files half written, and with `everything` all that only an unfinished set has.

    Args:
        output: folder of the set.
        shards: all of the set.
        everything: also the summaries of `shards`.
    """
    summaries = {shard.summary for shard in shards}
    for name in output.files(UNFINISHED):
        if everything or name not in summaries:
            output.remove(name)
    for name in output.files():
        if name.endswith(TEMPORARY):
            output.remove(name)
    if everything:
        output.remove_empty(UNFINISHED)


class Summaries:
    """The summaries of all shards of a set, read anew by each iteration: of millions of clips they are large.

    Raises UserError at a summary that is damaged.
    """

    def __init__(self, output: Folder, plan: Sequence[Shard]):
        self.plan, self._output = plan, output

    def __iter__(self) -> Iterator[tuple[Shard, dict[str, Any]]]:
        for shard in self.plan:
            try:
                summary = json.loads(self._output.read(shard.summary).decode())
            except (ValueError, FileNotFoundError):
                summary = None
            kinds = {"stored": int, "bytes": int, "clips": list, "findings": list}
            if not isinstance(summary, dict) or any(
                type(summary.get(name)) is not kind for name, kind in kinds.items()
            ):
                raise UserError(
                    f"the set in {self._output} is damaged ({shard.summary}): remove this file, and the same command "
                    "makes its shard again"
                )
            yield shard, summary


def digest(classes: Sequence[str], clips: Iterable[SourceClip]) -> str:
    """A fingerprint of a catalogue."""
    content = hashlib.sha256(repr(classes).encode())
    for clip in clips:
        content.update((repr(clip) if clip.part is None else f"{clip!r} {clip.part!r}").encode())
    return content.hexdigest()[:32]


def complete(record: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """A record as it is stored.

    Args:
        record: the fields that its maker knows: `id`, `duration`, `frames`, `frame_times`, `sound` and any of UNKNOWN.
            `label` is not given but taken from `labels`.
        classes: how many there are.

    Raises:
        ValueError: where a field is missing, unknown or of another length than those that belong to it, or a label is
            none of the `classes`.
    """
    needed = {"id", "duration", "frames", "frame_times", "sound"}
    wrong = (needed - record.keys()) | (record.keys() - needed - UNKNOWN.keys())
    if wrong:
        raise ValueError(f"record {record.get('id')!r}: missing or unknown fields {', '.join(sorted(wrong))}")
    whole: dict[str, Any] = {**UNKNOWN, **record}
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


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the records it is given, in their order."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # nothing to download; TFDS would look for lists of checksums beside this file
    url_infos: Mapping[str, Any] = {}

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

    Args:
        folder: takes the files.
        name: of the set.
        description: a sentence about the set.
        classes: their names by number.
        splits: a split's name → a function that yields its records (see `complete`) in their final order.
        clips: size of the largest split, by which the number of shards is chosen.
    """
    folder = pathlib.Path(folder)
    splits = {
        split: functools.partial(_with_labels_file, folder / labels_file(split), make) for split, make in splits.items()
    }
    builder = _Builder(name, description, classes, splits, os.fspath(folder / "tfds"))
    download = tfds.download.DownloadConfig(num_shards=math.ceil(clips / SHARD_CLIPS))
    with _quiet():
        builder.download_and_prepare(download_config=download)
    for path in pathlib.Path(builder.data_path).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "tfds")


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS's own bars and messages away: the command shows its own."""
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


def _with_labels_file(path: pathlib.Path, make: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The records that `make` yields; at their end their labels are written to `path`."""
    clips = []
    for record in make():
        clips.append(record.get("labels", ()))
        yield record
    path.write_bytes(encode_labels(clips))


@dataclasses.dataclass(frozen=True)
class Split:
    """How many records each shard of a split has, the bytes of them all, and the labels of each record."""

    shard_lengths: tuple[int, ...]
    bytes: int
    labels: tuple[Sequence[int], ...]


def encoder(classes: Sequence[str]) -> Callable[[Mapping[str, Any]], bytes]:
    """A function from a record (see `complete`) to the bytes that are stored; the same record, the same bytes."""
    kinds = features(classes)
    serializer = example_serializer.ExampleSerializer(kinds.get_serialized_info())

    def encode(record: Mapping[str, Any]) -> bytes:
        example = serializer.serialize_example(kinds.encode_example(complete(record, len(classes))))
        return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)

    return encode


def description_files(name: str, text: str, classes: Sequence[str], splits: Mapping[str, Split]) -> dict[str, bytes]:
    """The files of a TFDS data set besides its shards, the one that makes it readable last.

    Args:
        name: of the set.
        text: a sentence about the set.
        classes: their names by number.
        splits: what each split holds, by name.

    Returns:
        The content of each file by name.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        builder = _Builder(name, text, classes, {}, folder)
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
