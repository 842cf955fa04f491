"""What every evaluation hands back: figures with 95 % intervals from resampled clips."""

import dataclasses
import json
import os
import pathlib

import numpy as np

LOW, HIGH = 2.5, 97.5


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation: figures by name, clips measured, clips skipped because they failed, and a table to print."""

    figures: dict[str, Figure]
    clips: int
    skipped: int
    table: str

    def save(self, path: str | os.PathLike) -> None:
        """Writes `results.json`: each figure as {"value", "low", "high"}, and `clips` and `skipped`."""
        results = {name: dataclasses.asdict(figure) for name, figure in self.figures.items()}
        results |= {"clips": self.clips, "skipped": self.skipped}
        pathlib.Path(path).write_text(json.dumps(results, indent=2) + "\n")


class Bootstrap:
    """Resamples clips with replacement; all figures of one Bootstrap see the same resamplings, so they are paired.

    clips: how many clips were measured; seed and draws: which resamplings, and how many.
    """

    def __init__(self, clips: int, seed: int, draws: int):
        generator = np.random.default_rng(seed)
        self._shares = generator.multinomial(clips, np.full(clips, 1 / clips), size=draws) / clips

    def mean(self, values: np.ndarray) -> Figure:
        """Mean of values [clips]."""
        values = np.asarray(values, np.float64)
        return self._figure(values.mean(), self._shares @ values)

    def difference(self, values: np.ndarray, others: np.ndarray) -> Figure:
        """mean(values) - mean(others), both [clips], paired."""
        return self.mean(np.asarray(values, np.float64) - others)

    def ratio(self, values: np.ndarray, others: np.ndarray) -> Figure:
        """mean(values) / mean(others), both [clips], paired."""
        values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
        return self._figure(values.mean() / others.mean(), (self._shares @ values) / (self._shares @ others))

    def _figure(self, value: float, resampled: np.ndarray) -> Figure:
        low, high = np.percentile(resampled, (LOW, HIGH))
        return Figure(float(value), float(low), float(high))
