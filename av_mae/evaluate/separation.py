"""Sound separation: the audio of what the image shows, from a mixture (published protocol: VGGSound-Music, MUSIC)."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Sequence

import jax
import numpy as np
import soundfile

from av_mae import models
from av_mae.checkpoint import Checkpoint
from av_mae.data.audio import apply_mask, ideal_masks, log_mel
from av_mae.data.plans import Clips, Plan, listed_mixtures, read_lists
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Value, metrics_of, require_finite
from av_mae.evaluate.task import Clip, Finetuning, Measured, Task, TaskConfig
from av_mae.models.config import SeparatorConfig, require
from av_mae.models.losses import separation_loss
from av_mae.train.step import Batch, Rows

RATIOS = ("sdr", "sir", "sar", "si_sdr")
IMPROVED = ("sdr", "si_sdr")
SILENCE = 1e-5  # the sum of squares below which DeepAVFusion takes a signal for empty
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
    from mir_eval import separation

    if len(sources) < 2 or not 1 <= len(estimates) <= len(sources):
        raise ValueError(
            f"{len(estimates)} estimates of {len(sources)} sources: at least 2 sources are needed, and no "
            "more estimates than sources"
        )
    sources, estimates = np.asarray(sources, np.float64), np.asarray(estimates, np.float64)
    require_finite(sources, "samples of sources")
    require_finite(estimates, "samples of estimates")
    for signals, name in ((sources, "source"), (estimates, "estimate")):
        if np.square(signals).sum(1).min() < SILENCE:
            return f"empty {name}"
    count = len(estimates)
    every = np.concatenate([estimates, sources[count:]])  # mir_eval wants an estimate of each source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # the module is deprecated, and still what others measure with
            found = separation.bss_eval_sources(sources, every, compute_permutation=False)
    except (np.linalg.LinAlgError, AttributeError):  # where mir_eval 0.8 meets a singular matrix, it asks NumPy for
        return "the sources are not independent"  # np.linalg.linalg.LinAlgError, which NumPy 2.4 no longer has
    bss = {name: values[:count] for name, values in zip(RATIOS, found[:3])}
    return bss | {"si_sdr": si_sdr(sources[:count], estimates)}


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
    if isinstance(found, str):
        return dict.fromkeys(names, found)
    if isinstance(unprocessed, str):
        return dict.fromkeys(names, unprocessed)
    found |= {f"{name}_improvement": found[name] - unprocessed[name] for name in IMPROVED}
    means = {name: float(found[name].mean()) for name in names}
    return {name: mean if np.isfinite(mean) else f"{name} is infinite" for name, mean in means.items()}


def separation_metrics(rows: Sequence[dict[str, Value]], bootstrap: Bootstrap) -> dict[str, Metric]:
    """Means and medians (`…_median`) over clips of what `score_clip` gave; skewed as they are, look at both."""
    medians = {f"{name}_median": bootstrap.median([row[name] for row in rows]) for name in rows[0]}
    return metrics_of(rows, bootstrap) | medians


PAIRED = ("sdr", "sdr_improvement", "si_sdr_improvement")


@dataclasses.dataclass(frozen=True)
class SeparationConfig(TaskConfig):
    """The audio of what the image shows, from a mixture: that of the prepared clips, or of `data.mix` of them.

    `pairs` is a CSV list of the test's mixtures, the ids of `data.mix` clips in each row; without it they are drawn.
    """

    task: str = "separation"
    head: SeparatorConfig = SeparatorConfig()
    pairs: str = ""

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.pairs or self.data.mix > 1,
            f"pairs={self.pairs} lists clips to be mixed: set data.mix to how many are in a row, not {self.data.mix}",
        )


class Separation(Task[SeparationConfig]):
    """The separator, fine-tuned with its encoder; the image is what is swapped and blanked."""

    config_class = SeparationConfig
    kind = "separator"
    annotations = ("sources", "waveforms")
    other = "image"
    columns = ("frame", "mixture", "estimate", "source")

    def __init__(self, config: SeparationConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        if config.pairs:
            self.plan = functools.partial(self.listed, lists=read_lists(config.pairs, config.data.mix))
        self.objective = Finetuning(self.kind, config, checkpoint, self.loss)
        self._references: dict[int, tuple[Ratios | str, dict[str, Value]]] = {}

    def listed(self, clips: Clips, lists: list[list[str]]) -> Plan:
        """The mixtures of the list `pairs`; what it names in vain is kept in `missing`."""
        plan, self.missing = listed_mixtures(clips, lists)
        return plan

    def loss(self, model: models.Separator, rows: Rows) -> jax.Array:
        logits = model(models.normalize_image(rows["image"]), rows["audio"], train_rows=rows["valid"])
        mixture, source = (x * self.sound.std + self.sound.mean for x in (rows["audio"], rows["source"]))
        return separation_loss(logits, mixture, source, self.config.head)

    def forward(self, model: models.Separator, batch: Batch) -> dict[str, jax.Array]:
        return {"mask": jax.nn.sigmoid(model(models.normalize_image(batch["image"]), batch["audio"]))}

    def score(self, clip: Clip) -> dict[str, Value]:
        """The ratios of one source, and under `ideal/` those of the mask that the sources themselves give."""
        mixed = self.config.data.mix
        sources = clip["sources"][:mixed] if mixed > 1 else without_padding(clip["sources"])
        unprocessed, ideal = self.references(clip, sources)
        return score_clip(sources, self.heard(clip)["estimate"][None], unprocessed) | ideal

    def combine(self, scores: list[dict[str, Value]]) -> dict[str, Value]:
        """Means over the sources of a mixture, and where they are several under `source1/` … those of each; a mixture
        of which one source cannot be measured has none."""
        sources = self.config.data.mix
        if sources == 1:
            return scores[0]
        if len(scores) < sources:
            scores = [dict.fromkeys(scores[0], "a clip of the mixture cannot be read")] * sources
        means = {name: mean_of([score[name] for score in scores]) for name in scores[0]}
        each = {f"source{number}/{name}": score[name] for number, score in enumerate(scores, 1) for name in RATIOS}
        return means | each

    def references(self, clip: Clip, sources: np.ndarray) -> tuple[Ratios | str, dict[str, Value]]:
        """Ratios of the unprocessed mixture and scores of the ideal mask: once per clip, whatever its image is."""
        index = int(clip["index"])
        if index not in self._references:
            unprocessed = mixture_ratios(sources, clip["mixture"], 1)
            ideal = apply_mask(clip["mixture"], ideal_masks(sources, self.sound)[0], self.sound)
            scores = score_clip(sources, ideal[None], unprocessed)
            self._references[index] = unprocessed, {f"ideal/{name}": value for name, value in scores.items()}
        return self._references[index]

    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        found = {
            f"{prefix}{name}": metric
            for prefix, clips in scores.items()
            for name, metric in separation_metrics(clips, bootstrap).items()
            if not (prefix and name.startswith(("ideal/", "source")))
        }
        right, swapped = scores[""], scores["swapped/"]
        return found | {
            f"right_minus_swapped/{name}": bootstrap.difference(
                [clip[name] for clip in right], [clip[name] for clip in swapped]
            )
            for name in PAIRED
        }

    def plot(self, measured: Measured, folder: pathlib.Path) -> None:
        """Spectrograms of mixture, estimate and target source beside the frame, and all three as wav files."""
        super().plot(measured, folder)
        (folder / "separation").mkdir(parents=True, exist_ok=True)
        for clip, name in measured.drawn:
            for kind, x in self.heard(clip).items():
                path = folder / "separation" / f"{pathlib.PurePath(name).name}_{kind}.wav"
                soundfile.write(path, x, self.sound.rate)

    def panels(self, clip: Clip) -> list[np.ndarray]:
        return [clip["image"], *(log_mel(x, self.sound) for x in self.heard(clip).values())]

    def heard(self, clip: Clip) -> dict[str, np.ndarray]:
        estimate = apply_mask(clip["mixture"], clip["mask"].astype(np.float32), self.sound)
        return {"mixture": clip["mixture"], "estimate": estimate, "source": clip["sources"][0]}


def mean_of(values: list[Value]) -> Value:
    """The mean, or the first reason why a value is missing."""
    reasons = [value for value in values if isinstance(value, str)]
    return reasons[0] if reasons else float(np.mean(np.array(values, np.float64)))


def without_padding(sources: np.ndarray) -> np.ndarray:
    """The sources [m, samples] of a prepared mixture without the empty rows behind them; a silent source keeps its
    row."""
    return sources[: max(2, 1 + int(np.flatnonzero(sources.any(1)).max(initial=0)))]
