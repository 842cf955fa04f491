"""Intervals from resampled clips against resampling by hand, and what is left out of a metric."""

import json
import math

import numpy as np
import pytest

from av_mae.evaluate.bootstrap import Bootstrap, Metric, Report, metrics_of

SEED, DRAWS = 4, 300


def resampled(clips):
    """The clips of each resampling, with repetitions."""
    counts = np.random.default_rng(SEED).multinomial(clips, np.full(clips, 1 / clips), size=DRAWS)
    return [np.repeat(np.arange(clips), row) for row in counts]


def check(metric, values, value):
    """The metric's interval is that of `values`, one for each resampling where it is defined."""
    assert metric.value == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose([metric.low, metric.high], np.percentile(values, (2.5, 97.5)), rtol=1e-9)


@pytest.mark.parametrize("clips", [7, 40])
@pytest.mark.parametrize("name", ["mean", "median"])
def test_mean_and_median(clips, name):
    values = np.random.default_rng(1).exponential(size=clips).round(1)  # rounded: some are equal
    of = getattr(np, name)
    metric = getattr(Bootstrap(clips, SEED, DRAWS), name)(values)
    check(metric, [of(values[chosen]) for chosen in resampled(clips)], of(values))


@pytest.mark.parametrize("name", ["mean", "median"])
def test_clips_without_a_value_are_left_out_and_counted(name):
    values = [1.0, "silent", 4.0, 2.5, "silent", "too short", math.inf]
    of, used = getattr(np, name), {0: 1.0, 2: 4.0, 3: 2.5}
    metric = getattr(Bootstrap(7, SEED, DRAWS), name)(values)
    draws = [[used[clip] for clip in chosen if clip in used] for chosen in resampled(7)]
    check(metric, [of(draw) for draw in draws if draw], of(list(used.values())))
    assert metric.left_out == {"silent": 2, "too short": 1, "not finite": 1}


def test_difference_is_over_the_clips_that_have_both():
    metric = Bootstrap(4, SEED, DRAWS).difference([5.0, 7.0, "a", 1.0], [1.0, "b", "c", 2.0])
    assert metric.value == (4 - 1) / 2 and metric.left_out == {"b": 1, "a": 1}
    assert (metric.low, metric.high) == (-1, 4)


def test_values_of_a_clip_are_drawn_together():
    clip_of, values = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3]), np.random.default_rng(2).normal(size=10)
    metric = Bootstrap(4, SEED, DRAWS).grouped(clip_of).mean(values)
    draws = [np.concatenate([values[clip_of == clip] for clip in chosen]).mean() for chosen in resampled(4)]
    check(metric, draws, values.mean())


def test_statistics_of_several_metrics_undefined_in_some_draws():
    values = np.array([3.0, 1.0, 2.0, 5.0])

    def function(weights):
        with np.errstate(invalid="ignore"):
            return {"sum": weights @ values, "first": np.where(weights[:, 0] > 0, weights[:, 0] * 3.0, np.nan)}

    found = Bootstrap(4, SEED, DRAWS).statistics(function, {"classes without clips": 2})
    counts = np.array([np.bincount(chosen, minlength=4) for chosen in resampled(4)])
    check(found["sum"], counts @ values, 11)
    check(found["first"], 3.0 * counts[counts[:, 0] > 0, 0], 3)
    assert found["sum"].left_out == {"classes without clips": 2}


def test_blocks_of_draws_change_nothing(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    whole = Bootstrap(50, SEED, DRAWS).mean(values)
    monkeypatch.setattr("av_mae.evaluate.bootstrap._BLOCK", 50 * 7)
    parts = Bootstrap(50, SEED, DRAWS).mean(values)
    np.testing.assert_allclose([parts.low, parts.high], [whole.low, whole.high], rtol=1e-12)


def test_one_clip():
    metric = Bootstrap(1, SEED, DRAWS).mean(np.array([0.25]))
    assert (metric.value, metric.low, metric.high) == (0.25, 0.25, 0.25)


def test_nothing_left_is_no_number_and_says_why(tmp_path):
    bootstrap = Bootstrap(3, SEED, DRAWS)
    found = metrics_of(
        [{"iou": 0.5, "sdr": "silent"}, {"iou": 0.75, "sdr": "silent"}, {"iou": 1.0, "sdr": "short"}], bootstrap
    )
    median = bootstrap.median(["silent", "silent", "short"])
    for metric in (found["sdr"], median):
        assert all(map(math.isnan, (metric.value, metric.low, metric.high)))
        assert metric.left_out == {"silent": 2, "short": 1} and str(metric) == "- (silent, short)"
    Report(found, 3, 0, "", {"causes": {"broken": 1}}).save(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["sdr"] == {"value": None, "low": None, "high": None, "left_out": {"silent": 2, "short": 1}}
    assert saved["iou"]["value"] == 0.75 and "left_out" not in saved["iou"]
    assert saved["causes"] == {"broken": 1} and (saved["clips"], saved["skipped"]) == (3, 0)


def test_a_statistic_that_is_undefined_says_so():
    metric = Bootstrap(2, SEED, DRAWS).ratio(np.ones(2), np.ones(2))
    assert (metric.value, metric.left_out) == (1, {})
    metric = Bootstrap(2, SEED, DRAWS).statistics(lambda weights: {"": np.full(len(weights), np.nan)})[""]
    assert math.isnan(metric.value) and metric.left_out
    assert Metric(1.0, 0.5, 2.0) == Metric(1.0, 0.5, 2.0, {})
