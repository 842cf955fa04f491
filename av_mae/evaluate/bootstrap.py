"""What every evaluation hands back: metrics with 95 % intervals from resampled clips, and the report of a task.

A metric gives one value per clip: a number, or a text that says why this clip has none. What has no number is left
out of the metric and counted by reason beside it, so that no metric is undefined without saying why.
"""

import collections
import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from av_mae.errors import ClipFailure, UserError
from av_mae.storage import replace_file


def require_finite(values: np.ndarray, what: str) -> None:
    """Raises UserError where values are infinite or NaN: comparisons with NaN are false, and would count as right."""
    bad = int(np.sum(~np.isfinite(values)))
    if bad:
        raise UserError(
            f"{bad} of {np.size(values)} {what} are not finite: the model diverged or its input is "
            "damaged; evaluate an earlier checkpoint"
        )


def require_labels(labels: np.ndarray, classes: int) -> None:
    """Raises UserError where a label is not in 0 … classes - 1."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels {labels.min()} to {labels.max()} do not fit {classes} classes (0 to {classes - 1}): "
            "take the class list that belongs to these labels, and leave out what has no label"
        )


LOW, HIGH = 2.5, 97.5
_BLOCK = 2**22  # weights made at a time: 32 MB
Value = float | str  # what a metric gives for a clip: a number, or the reason why there is none
Values = np.ndarray | Sequence[Value]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measured value and its 95 % interval; all three are NaN where nothing is left to measure.

    left_out: reason → how many clips (or classes) the metric does not count.
    """

    value: float
    low: float
    high: float
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self):
        if math.isnan(self.value):
            return f"- ({', '.join(self.left_out)})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict:
        """{"value", "low", "high"}, null where undefined, and "left_out" where something was left out."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        shown = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        return shown | ({"left_out": dict(self.left_out)} if self.left_out else {})


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation: metrics by name, clips measured, clips skipped because they failed, and a table to print.

    details: further entries of `results.json`, e.g. causes of skipping and the configuration. failures: clips that
    could not be read, for `skipped.jsonl`.
    """

    metrics: dict[str, Metric]
    clips: int
    skipped: int
    table: str
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)
    failures: Sequence[ClipFailure] = ()

    def to_json(self) -> dict:
        """Each metric as {"value", "low", "high"}, `clips` and `skipped`, and the details."""
        results = {name: metric.to_json() for name, metric in self.metrics.items()}
        return results | {"clips": self.clips, "skipped": self.skipped} | dict(self.details)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `results.json`, in one piece or not at all."""
        replace_file(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


class Bootstrap:
    """Resamples clips with replacement; all metrics of one Bootstrap see the same resamplings, so they are paired.

    clips: how many clips were measured; seed and draws: which resamplings, and how many.
    """

    def __init__(self, clips: int, seed: int, draws: int):
        self.clips = clips
        generator = np.random.default_rng(seed)
        shares, rows = np.full(clips, 1 / clips), max(1, _BLOCK // clips)
        sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
        counts = [generator.multinomial(clips, shares, size=size) for size in sizes]
        # In as few bits as do: a clip is hardly ever drawn more than ten times.
        self._counts = np.concatenate([part.astype(np.min_scalar_type(part.max())) for part in counts])
        self._clip_of = np.arange(clips)

    def grouped(self, clip_of: np.ndarray) -> "Bootstrap":
        """The same resamplings of clips for several values per clip, e.g. its frames.

        clip_of: int [n], the clip of each value. The metrics of what comes back take n values.
        """
        other = copy.copy(self)
        other._clip_of = np.asarray(clip_of)
        return other

    def mean(self, values: Values) -> Metric:
        """Mean of values [clips]."""
        numbers, left_out = _numbers(values)
        used = np.isfinite(numbers)
        if not used.any():
            return _metric(math.nan, numbers, left_out)
        numbers = numbers[used]
        mean = self.statistics(lambda weights: {"": divide(weights[:, used] @ numbers, weights[:, used].sum(1))})[""]
        return dataclasses.replace(mean, value=float(numbers.mean()), left_out=left_out)

    def difference(self, values: Values, others: Values) -> Metric:
        """mean(values) - mean(others), both [clips], paired: over the clips that have both."""
        return self.mean([_difference(*pair) for pair in zip(values, others, strict=True)])

    def ratio(self, values: np.ndarray, others: np.ndarray) -> Metric:
        """mean(values) / mean(others), both [clips], paired."""
        values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
        return self.statistics(lambda weights: {"": (weights @ values) / (weights @ others)})[""]

    def median(self, values: Values) -> Metric:
        """Median of values [clips]."""
        numbers, left_out = _numbers(values)
        used = np.flatnonzero(np.isfinite(numbers))
        order = used[np.argsort(numbers[used], kind="stable")]
        return self.statistics(lambda weights: {"": _median(weights[:, order], numbers[order])}, left_out)[""]

    def statistics(
        self, function: Callable[..., dict[str, np.ndarray]], left_out: Mapping[str, int] | None = None
    ) -> dict[str, Metric]:
        """Any metrics that can be computed from how often each clip counts.

        Args:
          function: takes weights float64 [draws, clips], whole numbers, and gives name → [draws], one metric for each
            row. A row where the metric is undefined (as a class accuracy without a clip of the class) holds NaN.
          left_out: reason → count, noted with each metric.

        Returns:
          Name → metric: the value counts every clip once, the interval is that of the resamplings where the metric
          is defined.
        """
        once = function(np.ones((1, len(self._clip_of))))
        rows = max(1, _BLOCK // len(self._clip_of))
        blocks = (self._counts[start : start + rows] for start in range(0, len(self._counts), rows))
        parts = [function(block[:, self._clip_of].astype(np.float64)) for block in blocks]
        return {
            name: _metric(float(row[0]), np.concatenate([part[name] for part in parts]), left_out or {})
            for name, row in once.items()
        }


def metrics_of(rows: Sequence[Mapping[str, Value]], bootstrap: Bootstrap) -> dict[str, Metric]:
    """The mean of every value over clips: [{name: value}], one per clip, → {name: metric}."""
    return {name: bootstrap.mean([row[name] for row in rows]) for name in rows[0]}


def _numbers(values: Values) -> tuple[np.ndarray, dict[str, int]]:
    """Values as float64 [n], not finite where left out, and the reasons counted."""
    reasons = collections.Counter(value for value in values if isinstance(value, str))
    numbers = np.array([math.nan if isinstance(value, str) else value for value in values], np.float64)
    unexplained = int(np.sum(~np.isfinite(numbers))) - reasons.total()
    return numbers, dict(reasons) | ({"not finite": unexplained} if unexplained else {})


def _difference(value: Value, other: Value) -> Value:
    """value - other, or the first reason why one of them is missing."""
    if isinstance(value, str):
        return value
    return other if isinstance(other, str) else value - other


def divide(sums: np.ndarray, counts: np.ndarray, empty: float = math.nan) -> np.ndarray:
    """sums / counts, `empty` where the count is 0."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), empty, np.float64), where=counts > 0)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Means [draws] of values [draws, n] over those that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0).sum(1), defined.sum(1))


def _median(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Medians [draws] of ascending values [n] that count `weights` [draws, n] times."""
    if not len(values):
        return np.full(len(weights), math.nan)
    through = np.cumsum(weights, axis=1)
    total = through[:, -1]
    middle = [
        np.minimum((through < rank[:, None]).sum(1), len(values) - 1)
        for rank in (np.ceil(total / 2), np.floor(total / 2) + 1)
    ]
    return np.where(total > 0, (values[middle[0]] + values[middle[1]]) / 2, math.nan)


def _metric(value: float, resampled: np.ndarray, left_out: Mapping[str, int]) -> Metric:
    resampled = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or not len(resampled):
        return Metric(math.nan, math.nan, math.nan, left_out or {"undefined for these clips": 1})
    low, high = np.percentile(resampled, (LOW, HIGH))
    return Metric(value, float(low), float(high), left_out)
