"""What the annotations of prepared sets say before anything is measured: classes, their frequency, what is missing."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from av_mae.data import records
from av_mae.data.balance import check_classes
from av_mae.data.labels import Labels
from av_mae.errors import UserError
from av_mae.evaluation.metrics.localization import box_masks

REPORT = "report.json"  # of a prepared set: what was found when it was prepared


def common_classes(paths: Sequence[str], classes: int | None = None) -> list[str]:
    """The class names of prepared sets that are used together. Raises UserError where they differ, or are not as many
    as `classes` (None: any number)."""
    if not paths:
        raise UserError("no data: set --config.data.path=DIR[,DIR] to prepared sets (python -m av_mae.prepare makes "
                        "them)")
    names = {path: records.class_names(path) for path in paths}
    check_classes(names)
    known = names[paths[0]]
    if classes not in (None, len(known)):
        raise UserError(f"head.classes={classes} does not match the labels: {paths[0]} has {len(known)} classes, set "
                        f"--config.head.classes={len(known)}")
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
            yield from (f"{path}: clip {finding['clip']}: {finding['message']}" for finding in findings
                        if finding["cause"] == "missing" and finding["split"] in ("", split))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{report} is damaged ({error!r}): prepare the set again, or delete the file") from error


def objects_in(clip: dict[str, np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of a clip (the truth 'objects' of a batch's row) as masks bool [k, *size]; which sound, bool [k]."""
    count = int(np.sum(clip["sounding"] >= 0))
    return box_masks(clip["boxes"][:count], size), clip["sounding"][:count] > 0
