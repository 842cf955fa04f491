"""Metrics of sound separation in decibels: SDR, SIR and SAR of BSS Eval (by mir_eval, as published) beside SI-SDR."""

import warnings
from collections.abc import Sequence

import numpy as np

from av_mae.evaluation.figures import Bootstrap, Figure, Value, figures_of
from av_mae.evaluation.metrics.checks import require_finite

RATIOS = ("sdr", "sir", "sar", "si_sdr")
IMPROVED = ("sdr", "si_sdr")
SILENCE = 1e-5  # the sum of squares below which the published system takes a sound for empty
Ratios = dict[str, np.ndarray]


def si_sdr(source: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Scale-invariant SDR (Le Roux et al., ICASSP 2019), means removed: [..., samples] twice → [...] in dB.

    Infinite where the estimate is the source itself or nothing of it.
    """
    source, estimate = (np.asarray(x, np.float64) - np.mean(x, axis=-1, keepdims=True) for x in (source, estimate))
    scale = (estimate * source).sum(-1, keepdims=True) / np.square(source).sum(-1, keepdims=True)
    kept, rest = scale * source, estimate - scale * source
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.square(kept).sum(-1) / np.square(rest).sum(-1))


def ratios(sources: np.ndarray, estimates: np.ndarray) -> Ratios | str:
    """SDR, SIR, SAR and SI-SDR of estimates of the first k sources; estimate i is compared with source i.

    Args:
      sources: [m, samples], m >= 2, all that the mixture holds.
      estimates: [k, samples], 1 <= k <= m.

    Returns:
      Name → float64 [k] dB, or the reason why the clip cannot be measured: a source or an estimate is empty (the sum of
      its squares is below 1e-5), or the sources are not independent.
    """
    if len(sources) < 2 or not 1 <= len(estimates) <= len(sources):
        raise ValueError(f"{len(estimates)} estimates of {len(sources)} sources: at least 2 sources are needed, and no "
                         "more estimates than sources")
    sources, estimates = np.asarray(sources, np.float64), np.asarray(estimates, np.float64)
    require_finite(sources, "samples of sources")
    require_finite(estimates, "samples of estimates")
    for sounds, name in ((sources, "source"), (estimates, "estimate")):
        if np.square(sounds).sum(1).min() < SILENCE:
            return f"empty {name}"
    bss = _bss_eval(sources, estimates)
    if isinstance(bss, str):
        return bss
    return bss | {"si_sdr": si_sdr(sources[:len(estimates)], estimates)}


def _bss_eval(sources: np.ndarray, estimates: np.ndarray) -> Ratios | str:
    from mir_eval import separation

    count = len(estimates)
    every = np.concatenate([estimates, sources[count:]])  # mir_eval wants an estimate of each source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the module is deprecated, and still what is published
            found = separation.bss_eval_sources(sources, every, compute_permutation=False)
    except (np.linalg.LinAlgError, AttributeError):  # where mir_eval 0.8 meets a singular matrix, it asks NumPy for
        return "the sources are not independent"  # np.linalg.linalg.LinAlgError, which NumPy 2.4 no longer has
    return {name: values[:count] for name, values in zip(RATIOS, found[:3])}


def mixture_ratios(sources: np.ndarray, mixture: np.ndarray, count: int) -> Ratios | str:
    """The ratios of the unprocessed mixture [samples], taken as the estimate of each of the first `count` sources."""
    return ratios(sources, np.broadcast_to(mixture, (count, len(mixture))))


def score_clip(sources: np.ndarray, estimates: np.ndarray, unprocessed: Ratios | str) -> dict[str, Value]:
    """The values of one clip: means over its estimates of `sdr`, `sir`, `sar`, `si_sdr`, `sdr_improvement` and
    `si_sdr_improvement`.

    sources: [m, samples]; estimates: [k, samples]; unprocessed: mixture_ratios(sources, mixture, k), which the
    improvements are measured from.
    """
    names = RATIOS + tuple(f"{name}_improvement" for name in IMPROVED)
    found = ratios(sources, estimates)
    for each in (found, unprocessed):
        if isinstance(each, str):
            return dict.fromkeys(names, each)
    found |= {f"{name}_improvement": found[name] - unprocessed[name] for name in IMPROVED}
    means = {name: float(found[name].mean()) for name in names}
    return {name: mean if np.isfinite(mean) else f"{name} is infinite" for name, mean in means.items()}


def separation_figures(rows: Sequence[dict[str, Value]], bootstrap: Bootstrap) -> dict[str, Figure]:
    """Means and medians (`…_median`) over clips of what `score_clip` gave; skewed as they are, look at both."""
    medians = {f"{name}_median": bootstrap.median([row[name] for row in rows]) for name in rows[0]}
    return figures_of(rows, bootstrap) | medians
