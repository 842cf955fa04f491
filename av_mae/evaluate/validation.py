"""Validation in pretraining: masked errors of the same held-out clips under the same masks, every n steps.

Metrics of a set (`validation/SET/…`), as `reconstruction` measures them: `image_error` and `audio_error` with both
streams masked; `over_baseline/…` beside interpolation and the mean of each mel row; `swapped_over_right/…`, the other
stream fully visible: another clip's beside the clip's own. `validation/loss` is the loss of training over all of these
clips. Masks depend on a clip's index in its set alone, so that runs can be compared, also of other seeds.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import models
from av_mae.checkpoint import Checkpoints, TrainState
from av_mae.config import TrainConfig
from av_mae.data import records
from av_mae.data.pipeline import open_evaluation_data
from av_mae.evaluate.reconstruction import (
    STREAMS,
    ReconstructionConfig,
    interpolation_error,
    mask_noise,
    masked_errors,
    row_mean_errors,
    row_moments,
)
from av_mae.evaluate.task import set_names
from av_mae.models.config import require
from av_mae.train.hooks import MetricsHook
from av_mae.train.loop import Hook, Moment, to_global
from av_mae.train.sharding import local_rows, row_shards
from av_mae.train.step import Batch, TrainStep
from av_mae.workdir import read_metrics

SPLITS = ("validation", "val", "test")  # the first of them that a set has is measured
NO_SETS = f"no validation: no set has another split than the one trained on that is one of {', '.join(SPLITS)}"
PREFIX, LOSS = "validation/", "loss"
OTHER = {"image": "audio", "audio": "image"}
MASKS = ReconstructionConfig.seed  # of the masks: metrics are those of `evaluate --config=configs/reconstruction.py`


class Best(NamedTuple):
    """The lowest value of the metric that counts, its step (0: none yet), and how many validations came after it."""

    value: float = math.inf
    step: int = 0
    since: int = 0

    def after(self, step: int, value: float) -> "Best":
        """With one more validation."""
        return Best(value, step, 0) if value < self.value else self._replace(since=self.since + 1)


def best_so_far(config: TrainConfig, workdir: pathlib.Path, step: int) -> Best:
    """What `metrics.jsonl` tells of the validations up to a step."""
    best, path = Best(), workdir / "metrics.jsonl"
    for line in read_metrics(path) if path.is_file() else []:
        value = line.get(PREFIX + (config.keep_best or LOSS)) if isinstance(line, dict) else None
        if isinstance(value, float) and 0 < line.get("step", 0) <= step:
            best = best.after(int(line["step"]), value)
    return best


def validated_sets(config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Name → path and split of the sets that are validated.

    Raises:
      UserError: a set lacks `validate_split`.
    """
    found = {}
    for name, path in set_names(config.data.paths).items():
        splits = [split for split, about in records.describe(path).splits.items() if about.clips]
        wanted = (config.validate_split,) if config.validate_split else SPLITS
        split = next((split for split in wanted if split in splits), "")
        require(
            bool(split or not config.validate_split),
            f"validate_split={config.validate_split!r}: {path} has {', '.join(sorted(splits))}",
        )
        if split and split != config.data.split:
            found[name] = path, split
    return found


def read_held_out(
    config: TrainConfig, step: TrainStep, path: str, split: str, clips: int, swap: str = ""
) -> list[Batch]:
    """The first `clips` clips of a split, whole batches on the devices; `swap`: that stream is another clip's."""
    model, shards = config.model, row_shards(step.mesh)
    size = -(-min(config.batch_size, clips) // shards) * shards
    data = dataclasses.replace(config.data, path=path, weights=None, split=split, workers=0)
    sizes, rows = (model.image.size, model.audio.size), local_rows(step.rows, size)
    with open_evaluation_data(data, *sizes, size, rows, swap=swap, most=clips) as source:
        return [to_global(batch, step.rows) for batch in source]


class ValidationHook(Hook):
    """Measures `validate_clips` held-out clips of each set every `validate_every` steps and at the end.

    The metrics go to metrics.jsonl and TensorBoard. They depend on the weights alone, and are the same in all
    processes. The clips are read once and stay on the devices. The lowest `keep_best` is kept as a checkpoint in
    `best/`; after `stop_after` validations without a lower one the run ends.

    Raises:
      UserError: a set lacks `validate_split`, or there is no metric `keep_best`.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: TrainStep,
        workdir: pathlib.Path,
        metrics: MetricsHook,
        say: Callable[[str], None],
        begin: Mapping[str, Any],
    ):
        self.config, self.metrics, self.say, self.begin = config, metrics, say, begin
        sets = validated_sets(config)
        needed = config.keep_best or config.stop_after
        require(bool(sets) or not needed, f"{NO_SETS}: keep_best and stop_after need one")
        if not sets:
            say(NO_SETS)
        known = [LOSS, *(f"{name}/{stream}" for name in sets for stream in STREAMS)]
        require(
            not config.keep_best or config.keep_best in known,
            f"keep_best={config.keep_best!r} must be one of {', '.join(known)}",
        )
        self.best = best_so_far(config, workdir, begin["step"])
        self.kept = Checkpoints(workdir / "best", 1, say=say) if config.keep_best else None
        if self.kept is not None:
            self.kept.set_aside(begin["step"])  # of an attempt that went further
        self.enough = False
        self.sets = {name: self._read(step, name, *place) for name, place in sets.items()}
        self.baselines: dict[str, dict[str, np.ndarray]] = {}
        self.measure = step.forward(self._measure)
        self.whole = step.forward(lambda _, batch: {stream: batch[stream] for stream in OTHER})

    def _read(self, step: TrainStep, name: str, path: str, split: str) -> list[Batch]:
        """The clips of a set, with both streams of other clips beside them as `other_image` and `other_audio`."""
        clips = min(self.config.validate_clips, records.describe(path).splits[split].clips)
        self.say(f"validation: {clips} clips of {name} (split {split!r})")
        swaps = ("", *OTHER) if clips > 1 else ("",)
        own, *swapped = (read_held_out(self.config, step, path, split, clips, swap) for swap in swaps)
        for batch, *others in zip(own, *swapped, strict=True):
            for stream, other in zip(OTHER, others):
                batch |= {f"other_{stream}": other[stream], "valid": batch["valid"] & other["valid"]}
        return own

    def _measure(self, model: models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        """Errors [B] under each condition, and the masks [B, patches]."""
        noise = mask_noise(batch["index"], self.config.model, MASKS)
        masks = model.masks(len(batch["image"]), *noise)
        found = masked_errors(model, batch, masks)
        for stream, other in OTHER.items():
            if f"other_{other}" in batch:
                found |= masked_errors(model, batch, masks, stream, "right/")
                found |= masked_errors(model, batch | {other: batch[f"other_{other}"]}, masks, stream, "swapped/")
        return found | {"image_mask": masks[0].mask, "audio_mask": masks[1].mask, "valid": batch["valid"]}

    def shown(self, step: TrainStep) -> Batch | None:
        """A batch of held-out clips with its masks' noise, for plots; `None` where no set has any."""
        batch = next((batches[0] for batches in self.sets.values()), None)
        if batch is None:
            return None
        draw = jax.jit(lambda index: mask_noise(index, self.config.model, MASKS), out_shardings=step.rows)
        noise = draw(batch["index"])
        return batch | {"image_noise": noise.image, "audio_noise": noise.audio}

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return bool(self.sets) and (finished or step % self.config.validate_every == 0)

    def after_step(self, moment: Moment) -> None:
        line: dict[str, float] = {"step": moment.step}
        losses = []
        for name, batches in self.sets.items():
            errors = self._errors(moment.state, name, batches)
            if len(errors[STREAMS[0]]):
                line |= {f"{PREFIX}{name}/{metric}": value for metric, value in summary(errors).items()}
                losses.append(sum(self._weight(stream) * errors[stream] for stream in STREAMS))
        if not losses:
            return
        line[PREFIX + LOSS] = float(np.concatenate(losses).mean())
        self.metrics.write({name: value for name, value in line.items() if math.isfinite(value)})  # as JSON has them
        self._judge(moment, line)

    def _weight(self, error: str) -> float:
        stream: models.StreamConfig = getattr(self.config.model, error.removesuffix("_error"))
        return stream.loss_weight

    def _errors(self, state: TrainState, name: str, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
        """Errors [n] of the clips of a set by name; those of the baseline on the first process alone."""
        outputs = [jax.device_get(self.measure(state, batch)) for batch in batches]
        arrays = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
        valid = arrays["valid"]
        errors = {key: x[valid].astype(np.float64) for key, x in arrays.items() if key.endswith("_error")}
        if valid.any() and name not in self.baselines:  # computed once
            clips = [jax.device_get(self.whole(state, batch)) for batch in batches]
            streams = {stream: np.concatenate([clip[stream] for clip in clips])[valid] for stream in OTHER}
            masks = {stream: arrays[f"{stream}_mask"][valid] > 0 for stream in OTHER}
            self.baselines[name] = baselines(streams, masks, self.config.model) if jax.process_index() == 0 else {}
        return errors | self.baselines.get(name, {})

    def _judge(self, moment: Moment, line: Mapping[str, float]) -> None:
        """Says how this validation compares with those before, keeps its weights, or ends the run."""
        name, before = self.config.keep_best or LOSS, self.best
        self.best = before.after(moment.step, line[PREFIX + name])
        lower = self.best.step == moment.step
        beside = "the lowest so far" if lower else f"the lowest was {before.value:.4g} at step {before.step}"
        self.say(f"step {moment.step}: {PREFIX}{name} {line[PREFIX + name]:.4g}, {beside}")
        if lower and self.kept is not None:
            position = self.begin["position"] + (moment.step - self.begin["step"]) * self.config.batch_size
            meta = {name: value for name, value in line.items() if name != "step"}
            meta |= {"position": position, "skipped": self.metrics.skipped}
            self.kept.save(moment.step, moment.state, self.config, **meta)
        if 0 < self.config.stop_after <= self.best.since and not moment.finished:
            self.enough = True
            self.say(f"stop_after={self.config.stop_after} validations without a lower {name}: the run ends")

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()
        if self.best.step:
            where = f", kept in {self.kept.folder}" if self.kept is not None else ""
            name = PREFIX + (self.config.keep_best or LOSS)
            self.say(f"the lowest {name} was {self.best.value:.4g} at step {self.best.step}{where}")


def baselines(
    streams: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], model: models.AVMAEConfig
) -> dict[str, np.ndarray]:
    """The errors [n] of interpolation and of the mean of each mel row.

    Args:
      streams: image uint8 [n, H, W, 3] and audio float32 [n, mels, frames].
      masks: of both, bool [n, patches].
      model: its patches and targets.
    """
    pixels = np.asarray(models.normalize_image(jnp.asarray(streams["image"])))
    moments = [row_moments(*clip, model.audio) for clip in zip(streams["audio"], masks["audio"], strict=True)]
    errors = [interpolation_error(*clip, model.image) for clip in zip(pixels, masks["image"], strict=True)]
    return {"baseline/image_error": np.array(errors), "baseline/audio_error": row_mean_errors(moments)}


def summary(errors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics of one set from the errors [n] of its clips."""
    means = {name: float(x.mean()) for name, x in errors.items()}
    found = {stream: means[stream] for stream in STREAMS}
    for stream in STREAMS:
        for name, above, below in (
            ("over_baseline", stream, f"baseline/{stream}"),
            ("swapped_over_right", f"swapped/{stream}", f"right/{stream}"),
        ):
            if above in means and means.get(below):
                found[f"{name}/{stream}"] = means[above] / means[below]
    return found
