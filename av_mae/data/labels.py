"""The labels of all clips of a set, and the file beside its shards that holds them."""

import io
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Labels(NamedTuple):
    """The classes of the clips of a set, in stored order: `counts` int64 [clips], how many each has, and `values` int64
    [sum of counts]. Clips whose classes are unknown have none."""

    counts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, clips: Iterable[Sequence[int]]) -> "Labels":
        """From the classes of each clip."""
        lists = [np.asarray(classes, np.int64) for classes in clips]
        counts = np.array([len(classes) for classes in lists], np.int64)
        return cls(counts, np.concatenate([np.zeros(0, np.int64), *lists]))

    @classmethod
    def joined(cls, sets: Sequence["Labels"]) -> "Labels":
        """Those of several sets, one after the other."""
        return cls(*(np.concatenate(parts) for parts in zip(*sets)))


def labels_file(split: str) -> str:
    """The file in a set's folder that holds the labels of a split's clips, for what needs those of all clips."""
    return f"labels-{split}.npz"


def encode_labels(clips: Iterable[Sequence[int]]) -> bytes:
    """The content of a labels file, from the labels of each clip in stored order."""
    labels, content = Labels.of(clips), io.BytesIO()
    np.savez_compressed(content, counts=labels.counts.astype(np.int32), values=labels.values.astype(np.int32))
    return content.getvalue()


def load_labels(path: pathlib.Path, clips: int) -> Labels | None:
    """What a labels file of a split of `clips` clips holds; None where it is not there or damaged."""
    try:
        with np.load(path) as stored:
            labels = Labels(stored["counts"].astype(np.int64), stored["values"].astype(np.int64))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = len(labels.counts) == clips and labels.counts.sum() == len(labels.values)
    return labels if whole else None


def with_labels_file(path: pathlib.Path, make: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The records that `make` yields; at their end their labels are written to `path`."""
    clips = []
    for record in make():
        clips.append(record.get("labels", ()))
        yield record
    path.write_bytes(encode_labels(clips))
