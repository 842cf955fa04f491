"""Windows of an input in batches of one size, shard by shard, read ahead by worker processes.

A batch holds windows of one shard, in input order, so that a shard is the same whatever was computed before it.
"""

import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from av_mae.data.pipeline import read_ahead
from av_mae.exporting.inputs import Input

Batch = dict[str, np.ndarray]


class Groups(grain.MapDataset):
    """All windows of a few consecutive clips per element: `image` [n, …], `audio` [n, …] and `row` (Rows) [n].

    Shard s has the clips from s · shard_clips on; a group lies in one shard.
    """

    def __init__(self, clips: Input, shards: Sequence[int], shard_clips: int, size: int):
        super().__init__()
        self._clips = clips
        ends = {shard: min((shard + 1) * shard_clips, len(clips)) for shard in shards}
        self._groups = [(first, min(first + size, end)) for shard, end in ends.items()
                        for first in range(shard * shard_clips, end, size)]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return stack([window for place in range(*self._groups[index]) for window in self._clips.windows(place)])


def stack(windows: list) -> Batch:
    """Windows as one batch; rows are objects."""
    rows = np.empty(len(windows), object)
    for number, window in enumerate(windows):
        rows[number] = window.row
    return {"image": np.stack([window.image for window in windows]),
            "audio": np.stack([window.audio for window in windows]), "row": rows}


def batches(clips: Input, shards: Sequence[int], shard_clips: int, size: int, workers: int, prefetch: int = 4
            ) -> Iterator[Batch]:
    """Batches of `size` windows, shard after shard; the last one of a shard is padded with zeros and row None.

    workers: processes that read clips; 0: a thread of this one. prefetch: groups that each of them is ahead.
    """
    shape = clips.shape
    window_bytes = 3 * shape.image[0] * shape.image[1] + 4 * shape.audio[0] * shape.audio[1]
    # Small groups keep all workers busy where a clip takes long; a batch is joined from them.
    group = max(1, size // max(1, workers))
    groups = Groups(clips, shards, shard_clips, group)
    reading = read_ahead(groups, workers, prefetch * max(1, workers), group * window_bytes)
    try:
        for _, own in itertools.groupby(reading, key=lambda group: shard_of(group, shard_clips)):
            yield from _of_one_size(own, size)
    finally:
        reading.close()


def shard_of(batch: Batch, shard_clips: int) -> int:
    """The shard that a batch belongs to."""
    return batch["row"][0].place // shard_clips


def _of_one_size(groups: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The windows of the groups in batches of one size."""
    held: list[Batch] = []
    count = 0
    for group in groups:
        held.append(group)
        count += len(group["row"])
        if count < size:
            continue
        joined = {name: np.concatenate([part[name] for part in held]) for name in group}
        for first in range(0, count - size + 1, size):
            yield {name: x[first:first + size] for name, x in joined.items()}
        count %= size
        held = [{name: x[len(x) - count:] for name, x in joined.items()}] if count else []
    if count:
        joined = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
        yield {name: _pad(x, size) for name, x in joined.items()}


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    padding = np.zeros((size - len(x), *x.shape[1:]), x.dtype)
    if x.dtype == object:
        padding[:] = None
    return np.concatenate([x, padding])
