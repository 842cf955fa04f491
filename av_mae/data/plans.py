"""What an evaluation measures, item by item: every clip, its windows or its annotated frames, or mixtures of clips.

A Plan is drawn up from facts about the clips alone, so that every host comes to the same one.
"""

import csv
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from av_mae.config import DataConfig
from av_mae.errors import UserError

HEADERS = ("id", "id1", "source_1")  # how the first column of a list may be called
MIDDLE = {"window": 0.5, "mask": 0}  # what is looked at of a clip where no plan says otherwise


@dataclasses.dataclass(frozen=True)
class Clips:
    """The clips that a plan is drawn up for: how many are stored, how many of them to use at `most` (0: all), and
    `read(field, count)`, a field of each of the first ones' records (None where the record cannot be read)."""

    stored: int
    most: int
    read: Callable[[str, int], Sequence[Any]]

    @property
    def count(self) -> int:
        return min(self.stored, self.most or self.stored)


@dataclasses.dataclass(frozen=True)
class Plan:
    """n items, [n] each: `clip`, the clip whose frame is looked at; `group`, ascending from 0, items whose scores
    belong together: those of one clip, or of one mixture; `window`, the window's position in the audio (0: the first,
    1: the last); `mask`, the number of the annotated frame. `others` [n, k]: the clips mixed with it and last, where a
    stream is swapped, the one that gives it.
    """

    clip: np.ndarray
    group: np.ndarray
    window: np.ndarray
    mask: np.ndarray
    others: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    def item(self, number: int) -> tuple[int, list[int], dict[str, Any]]:
        """The clip, those beside it, and what its record needs to know of the item."""
        return (
            int(self.clip[number]),
            self.others[number].tolist(),
            {"window": float(self.window[number]), "mask": int(self.mask[number])},
        )

    def with_swaps(self) -> "Plan":
        """The plan with one more clip beside each item: the first clip of another group that is not in its own.

        Each group serves once, where groups share no clips. Raises UserError where every other one does.
        """
        first = np.searchsorted(self.group, np.arange(self.groups))
        members = [{int(self.clip[item]), *self.others[item].tolist()} for item in first]
        partner = partners(self.groups, 0)
        given = np.empty(self.groups, np.int64)
        for group, own in enumerate(members):
            other = int(partner[group])
            while int(self.clip[first[other]]) in own and other != group:
                other = int(partner[other])
            if other == group:
                raise UserError("swapping needs clips that are not in the same mixture; there are none")
            given[group] = self.clip[first[other]]
        return dataclasses.replace(self, others=np.concatenate([self.others, given[self.group, None]], axis=1))


MakePlan = Callable[[Clips], Plan]


def usual_plan(data: DataConfig) -> MakePlan:
    """Mixtures of clips where clips are mixed, else each annotated frame where masks are wanted, else each clip."""
    if data.mix > 1:
        return functools.partial(random_mixtures, mixed=data.mix)
    return each_mask if "mask" in data.annotations else each_clip


def each_clip(clips: Clips, windows: int = 1) -> Plan:
    """Every clip, in `windows` windows spread over its audio (1: the middle one)."""
    window = np.tile((np.arange(windows) + 0.5) / windows, clips.count)
    return _plan(np.repeat(np.arange(clips.count), windows), window=window)


def each_mask(clips: Clips) -> Plan:
    """Every annotated frame of every clip; a clip without any stays as one item, which fails when it is read."""
    annotated = clips.read("mask_frames", clips.count)
    counts = np.array([1 if frames is None else max(1, len(frames)) for frames in annotated])
    clip = np.repeat(np.arange(clips.count), counts)
    return _plan(clip, mask=np.arange(len(clip)) - np.searchsorted(clip, clip))


def mixtures(rows: np.ndarray) -> Plan:
    """Mixtures of the clips in each row [m, n]; each clip of a row is the target source once, the others follow it."""
    count, mixed = rows.shape
    turned = np.stack([np.roll(rows, -first, axis=1) for first in range(mixed)], axis=1).reshape(-1, mixed)
    return dataclasses.replace(_plan(turned[:, 0], group=np.repeat(np.arange(count), mixed)), others=turned[:, 1:])


def random_mixtures(clips: Clips, mixed: int) -> Plan:
    """Every clip in one mixture of `mixed` clips; the last mixture is filled up with clips of the first ones."""
    if clips.count < mixed:
        raise UserError(f"mixtures of data.mix={mixed} clips need at least as many readable clips, got {clips.count}")
    count = -(-clips.count // mixed)
    order = np.resize(np.random.default_rng(0).permutation(clips.count), count * mixed)
    return mixtures(order.reshape(count, mixed))


def read_lists(path: str, mixed: int) -> list[list[str]]:
    """A list of mixtures: of each, the ids of its `mixed` clips.

    path: CSV, the ids first in each row (further columns, as their classes, are not read), with or without a header.
    Raises UserError where the file cannot be read, is empty, or a row does not name so many different clips.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lists = [[cell.strip() for cell in row[:mixed]] for row in csv.reader(file) if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read pairs={path}: {getattr(error, 'strerror', None) or error}") from error
    lists = lists[1:] if lists and lists[0][0].lower() in HEADERS else lists
    for number, names in enumerate(lists, 1):
        if len(names) != mixed or len(set(names)) != mixed:
            raise UserError(
                f"pairs={path}, mixture {number}: {', '.join(names)} must be {mixed} different clips, as "
                f"data.mix={mixed} says"
            )
    if not lists:
        raise UserError(f"pairs={path} lists no mixture")
    return lists


def listed_mixtures(clips: Clips, lists: Sequence[Sequence[str]]) -> tuple[Plan, list[str]]:
    """The listed mixtures of clip ids (at most `clips.most`), and those that cannot be made, since clips are missing.

    Raises UserError where no mixture can be made.
    """
    indices = {name: index for index, name in enumerate(clips.read("id", clips.stored))}
    rows, missing = [], []
    for number, names in enumerate(lists[: clips.most or None], 1):
        absent = [name for name in names if name not in indices]
        if absent:
            missing.append(f"mixture {number}: {', '.join(absent)}")
        else:
            rows.append([indices[name] for name in names])
    if not rows:
        raise UserError(f"no listed mixture has all its clips in the set; missing: {'; '.join(missing[:3])}")
    return mixtures(np.array(rows)), missing


def partners(count: int, seed: int) -> np.ndarray:
    """For each of `count` another one: int64 [count]; each serves once, none itself. Raises UserError below 2."""
    if count < 2:
        raise UserError(f"mixing and swapping need at least 2 readable clips in a set, got {count}")
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def _plan(
    clip: np.ndarray, group: np.ndarray | None = None, window: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Plan:
    """Items without others; by default of the clip's own group, in the middle window, at the first mask."""
    return Plan(
        clip,
        clip if group is None else group,
        np.full(len(clip), 0.5) if window is None else window,
        np.zeros(len(clip), np.int64) if mask is None else mask,
        np.zeros((len(clip), 0), np.int64),
    )
