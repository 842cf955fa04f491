"""Masked reconstruction on held-out clips: what the model rebuilds, beside baselines, and what fusion carries.

Every error is the mean squared error over masked patches in the space of the model's targets (per-patch normalised
where the model's are), per clip, then averaged over clips. Masks depend on the seed and the clip's index in its set
alone, and are the same for everything that is compared. Metrics of a set (`SET/…/image_error`, `SET/…/audio_error`):

- no prefix: both streams masked, as in training; `untrained/`: the same with random weights; `baseline/`: the image
  by interpolation of the visible pixels (`interpolate_image`), the audio by the mean of each mel row over the set's
  own clips; `over_baseline/`: ratio of the model's error to the baseline's.
- `right/`, `swapped/`, `blank/`: the other stream fully visible, and the clip's own, another clip's, or nothing
  (the mean colour; silence). `swapped_over_right/`, `blank_over_right/` (ratios), `swapped_minus_right/`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import fft

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.config import LEAST, DataConfig, MeshConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Bootstrap, Metric
from av_mae.evaluate.task import Clip, Condition, HeldOut, Measurable, Measured, Task, Untrained, blank, set_names
from av_mae.models import kinds
from av_mae.models.config import require, require_bounds
from av_mae.models.kinds import Params
from av_mae.train.step import Batch
from av_mae.workdir import read_metrics

DISTANCE_POWER = 3.0
STREAMS = ("image_error", "audio_error")
ROWS = {
    "both masked, as in training": "",
    "  baseline": "baseline/",
    "  untrained model": "untrained/",
    "  model / baseline": "over_baseline/",
    "other stream visible: right": "right/",
    "  swapped": "swapped/",
    "  blank": "blank/",
    "  swapped / right": "swapped_over_right/",
    "  blank / right": "blank_over_right/",
    "  swapped - right": "swapped_minus_right/",
}
Errors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReconstructionData:
    """Prepared sets, separated by commas, each measured by itself; `clips` of each at most (0: all).

    `local` as in DataConfig.
    """

    path: str = ""
    split: str = "test"
    clips: int = 0
    workers: int = 0
    local: str = ""

    def __post_init__(self):
        require(bool(self.split), "data.split must name a split of the prepared sets, e.g. test")
        require_bounds(self, "data.", LEAST)


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig(Measurable):
    """Masked reconstruction by the checkpoint `init`: a run's work directory (its last checkpoint), or one checkpoint.

    `bootstrap` resamplings of the clips give the 95 % intervals; `pictures` clips of each set are drawn.
    """

    task: str = "reconstruction"
    batch_size: int = 64
    mesh: MeshConfig = MeshConfig()
    data: ReconstructionData = ReconstructionData()

    def __post_init__(self):
        require_bounds(self, least=LEAST)

    @property
    def held_out(self) -> HeldOut:
        """Each set is measured by itself."""
        sets = set_names(DataConfig(path=self.data.path).paths)
        return HeldOut(sets, self.data.split, self.data.clips, self.batch_size)

    def run_config(self, pretrained: TrainConfig, annotations: tuple[str, ...], classes: int) -> TrainConfig:
        """The recipe of a pretraining with the mesh and the clips that are measured, in float32."""
        data = DataConfig(self.data.path, workers=self.data.workers, sound=pretrained.data.sound)
        return TrainConfig(steps=1, dtype="float32", data=data, mesh=self.mesh, model=pretrained.model)


class Noise(NamedTuple):
    """Mask noise of both streams, float32 [n, patches]."""

    image: jax.Array
    audio: jax.Array


class Moments(NamedTuple):
    """Of one clip's masked audio, by mel row, float64 [mels]: weights, and values and squares times the weights.

    The weights are those with which squared differences count in the clip's error; `mean` is the plain mean of the
    whole row. From them comes the error of any guess that is constant along a row.
    """

    weights: np.ndarray
    first: np.ndarray
    second: np.ndarray
    mean: np.ndarray


class Scores(NamedTuple):
    """What one clip gives: errors by name, and where both streams are masked the moments of its audio."""

    errors: dict[str, float]
    audio: Moments | None


def interpolate_image(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Fills hidden pixels with the inverse-distance weighted mean of all visible pixels (Shepard's interpolation).

    The weight of a visible pixel at distance d is d^-3, which is about the best power on Toy Band: 2 leans too much
    on far pixels, 4 and the nearest pixel copy the texture's noise.

    Args:
      image: [H, W, C], any scale.
      hidden: bool [H, W]; at least one pixel is visible.

    Returns:
      float64 [H, W, C]; visible pixels are left as they are.
    """
    height, width = hidden.shape
    rows, columns = np.arange(-height + 1, height)[:, None], np.arange(-width + 1, width)
    distance = np.hypot(rows, columns)
    distance[height - 1, width - 1] = 1
    weight = distance**-DISTANCE_POWER
    weight[height - 1, width - 1] = 0
    shape = (fft.next_fast_len(3 * height, real=True), fft.next_fast_len(3 * width, real=True))
    visible = ~hidden
    planes = np.concatenate([np.where(visible[..., None], image, 0.0), visible[..., None]], axis=-1)
    spectrum = fft.rfft2(planes, shape, axes=(0, 1)) * fft.rfft2(weight, shape)[..., None]
    sums = fft.irfft2(spectrum, shape, axes=(0, 1))[height - 1 : 2 * height - 1, width - 1 : 2 * width - 1]
    return np.where(visible[..., None], image, sums[..., :-1] / sums[..., -1:])


def mask_noise(index: jax.Array, model: models.AVMAEConfig, seed: int) -> Noise:
    """Noise that depends on the seed and each clip's index [n] in its set alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(index, jnp.uint32))
    image, audio = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    draw = jax.vmap(lambda key, tokens: jax.random.uniform(key, (tokens,)), (0, None))
    return Noise(draw(image, model.image.tokens), draw(audio, model.audio.tokens))


def masked_errors(
    model: models.AVMAE, batch: Batch, masks: Sequence[models.Mask], only: str = "", prefix: str = ""
) -> dict[str, jax.Array]:
    """Errors [B] of both streams under `masks`, or of `only` one of them with the other one fully visible."""
    image_mask, audio_mask = (
        mask if only in ("", stream) else None for mask, stream in zip(masks, ("image", "audio"), strict=True)
    )
    image = models.normalize_image(batch["image"])
    found = model.reconstruct(image, batch["audio"], image_mask=image_mask, audio_mask=audio_mask).errors
    return {f"{prefix}{stream}_error": error for stream, error in found.items()}


def on_grid(values: np.ndarray, stream: models.StreamConfig) -> np.ndarray:
    """Values of the patches [patches] at each of their pixels, [H, W]."""
    patches = np.repeat(values[None, :, None], stream.patch_values, -1)
    return np.asarray(models.unpatchify(jnp.asarray(patches), stream))[0, ..., 0]


def pixel_weights(x: np.ndarray, mask: np.ndarray, stream: models.StreamConfig) -> np.ndarray:
    """How much the squared difference at each pixel counts in a clip's error, [H, W].

    Args:
      x: the clip's input [H, W, C].
      mask: bool [patches], which patches are masked.
      stream: the stream's patches; where its targets are normalised, differences count by the patch's own scale.
    """
    patches = np.asarray(models.patchify(jnp.asarray(x)[None], stream.patch_size), np.float64)[0]
    scale = patches.var(-1, ddof=1) + 1e-6 if stream.normalize_targets else 1.0
    return on_grid(mask / (mask.sum() * stream.patch_values * scale), stream)


def interpolation_error(image: np.ndarray, mask: np.ndarray, stream: models.StreamConfig) -> float:
    """The error of interpolating the masked patches (bool [patches]) of a normalised image [H, W, C]."""
    filled = interpolate_image(image, on_grid(mask, stream))
    return float((pixel_weights(image, mask, stream)[..., None] * np.square(filled - image)).sum())


def row_moments(audio: np.ndarray, mask: np.ndarray, stream: models.StreamConfig) -> Moments:
    """The moments of a log-mel [mels, frames] whose patches `mask` (bool [patches]) are masked."""
    weights, values = pixel_weights(audio[..., None], mask, stream), audio.astype(np.float64)
    return Moments(weights.sum(1), (weights * values).sum(1), (weights * values**2).sum(1), values.mean(1))


def row_mean_errors(clips: list[Moments]) -> np.ndarray:
    """The errors [n] of guessing, in each clip, the mean of each mel row over all clips and frames."""
    weights, first, second, means = (np.stack(values) for values in zip(*clips, strict=True))
    guess = means.mean(0)
    return (second - 2 * guess * first + guess**2 * weights).sum(1)


def summarize(errors: Errors, bootstrap: Bootstrap) -> dict[str, Metric]:
    """Metrics of one set from its per-clip errors."""
    metrics = {name: bootstrap.mean(values) for name, values in errors.items()}
    for stream in STREAMS:
        right = errors[f"right/{stream}"]
        metrics[f"over_baseline/{stream}"] = bootstrap.ratio(errors[stream], errors[f"baseline/{stream}"])
        metrics[f"swapped_over_right/{stream}"] = bootstrap.ratio(errors[f"swapped/{stream}"], right)
        metrics[f"blank_over_right/{stream}"] = bootstrap.ratio(errors[f"blank/{stream}"], right)
        metrics[f"swapped_minus_right/{stream}"] = bootstrap.difference(errors[f"swapped/{stream}"], right)
    return metrics


def format_table(name: str, metrics: Mapping[str, Metric], clips: int, skipped: int) -> str:
    """The closing table of one set: masked errors with 95 % intervals."""
    title = f"{name}: {clips} held-out clips" + (f", {skipped} skipped" if skipped else "")
    lines = [f"{title:<42}{'image error':<25}audio error"]
    for label, prefix in ROWS.items():
        lines.append(f"  {label:<40}" + "".join(f"{metrics[prefix + stream]!s:<25}" for stream in STREAMS).rstrip())
    return "\n".join(lines) + "\n"


class Reconstruction(Task[ReconstructionConfig]):
    """The pretrained model as it is; both streams are swapped and blanked."""

    config_class = ReconstructionConfig
    kind = kinds.PRETRAINING
    trains = False

    def __init__(self, config: ReconstructionConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        if checkpoint.kind != self.kind:
            raise UserError(
                f"init={config.init} must be a pretraining checkpoint, with decoders; it holds: {checkpoint.kind!r}"
            )
        self.model, self.objective = checkpoint.config.model, Untrained(self.kind, checkpoint.config.model)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (
            Condition(),
            Condition("untrained/", untrained=True),
            Condition("swapped/audio/", swap="audio"),
            Condition("swapped/image/", swap="image"),
        )

    def untrained_weights(self) -> Params:
        return kinds.flat_values(models.AVMAE(self.model, rngs=nnx.Rngs(self.config.seed)))

    def forward(self, model: models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        """Errors [B] with both streams masked, and the masks [B, patches]."""
        masks = model.masks(len(batch["image"]), *mask_noise(batch["index"], self.model, self.config.seed))
        return self.errors(model, batch) | {"image_mask": masks[0].mask, "audio_mask": masks[1].mask}

    def forward_under(self, condition: Condition, model: models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        """Errors [B], the names with their prefixes."""
        if condition.swap:
            return self.errors(model, batch, "image" if condition.swap == "audio" else "audio", "swapped/")
        if condition.untrained:
            return self.errors(model, batch, prefix=condition.name)
        found = self.forward(model, batch)
        for stream, other in (("image", "audio"), ("audio", "image")):
            found |= self.errors(model, batch, stream, "right/")
            found |= self.errors(model, blank(batch, other, self.sound), stream, "blank/")
        return found

    def errors(self, model: models.AVMAE, batch: Batch, only: str = "", prefix: str = "") -> dict[str, jax.Array]:
        """Errors [B] of both masked streams, or of `only` one of them with the other one fully visible."""
        masks = model.masks(len(batch["image"]), *mask_noise(batch["index"], self.model, self.config.seed))
        return masked_errors(model, batch, masks, only, prefix)

    def forward_drawn(self, model: models.AVMAE, batch: Batch) -> dict[str, jax.Array]:
        noise = mask_noise(batch["index"], self.model, self.config.seed)
        out = model(models.normalize_image(batch["image"]), batch["audio"], *noise)
        return {"image_prediction": out.image_prediction, "audio_prediction": out.audio_prediction}

    def score(self, clip: Clip) -> Scores:
        errors = {name: float(x) for name, x in clip.items() if name.endswith("_error")}
        if "image_mask" not in clip:
            return Scores(errors, None)
        image = np.asarray(models.normalize_image(jnp.asarray(clip["image"])))
        errors["baseline/image_error"] = interpolation_error(image, clip["image_mask"] > 0, self.model.image)
        return Scores(errors, row_moments(clip["audio"], clip["audio_mask"] > 0, self.model.audio))

    def metrics(self, scores: dict[str, list[Scores]], bootstrap: Bootstrap) -> dict[str, Metric]:
        errors = {
            name: np.array([clip.errors[name] for clip in clips])
            for clips in scores.values()
            for name in clips[0].errors
        }
        moments = [clip.audio for clip in scores[""] if clip.audio is not None]
        return summarize(errors | {"baseline/audio_error": row_mean_errors(moments)}, bootstrap)

    def table(self, name: str, metrics: Mapping[str, Metric], clips: int, skipped: int) -> str:
        return format_table(name, metrics, clips, skipped)

    def plot(self, measured: Measured, folder: pathlib.Path) -> None:
        """Reconstructions of clips spread over the set, and the curves of the run where `init` is one."""
        clips, names = zip(*measured.drawn, strict=True)
        fields = ("image", "audio", "image_prediction", "audio_prediction", "image_mask", "audio_mask")
        image, audio, *rest = (np.stack([clip[name] for clip in clips]) for name in fields)
        out = models.Output(jnp.zeros(()), jnp.zeros(()), *map(jnp.asarray, rest))
        plot = plots.reconstructions(image, audio, out, self.model, list(names))
        plots.save_png(folder / f"reconstruction_{pathlib.Path(measured.name).name}.png", plot)
        lines = pathlib.Path(self.config.init) / "metrics.jsonl"
        if lines.is_file():
            plots.save_png(folder / "curves.png", plots.curves(read_metrics(lines)))
