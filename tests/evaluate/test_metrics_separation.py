"""Separation metrics against mir_eval, BSS Eval written out, and closed forms; empty and dependent sounds."""

import math
import warnings

import numpy as np
import pytest

from av_mae.errors import UserError
from av_mae.evaluate import separation
from av_mae.evaluate.bootstrap import Bootstrap

SAMPLES = 3000


def sounds(count, seed=0, samples=SAMPLES):
    return np.random.default_rng(seed).standard_normal((count, samples))


def estimates_of(sources, seed=1):
    """Each source with something of the others and of noise."""
    return sources + 0.3 * (sources.sum(0) - sources) + 0.2 * sounds(*sources.shape[:1], seed, sources.shape[1])


def bss_eval(sources, estimates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mir_eval.separation import bss_eval_sources

        return bss_eval_sources(sources, estimates, compute_permutation=False)[:3]


def plain_bss(sources, estimate, number, taps=512):
    """SDR, SIR, SAR by least squares on all delayed copies (Vincent, Gribonval & Févotte 2006)."""
    length = sources.shape[1] + taps - 1
    delayed = np.zeros((len(sources), taps, length))
    for delay in range(taps):
        delayed[:, delay, delay : delay + sources.shape[1]] = sources
    padded = np.pad(estimate, (0, taps - 1))

    def project(rows):
        return np.linalg.solve(rows @ rows.T, rows @ padded) @ rows

    target, every = project(delayed[number]), project(delayed.reshape(-1, length))

    def decibels(signal, rest):
        return 10 * np.log10(np.sum(signal**2) / np.sum(rest**2))

    return decibels(target, padded - target), decibels(target, every - target), decibels(every, padded - every)


def test_agrees_with_mir_eval():
    sources = sounds(3)
    estimates = estimates_of(sources)
    found = separation.ratios(sources, estimates)
    for name, expected in zip(("sdr", "sir", "sar"), bss_eval(sources, estimates), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-9)


def test_estimates_of_some_sources_in_single_precision():
    sources = sounds(2)
    estimates = estimates_of(sources)
    whole = separation.ratios(sources, estimates)
    first = separation.ratios(sources.astype(np.float32), estimates[:1].astype(np.float32))
    for name, values in first.items():
        np.testing.assert_allclose(values, whole[name][:1], rtol=1e-4)


def test_agrees_with_its_definition():
    sources = sounds(2, samples=1100)
    estimates = estimates_of(sources)
    found = separation.ratios(sources, estimates)
    for number in range(2):
        expected = plain_bss(sources, estimates[number], number)
        np.testing.assert_allclose([found[name][number] for name in ("sdr", "sir", "sar")], expected, rtol=1e-4)


def test_estimates_are_not_matched_to_other_sources():
    sources = sounds(2)
    right, swapped = (separation.ratios(sources, estimates_of(sources)[::step])["sdr"].mean() for step in (1, -1))
    assert right > 5 > -5 > swapped


def test_si_sdr():
    source, other = sounds(2, 5)
    source, other = source - source.mean(), other - other.mean()
    other -= source * (source @ other) / (source @ source)  # nothing of the source in it
    for gain, level in ((1.0, 0.1), (0.01, 0.5), (-2.0, 3.0)):
        expected = 10 * math.log10(gain**2 * (source @ source) / (level**2 * (other @ other)))
        estimate = gain * source + level * other + 0.7  # a constant counts as nothing
        assert separation.si_sdr(source, estimate) == pytest.approx(expected)
    np.testing.assert_allclose(
        separation.si_sdr(np.stack([source, other]), np.stack([estimate, source + 2 * other])),
        [expected, separation.si_sdr(other, source + 2 * other)],
    )


def test_improvement_over_the_mixture():
    sources = sounds(2)
    mixture, estimates = sources.sum(0), estimates_of(sources)
    unprocessed = separation.mixture_ratios(sources, mixture, 2)
    found = separation.score_clip(sources, estimates, unprocessed)
    after = separation.ratios(sources, estimates)
    for name in ("sdr", "sir", "sar", "si_sdr"):
        assert found[name] == pytest.approx(after[name].mean())
    for name in ("sdr", "si_sdr"):
        assert found[f"{name}_improvement"] == pytest.approx(np.mean(after[name] - unprocessed[name]))
    assert found["sdr_improvement"] > 5
    gains = [
        separation.si_sdr(source, estimate) - separation.si_sdr(source, mixture)
        for source, estimate in zip(sources, estimates, strict=True)
    ]
    assert found["si_sdr_improvement"] == pytest.approx(np.mean(gains))
    nothing = separation.score_clip(sources, np.stack([mixture] * 2), unprocessed)
    assert nothing["sdr_improvement"] == nothing["si_sdr_improvement"] == 0


def test_empty_sounds_are_skipped_and_counted():
    sources, silent = sounds(2), np.array([sounds(1)[0], np.zeros(SAMPLES)])
    quiet = silent + 1e-5 * (np.arange(SAMPLES) % 2)  # its energy is 1.5e-7
    assert separation.ratios(silent, estimates_of(sources)) == "empty source"
    assert separation.ratios(sources, silent) == separation.ratios(sources, quiet) == "empty estimate"
    unprocessed = separation.mixture_ratios(sources, sources.sum(0), 2)
    leaked = sources + 0.5 * sources[::-1]
    pairs = ((sources, estimates_of(sources)), (silent, sources), (sources, silent), (sources, leaked))
    rows = [separation.score_clip(*pair, unprocessed) for pair in pairs]
    found = separation.separation_metrics(rows, Bootstrap(4, 0, 100))
    assert len(found) == 12
    for name in rows[0]:
        used = [rows[0][name], rows[3][name]]
        assert found[name].value == found[f"{name}_median"].value == pytest.approx(np.mean(used))
        assert found[name].left_out == found[f"{name}_median"].left_out == {"empty source": 1, "empty estimate": 1}


def test_what_cannot_be_measured_says_why():
    click = np.zeros((2, 1000))
    click[:, 0] = 1
    assert separation.ratios(click, click) == "the sources are not independent"
    sources = sounds(2)
    unprocessed = separation.mixture_ratios(sources, sources.sum(0), 1)
    found = separation.score_clip(
        np.stack([click[0], np.roll(click[0], 700)]), click[:1], {name: np.zeros(1) for name in separation.RATIOS}
    )
    assert found["si_sdr"] == "si_sdr is infinite" and found["si_sdr_improvement"] == "si_sdr_improvement is infinite"
    missing = separation.score_clip(sources, sources[:1], "empty source")
    assert set(missing.values()) == {"empty source"} and set(missing) == set(found)
    assert unprocessed["sdr"].shape == (1,)


def test_bad_input():
    sources = sounds(2)
    with pytest.raises(ValueError, match="1 estimates of 1 sources: at least 2 sources"):
        separation.ratios(sources[:1], sources[:1])
    sources[1, 5] = np.nan
    with pytest.raises(UserError, match="1 of 6000 samples of estimates are not finite"):
        separation.ratios(sounds(2), sources)
