"""Shards: which clips go where, and writing one so that it is there whole or not at all.

A shard is finished when its summary is there. Summaries, and files being written, lie in the set's folder UNFINISHED,
which is gone when the set is complete.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from av_mae.prepare.clips import Outcome
from av_mae.prepare.readers.catalogue import Finding, SourceClip
from av_mae.storage import TEMPORARY, Folder

UNFINISHED = "unfinished"
# Measured with 300 kB records: reading one of a group of 4 costs 4 times as much, of 16 20 times; JPEG and FLAC do not
# get smaller, and not trying saves a fifth of the time.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` of the `count` parts of a split, and its clips in stored order."""

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
    """The shards of all splits. The order within a split is that of hashes of seed and id: clips of a shard are a
    random sample, and depend on nothing else."""
    shards = []
    for split in sorted({clip.split for clip in clips}):
        ordered = sorted((clip for clip in clips if clip.split == split), key=lambda clip: _place(seed, clip.id))
        parts = [tuple(ordered[start : start + shard_clips]) for start in range(0, len(ordered), shard_clips)]
        shards += [Shard(dataset, split, number, len(parts), part) for number, part in enumerate(parts)]
    return shards


def _place(seed: int, name: str) -> bytes:
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
    """Writes the records of a shard's clips, then its summary: {'stored', 'bytes', 'clips', 'findings'}."""
    summary: dict[str, Any] = {"stored": 0, "bytes": 0, "clips": [], "findings": []}
    folder = output.path(UNFINISHED) if output.is_local else tempfile.gettempdir()
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{shard.file}.{os.getpid()}{TEMPORARY}")
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


def read_summary(output: Folder, shard: Shard) -> dict[str, Any]:
    return json.loads(output.read(shard.summary))


def clean_up(output: Folder, shards: Sequence[Shard], everything: bool) -> None:
    """Removes what a killed run left: files half written, and with `everything` all that only an unfinished set has."""
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
    """The summaries of all shards of a set, read anew by each iteration: of millions of clips they are large."""

    def __init__(self, output: Folder, plan: Sequence[Shard]):
        self._output, self._plan = output, plan

    def __iter__(self) -> Iterator[tuple[Shard, dict[str, Any]]]:
        return ((shard, read_summary(self._output, shard)) for shard in self._plan)


def digest(classes: Sequence[str], clips: Iterable[SourceClip]) -> str:
    """A fingerprint of a catalogue."""
    content = hashlib.sha256(repr(classes).encode())
    for clip in clips:
        content.update(repr(clip).encode())
    return content.hexdigest()[:32]
