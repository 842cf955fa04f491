"""Masked reconstruction on held-out clips: what the model rebuilds, beside baselines, and what fusion carries.

Every error is the mean squared error over masked patches in the space of the model's targets (per-patch normalised
where the model's are), per clip, then averaged over clips. Masks depend on the seed and the clip's place in its set
alone, and are the same for everything that is compared. Figures of a set (`SET/…/image_error`, `SET/…/audio_error`):

- no prefix: both streams masked, as in training; `untrained/`: the same with random weights; `baseline/`: the image
  by interpolation of the visible pixels (`baselines.interpolate_image`), the sound by the mean of each mel row over
  the set's own clips; `over_baseline/`: ratio of the model's error to the baseline's.
- `right/`, `swapped/`, `blank/`: the other stream fully visible, and the clip's own, another clip's, or nothing
  (the mean colour; silence). `swapped_over_right/`, `blank_over_right/` (ratios), `swapped_minus_right/`.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import fft

from av_mae import models
from av_mae import plots as pictures
from av_mae.config import EvaluationConfig, SoundConfig
from av_mae.data.plans import partners
from av_mae.errors import ClipFailure
from av_mae.evaluate.bootstrap import Bootstrap, Figure, Report
from av_mae.evaluate.clips import Clips, load_clips, map_batches, set_names
from av_mae.loading import load_run

DISTANCE_POWER = 3.0


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


def row_means(audio: np.ndarray) -> np.ndarray:
    """The mean of each mel row over all clips and frames: log-mels [n, mels, frames] → [mels]."""
    return audio.mean((0, 2))


STREAMS = ("image_error", "audio_error")
Errors = dict[str, np.ndarray]


class Noise(NamedTuple):
    """Mask noise of both streams, float32 [n, patches]."""

    image: np.ndarray
    audio: np.ndarray


def run(config: EvaluationConfig, workdir: pathlib.Path) -> Report:
    """Measures the checkpoint on each set of `config.data`.

    Draws `images/reconstruction_SET.png` in workdir, and `images/curves.png` where `init` is a run's workdir.
    """
    names = set_names(config.data)
    recipe, model = load_run(config.init)
    untrained = models.AVMAE(recipe.model, rngs=nnx.Rngs(config.seed))
    figures, tables, measured = {}, [], 0
    skipped: list[ClipFailure] = []
    for name, path in names.items():
        clips = load_clips(path, config.data, recipe.data.sound, recipe.model, config.batch_size)
        noise = mask_noise(clips.index, recipe.model, config.seed)
        errors = model_errors(model, untrained, clips, noise, recipe.data.sound, config)
        errors |= baseline_errors(clips, noise, recipe.model)
        found = summarize(errors, Bootstrap(len(clips.index), config.seed, config.bootstrap))
        figures |= {f"{name}/{figure}": value for figure, value in found.items()}
        tables.append(format_table(name, found, len(clips.index), len(clips.skipped)))
        measured, skipped = measured + len(clips.index), skipped + clips.skipped
        if config.pictures:
            picture = draw(model, clips, noise, config)
            pictures.save_png(workdir / "images" / f"reconstruction_{pathlib.Path(name).name}.png", picture)
    metrics = pathlib.Path(config.init) / "metrics.jsonl"
    if config.pictures and metrics.is_file():
        pictures.save_png(workdir / "images" / "curves.png", pictures.curves(pictures.read_metrics(metrics)))
    tables += [f"skipped {failure}" for failure in skipped[:5]]
    return Report(figures, measured, len(skipped), "\n".join(tables), failures=skipped)


def mask_noise(places: np.ndarray, model: models.AVMAEConfig, seed: int) -> Noise:
    """Noise that depends on the seed and each clip's place [n] in its set alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(places, jnp.uint32))
    keys = jax.vmap(jax.random.split)(keys)
    draw_noise = jax.vmap(lambda key, tokens: jax.random.uniform(key, (tokens,)), (0, None))
    return Noise(
        *(
            np.asarray(draw_noise(keys[:, place], stream.tokens))
            for place, stream in enumerate((model.image, model.audio))
        )
    )


def masks(noise: Noise, model: models.AVMAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Masks [n, patches] of both streams, True where removed: the least noise is kept."""
    return tuple(
        np.asarray(models.random_mask(values, stream.keep).mask, bool)
        for values, stream in zip(noise, (model.image, model.audio), strict=True)
    )


def model_errors(
    model: models.AVMAE,
    untrained: models.AVMAE,
    clips: Clips,
    noise: Noise,
    sound: SoundConfig,
    config: EvaluationConfig,
) -> Errors:
    """Per-clip errors [n] of the model, and of the untrained one, by the names above."""

    def measure(function: Callable, image: np.ndarray, audio: np.ndarray, prefix: str) -> Errors:
        errors = map_batches(function, (image, audio, *noise), config.batch_size)
        return {prefix + name: values for name, values in errors.items()}

    image, audio, partner = clips.image, clips.audio, partners(len(clips.index), config.seed)
    grey = np.broadcast_to(np.round(models.IMAGENET_MEAN * 255).astype(np.uint8), image.shape)
    silence = np.full_like(audio, (np.log10(sound.log_floor) - sound.mean) / sound.std)
    both, image_alone, audio_alone = (
        functools.partial(_errors, model, masked=masked) for masked in (("image", "audio"), ("image",), ("audio",))
    )
    errors = measure(both, image, audio, "")
    errors |= measure(functools.partial(_errors, untrained, masked=("image", "audio")), image, audio, "untrained/")
    others = {"right": (image, audio), "swapped": (image[partner], audio[partner]), "blank": (grey, silence)}
    for prefix, (other_image, other_audio) in others.items():
        errors |= measure(image_alone, image, other_audio, f"{prefix}/")
        errors |= measure(audio_alone, other_image, audio, f"{prefix}/")
    return errors


def baseline_errors(clips: Clips, noise: Noise, model: models.AVMAEConfig) -> Errors:
    """Per-clip errors [n] of interpolated images and of mel-row means, in the space of the model's targets."""
    image_mask, audio_mask = masks(noise, model)
    normalized = np.asarray(models.normalize_image(clips.image))
    hidden = models.unpatchify(np.repeat(image_mask[..., None], model.image.patch_values, -1), model.image)[..., 0]
    filled = np.stack([interpolate_image(image, holes) for image, holes in zip(normalized, hidden, strict=True)])
    rows = np.broadcast_to(row_means(clips.audio)[:, None], clips.audio.shape)
    return {
        "baseline/image_error": target_space_error(filled, normalized, image_mask, model.image),
        "baseline/audio_error": target_space_error(rows[..., None], clips.audio[..., None], audio_mask, model.audio),
    }


def target_space_error(guess: np.ndarray, truth: np.ndarray, mask: np.ndarray, stream) -> np.ndarray:
    """Mean squared error [n] of guessed inputs [n, H, W, C] over masked patches, as the model's loss weighs it.

    Where targets are normalised per patch, both are put on the scale of the true patch.
    """
    guess, truth = (np.asarray(models.patchify(x, stream.patch_size), np.float64) for x in (guess, truth))
    squared = np.square(guess - truth).mean(-1)
    if stream.normalize_targets:
        squared /= truth.var(-1, ddof=1) + 1e-6
    return (squared * mask).sum(1) / mask.sum(1)


def summarize(errors: Errors, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Figures of one set from its per-clip errors."""
    figures = {name: bootstrap.mean(values) for name, values in errors.items()}
    for stream in STREAMS:
        right = errors[f"right/{stream}"]
        figures[f"over_baseline/{stream}"] = bootstrap.ratio(errors[stream], errors[f"baseline/{stream}"])
        figures[f"swapped_over_right/{stream}"] = bootstrap.ratio(errors[f"swapped/{stream}"], right)
        figures[f"blank_over_right/{stream}"] = bootstrap.ratio(errors[f"blank/{stream}"], right)
        figures[f"swapped_minus_right/{stream}"] = bootstrap.difference(errors[f"swapped/{stream}"], right)
    return figures


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


def format_table(name: str, figures: dict[str, Figure], clips: int, skipped: int) -> str:
    """The closing table of one set: masked errors with 95 % intervals."""
    title = f"{name}: {clips} held-out clips" + (f", {skipped} skipped" if skipped else "")
    lines = [f"{title:<42}{'image error':<25}sound error"]
    for label, prefix in ROWS.items():
        lines.append(f"  {label:<40}" + "".join(f"{figures[prefix + stream]!s:<25}" for stream in STREAMS).rstrip())
    return "\n".join(lines) + "\n"


def draw(model: models.AVMAE, clips: Clips, noise: Noise, config: EvaluationConfig) -> np.ndarray:
    """Reconstructions of clips spread over the set."""
    chosen = np.unique(np.linspace(0, len(clips.index) - 1, config.pictures).round().astype(int))
    image, audio = clips.image[chosen], clips.audio[chosen]
    out = _forward(model, image, audio, noise.image[chosen], noise.audio[chosen])
    return pictures.reconstructions(image, audio, out, model.config, [str(clip) for clip in clips.id[chosen]])


@nnx.jit
def _forward(model, image, audio, image_noise, audio_noise):
    return model(models.normalize_image(image), audio, image_noise, audio_noise)


@functools.partial(nnx.jit, static_argnames="masked")
def _errors(model, image, audio, image_noise, audio_noise, masked):
    """Errors of the `masked` streams; one that is not masked is fully visible."""
    image_mask, audio_mask = model.masks(len(image), image_noise, audio_noise)
    image_mask, audio_mask = image_mask if "image" in masked else None, audio_mask if "audio" in masked else None
    image = models.normalize_image(image)
    errors = model.reconstruct(image, audio, image_mask=image_mask, audio_mask=audio_mask).errors
    return {f"{stream}_error": error for stream, error in errors.items()}
