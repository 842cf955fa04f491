"""Class-balanced sampling: clips of rare classes come as often as those of common ones."""

import itertools
import sys
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from av_mae.data.labels import Labels
from av_mae.errors import UserError

_GOLDEN = (5 ** 0.5 - 1) / 2


def clip_weights(labels: Labels) -> np.ndarray:
    """How often each clip comes, float64 [clips] with sum 1: proportional to the sum, over its classes, of 1 / (clips
    of the class), as is usual for AudioSet (PSLA, arXiv 2102.01243; AudioMAE). A clip without classes never comes.

    Raises ValueError where no clip has a class.
    """
    if not len(labels.values):
        raise ValueError("no clip has a class")
    clips = np.repeat(np.arange(len(labels.counts)), labels.counts)
    weights = np.bincount(clips, 1 / np.bincount(labels.values)[labels.values], len(labels.counts))
    return weights / weights.sum()


def check_classes(sets: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where sets (the names of their classes by path), whose labels are used together, number their
    classes differently."""
    (first, expected), *others = sets.items()
    for path, classes in others:
        both = itertools.zip_longest(expected, classes)
        different = next((number for number, (name, other) in enumerate(both) if name != other), None)
        if different is not None:
            names = [repr(known[different]) if different < len(known) else "missing"
                     for known in (expected, classes)]
            raise UserError(f"{first} ({len(expected)} classes) and {path} ({len(classes)}) have different class lists: "
                            f"class {different} is {names[0]} and {names[1]}. Sets whose labels are used together need "
                            "the same: prepare them with one list, or take one of them")


class Balanced(grain.MapDataset):
    """Clips drawn by weight, endlessly; which one stands at position p depends on seed and p alone.

    Each epoch of as many draws as there are clips divides 0…1 evenly and shuffles the divisions, so that a clip of
    weight w comes within 1 of w · clips times; where the divisions begin moves on from epoch to epoch, so that over
    epochs each clip comes in proportion to its weight.
    """

    def __init__(self, clips: grain.MapDataset, weights: np.ndarray, seed: int):
        super().__init__(clips)
        self._ends = np.cumsum(weights)
        self._ends[np.flatnonzero(weights)[-1]:] = 1.0  # whatever rounding left of it
        self._order = grain.MapDataset.range(len(weights)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        clips = len(self._ends)
        draw = (self._order[index] + (0.5 + index // clips * _GOLDEN) % 1) / clips
        return self._parent[int(np.searchsorted(self._ends, draw, side="right"))]
