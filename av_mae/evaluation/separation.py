"""Separation: the sound of what the image shows, from a mixture of sounds (published protocol: VGGSound-Music, MUSIC)."""

import functools
import pathlib

import jax
import numpy as np
import soundfile

from av_mae import models, pictures
from av_mae.data.masked_sound import apply_mask, ideal_masks
from av_mae.data.plans import Clips, Plan, listed_mixtures, read_lists
from av_mae.data.sound import log_mel
from av_mae.evaluation.figures import Bootstrap, Figure, Value
from av_mae.evaluation.finetuning import Finetuning
from av_mae.evaluation.metrics.separation import RATIOS, Ratios, mixture_ratios, score_clip, separation_figures
from av_mae.evaluation.task import Clip, Measured, Task
from av_mae.models.objectives import separation_loss
from av_mae.task_config import SeparationConfig
from av_mae.training.objective import Rows
from av_mae.training.step import Batch
from av_mae.training.stored import Stored

PAIRED = ("sdr", "sdr_improvement", "si_sdr_improvement")


class Separation(Task):
    """The separator, fine-tuned with its encoder; the image is what is swapped and blanked."""

    kind = "separator"
    truth = ("sources", "waveforms")
    other = "image"

    def __init__(self, config: SeparationConfig, stored: Stored):
        super().__init__(config, stored)
        if config.pairs:
            self.plan = functools.partial(self.listed, lists=read_lists(config.pairs, config.data.mix))
        self.objective = Finetuning(self.kind, config, stored, self.loss)
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
        sources = clip["sources"][:mixed] if mixed > 1 else heard(clip["sources"])
        estimate = apply_mask(clip["mixture"], clip["mask"].astype(np.float32), self.sound)
        unprocessed, ideal = self.references(clip, sources)
        return score_clip(sources, estimate[None], unprocessed) | ideal

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
        place = int(clip["place"])
        if place not in self._references:
            unprocessed = mixture_ratios(sources, clip["mixture"], 1)
            ideal = apply_mask(clip["mixture"], ideal_masks(sources, "ratio", self.sound)[0], self.sound)
            scores = score_clip(sources, ideal[None], unprocessed)
            self._references[place] = unprocessed, {f"ideal/{name}": value for name, value in scores.items()}
        return self._references[place]

    def figures(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Figure]:
        found = {f"{prefix}{name}": figure for prefix, clips in scores.items()
                 for name, figure in separation_figures(clips, bootstrap).items()
                 if not (prefix and name.startswith(("ideal/", "source")))}
        right, swapped = scores[""], scores["swapped/"]
        return found | {f"right_minus_swapped/{name}": bootstrap.difference(
            [clip[name] for clip in right], [clip[name] for clip in swapped]) for name in PAIRED}

    def picture(self, measured: Measured, folder: pathlib.Path) -> None:
        """Spectrograms of mixture, estimate and truth beside the frame, and the three sounds as wav files."""
        rows, folder = [], folder / "separation"
        folder.mkdir(parents=True, exist_ok=True)
        for clip, name in zip(measured.drawn, measured.names, strict=True):
            estimate = apply_mask(clip["mixture"], clip["mask"].astype(np.float32), self.sound)
            sounds = {"mixture": clip["mixture"], "estimate": estimate, "truth": clip["sources"][0]}
            rows.append([clip["image"], *(log_mel(sound, self.sound) for sound in sounds.values())])
            for kind, sound in sounds.items():
                soundfile.write(folder / f"{pathlib.PurePath(name).name}_{kind}.wav", sound, self.sound.rate)
        picture = pictures.gallery(rows, ("frame", "mixture", "estimate", "truth"), measured.names)
        pictures.save_png(folder.parent / "separation.png", picture)


def mean_of(values: list[Value]) -> Value:
    """The mean, or the first reason why a value is missing."""
    reasons = [value for value in values if isinstance(value, str)]
    return reasons[0] if reasons else float(np.mean(values))


def heard(sources: np.ndarray) -> np.ndarray:
    """The sources [m, samples] of a prepared mixture without the empty places behind them; a silent one keeps its
    place."""
    return sources[:max(2, 1 + int(np.flatnonzero(sources.any(1)).max(initial=0)))]
