"""Held-out clips for evaluations: read once, in stored order, failed ones left out and named."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from av_mae.config import DataConfig, EvaluationDataConfig, SoundConfig
from av_mae.console import Progress
from av_mae.data import records
from av_mae.data.pipeline import check_classes, open_evaluation_data
from av_mae.data.records import Labels
from av_mae.errors import ClipFailure, UserError, batch_failures
from av_mae.models.config import AVMAEConfig

_ROUNDING = 1e-3  # pixels by which float32 boxes may miss a whole number
REPORT = "report.json"  # of a prepared set: what was found when it was prepared


def common_classes(paths: Sequence[str], classes: int | None = None) -> list[str]:
    """The class names of prepared sets that are used together. Raises UserError where they differ, or are not as many
    as `classes` (None: any number)."""
    if not paths:
        raise UserError(
            "no data: set --config.data.path=DIR[,DIR] to prepared sets (python -m av_mae.prepare makes them)"
        )
    names = {path: records.class_names(path) for path in paths}
    check_classes(names)
    known = names[paths[0]]
    if classes not in (None, len(known)):
        raise UserError(
            f"head.classes={classes} does not match the labels: {paths[0]} has {len(known)} classes, set "
            f"--config.head.classes={len(known)}"
        )
    return known


def class_frequencies(paths: Sequence[str], split: str, classes: int, multi_label: bool) -> np.ndarray:
    """Share of a split's labelled clips that have each class (not `multi_label`: as their first one): [classes]."""
    labels = Labels.joined([records.read_labels(path, split) for path in paths])
    first = np.cumsum(labels.counts)[labels.counts > 0] - labels.counts[labels.counts > 0]
    if not multi_label:
        return np.bincount(labels.values[first], minlength=classes) / max(1, len(first))
    clips = np.repeat(np.arange(len(labels.counts)), labels.counts)
    each_once = np.unique(np.stack([clips, labels.values]), axis=1)[1]
    return np.bincount(each_once, minlength=classes) / max(1, len(first))


def missing_clips(paths: Sequence[str], split: str) -> Iterator[str]:
    """Clips of a split that the annotations name and the prepared sets do not hold, a line each with the cause.

    Read from what `av_mae.prepare` reported beside the shards; demo sets have no annotations and no report.
    """
    for path in paths:
        report = pathlib.Path(path) / REPORT
        if not report.is_file():
            continue
        try:
            findings = json.loads(report.read_text())["findings"]
            yield from (
                f"{path}: clip {finding['clip']}: {finding['message']}"
                for finding in findings
                if finding["cause"] == "missing" and finding["split"] in ("", split)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{report} is damaged ({error!r}): prepare the set again, or delete the file") from error


def box_masks(boxes: np.ndarray, size: tuple[int, int], frame: tuple[float, float] = (1, 1)) -> np.ndarray:
    """Boxes as masks, their edges cut down to whole pixels (as published).

    boxes: [k, 4] as (ymin, xmin, ymax, xmax); size: (height, width) of the masks; frame: (height, width) of the picture
    in the boxes' own units, (1, 1) where they are shares of its sides. Returns bool [k, height, width].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(np.divide(size, frame), 2)
    top, left, bottom, right = np.floor(np.clip(boxes + _ROUNDING, 0, np.tile(size, 2))).T[..., None]
    rows, columns = np.arange(size[0]), np.arange(size[1])
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def objects_in(clip: dict[str, np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of a clip (the annotation 'objects' of a batch's row) as masks bool [k, *size]; which sound, bool [k]."""
    count = int(np.sum(clip["sounding"] >= 0))
    return box_masks(clip["boxes"][:count], size), clip["sounding"][:count] > 0


class Clips(NamedTuple):
    """The clips of one set that could be read, [n] each.

    image uint8 [n, H, W, 3], audio float32 [n, mels, frames] (standardised log-mels), label int32, id str, and index
    int64, the clip's position in the stored set, failed clips counted in. `skipped` are those that failed.
    """

    image: np.ndarray
    audio: np.ndarray
    label: np.ndarray
    id: np.ndarray
    index: np.ndarray
    skipped: list[ClipFailure]


def set_names(data: EvaluationDataConfig) -> dict[str, str]:
    """Name → path of each set: the folder's name, or the path where two folders are called alike."""
    paths = [path.strip() for path in data.path.split(",") if path.strip()]
    if not paths:
        raise UserError(
            "no data: set --config.data.path=DIR[,DIR] to prepared sets (python -m av_mae.prepare makes them)"
        )
    names = [pathlib.Path(path).name for path in paths]
    return {path if names.count(name) > 1 else name: path for path, name in zip(paths, names, strict=True)}


def load_clips(path: str, data: EvaluationDataConfig, sound: SoundConfig, model: AVMAEConfig, batch_size: int) -> Clips:
    """Reads one set's clips (at most `data.clips` of them) as the model takes them.

    Raises UserError when the set cannot be opened, or none of its clips can be read (naming the first error).
    """
    source = DataConfig(path=path, split=data.split, workers=data.workers, sound=sound)
    limit = data.clips or sys.maxsize
    batches, index = [], 0
    with open_evaluation_data(source, model.image.size, model.audio.size, batch_size, np.arange(batch_size)) as clips:
        total = min(limit, clips.clips)
        with Progress(total, f"reading {pathlib.Path(path).name}") as progress:
            for batch in clips:
                indices = np.arange(index, index + batch_size)
                batches.append(_rows(batch | {"index": indices}, indices < total))
                progress.update(min(batch_size, total - index))
                index += batch_size
                if index >= total:
                    break
    return _join(batches, path)


def map_batches(
    function: Callable[..., dict[str, np.ndarray]], arrays: tuple[np.ndarray, ...], batch_size: int
) -> dict[str, np.ndarray]:
    """Applies `function(*rows)` → {name: [batch_size, …]} to arrays [n, …] batch by batch.

    The last batch is padded with zeros, so that one shape is compiled; what comes out for padding is dropped.
    """
    clips, parts = len(arrays[0]), []
    for start in range(0, clips, batch_size):
        rows = [array[start : start + batch_size] for array in arrays]
        missing = batch_size - len(rows[0])
        rows = [np.concatenate([row, np.zeros((missing, *row.shape[1:]), row.dtype)]) for row in rows]
        parts.append({name: np.asarray(value)[: batch_size - missing] for name, value in function(*rows).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(batch: dict, chosen: np.ndarray) -> dict:
    return {name: np.array(values[chosen]) for name, values in batch.items()}


def _join(batches: list[dict], path: str) -> Clips:
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    valid, skipped = joined["valid"], batch_failures(joined)
    if not valid.any():
        raise UserError(
            f"none of the {len(valid)} clips of {path} can be read; the first error: "
            f"{skipped[0] if skipped else 'unknown'}"
        )
    chosen = {field: joined[field][valid] for field in Clips._fields if field != "skipped"}
    return Clips(**chosen, skipped=skipped)
