"""Plots that show what a model learned: reconstructions beside their originals, and a run's curves."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from av_mae.models import IMAGENET_DEVIATION, IMAGENET_MEAN, Output, patchify, unpatchify
from av_mae.models.config import AVMAEConfig, StreamConfig

MAP_COLOURS = colormaps["tab20"]
LEVEL = "visible level"  # of predictions that say nothing of a patch's mean and deviation
COLUMNS = ("frame", "visible", "rebuilt", "audio", "visible", "rebuilt")
CURVES = ("loss", "image_loss", "audio_loss", "learning_rate", "grad_norm", "clips_per_second")
HIDDEN = 0.5  # the grey of masked patches
AUDIO_COLOURS = colormaps["magma"].with_extremes(bad=str(HIDDEN))
HEAT_COLOURS, HEAT_SHARE = colormaps["inferno"], 0.6
ROW_INCHES, HEADER_INCHES = 1.6, 0.45


class Panels(NamedTuple):
    """Original, visible and rebuilt of one stream; hidden patches of `visible` are NaN. Images lie in 0…1."""

    original: np.ndarray
    visible: np.ndarray
    rebuilt: np.ndarray


def image_panels(image: np.ndarray, prediction: ArrayLike, mask: ArrayLike, stream: StreamConfig) -> Panels:
    """Images [n, H, W, 3] of frames (uint8) and predictions [n, N, P] of the normalised image; mask is 1 if removed."""
    original = np.asarray(image, np.float32) / 255
    normalized = (original - IMAGENET_MEAN) / IMAGENET_DEVIATION
    panels = _panels(normalized, prediction, mask, stream)
    return Panels(original, *(np.clip(panel * IMAGENET_DEVIATION + IMAGENET_MEAN, 0, 1) for panel in panels[1:]))


def audio_panels(audio: np.ndarray, prediction: ArrayLike, mask: ArrayLike, stream: StreamConfig) -> Panels:
    """Spectrograms [n, mels, frames] of log-mels and their predictions [n, N, P]; mask is 1 if removed."""
    spectrogram = np.asarray(audio, np.float32).reshape(-1, *stream.size, 1)
    return Panels(*(panel[..., 0] for panel in _panels(spectrogram, prediction, mask, stream)))


def reconstructions(
    image: np.ndarray, audio: np.ndarray, out: Output, config: AVMAEConfig, titles: list[str] | None = None
) -> np.ndarray:
    """A plot with one row per clip: frame and spectrogram, each original, visible and rebuilt.

    Masked patches of `rebuilt` come from the prediction, the others from the original. Predictions of targets that are
    normalised per patch get the mean and deviation of the clip's visible patches: they show structure, not level. Low
    frequencies are at the bottom.

    Args:
      image: uint8 [n, H, W, 3].
      audio: float32 log-mels [n, mels, frames] or [n, mels, frames, 1].
      out: a model's Output (its predictions [n, N, P] and masks [n, N]).
      config: the model's config.
      titles: a line of text above each clip's row.

    Returns:
      uint8 [height, width, 3].
    """
    images = image_panels(image, out.image_prediction, out.image_mask, config.image)
    sounds = audio_panels(audio, out.audio_prediction, out.audio_mask, config.audio)
    rows = [list(clip) for clip in zip(*images, *sounds, strict=True)]
    columns = [
        f"{name} ({LEVEL})" if name == "rebuilt" and stream.normalize_targets else name
        for name, stream in zip(COLUMNS, (config.image,) * 3 + (config.audio,) * 3, strict=True)
    ]
    mels, frames = config.audio.size
    widths = [1.0] * 3 + [max(frames / mels, 0.5)] * 3
    return gallery(rows, tuple(columns), titles or [""] * len(rows), widths)


def gallery(
    rows: list[list[np.ndarray]], columns: tuple[str, ...], titles: list[str], widths: Sequence[float] | None = None
) -> np.ndarray:
    """A plot with one row per clip.

    Args:
      rows: of each clip, frames [H, W, 3] (uint8, or floats in 0…1 with NaN where they are hidden) and spectrograms
        [mels, frames], which share the colour scale of the row's first one.
      columns: the names of a row's panels.
      titles: a line of text above each row.
      widths: of the panels, relative to one another; by default all are alike.

    Returns:
      uint8 [height, width, 3].
    """
    inches = ROW_INCHES * len(rows) + HEADER_INCHES
    figure = Figure(figsize=(1.75 * len(columns), inches), dpi=100, facecolor="white")
    axes = figure.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        width_ratios=widths,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.02,
            "wspace": 0.04,
            "hspace": 0.14,
            "top": 1 - HEADER_INCHES / inches,
        },
    )
    for row, panels, title in zip(axes, rows, titles, strict=True):
        spectrograms = [number for number, panel in enumerate(panels) if panel.ndim == 2]
        _draw_frames(
            [row[n] for n, panel in enumerate(panels) if panel.ndim == 3],
            [panel for panel in panels if panel.ndim == 3],
        )
        if spectrograms:
            _draw_spectrograms([row[n] for n in spectrograms], [panels[n] for n in spectrograms])
        row[0].text(0, 1.03, title, transform=row[0].transAxes, fontsize=8)
    for top, name in zip(axes[0], columns, strict=True):
        box = top.get_position()
        figure.text((box.x0 + box.x1) / 2, 1 - 0.5 * HEADER_INCHES / inches, name, ha="center", fontsize=10)
    return _render(figure)


def heat_map(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Colours of a map [H, W], from its lowest value to its highest, over a frame uint8 [H, W, 3] in grey: uint8
    [H, W, 3]."""
    heat = heat.astype(np.float64)
    heat = (heat - heat.min()) / max(1e-12, heat.max() - heat.min())
    grey = frame.mean(-1, keepdims=True)
    return ((1 - HEAT_SHARE) * grey + HEAT_SHARE * 255 * HEAT_COLOURS(heat)[..., :3]).round().astype(np.uint8)


def confusion(counts: np.ndarray, classes: list[str], most: int = 30) -> np.ndarray:
    """A confusion matrix, counts [true classes, predicted classes], as a plot uint8 [height, width, 3].

    Rows are shares of each true class; up to `most` classes are named.
    """
    figure = Figure(figsize=(6.5, 6), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="viridis", vmin=0, vmax=1)
    if len(classes) <= most:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(shown, shrink=0.8)
    return _render(figure)


def bars(panels: Mapping[str, Mapping[str, list[tuple[float, float] | None]]], names: list[str]) -> np.ndarray:
    """Bars of metrics, a panel side by side for each title.

    Args:
      panels: title → metric → (value, deviation) for each of `names`, `None` for a name without a value; a deviation of
        NaN is not drawn.
      names: what is compared, in the order of the bars.

    Returns:
      uint8 [height, width, 3].
    """
    shares = [len(panel) for panel in panels.values()]
    figure = Figure(figsize=(2.5 + 2 * sum(shares), 4), dpi=100, facecolor="white", layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": shares})[0]
    width = 0.8 / len(names)
    for axes, (title, panel) in zip(row, panels.items(), strict=True):
        for number, name in enumerate(names):
            values = [entries[number] or (np.nan, np.nan) for entries in panel.values()]
            means, deviations = zip(*values, strict=True)
            axes.bar(
                np.arange(len(panel)) + (number + 0.5) * width - 0.4,
                means,
                width,
                label=name,
                yerr=np.nan_to_num(deviations),
                error_kw={"elinewidth": 1},
            )
        axes.set_xticks(range(len(panel)), list(panel), fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return _render(figure)


def principal(vectors: np.ndarray, count: int = 2) -> np.ndarray:
    """The first principal components of vectors [n, D], largest first: [n, count], each of mean 0."""
    centred = np.asarray(vectors, np.float64) - np.mean(vectors, axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :count] * values[:count]


def embedding_map(streams: Mapping[str, np.ndarray], labels: np.ndarray, classes: list[str]) -> np.ndarray:
    """Maps of the embeddings [n, D] of each stream, side by side: their first two principal components, coloured by
    class (labels int [n]). Returns uint8 [height, width, 3]."""
    figure = Figure(figsize=(4 * len(streams) + 1.2, 4), dpi=100, facecolor="white", layout="constrained")
    for axes, (name, vectors) in zip(figure.subplots(1, len(streams), squeeze=False)[0], streams.items(), strict=True):
        points = principal(vectors)
        for number in np.unique(labels):
            x, y = points[labels == number].T
            axes.scatter(x, y, s=12, color=MAP_COLOURS(number % MAP_COLOURS.N), label=classes[number])
        axes.set(title=name, xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _render(figure)


def curves(metrics: list[dict[str, float]], names: Sequence[str] = CURVES) -> np.ndarray:
    """Curves of the lines of `metrics.jsonl` over steps, three in a row.

    Args:
      metrics: the lines, each with a `step`.
      names: keys to draw; a key that no line has leaves its axes empty, saying so.

    Returns:
      uint8 [height, width, 3].
    """
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(10.5, 2.7 * rows), dpi=100, facecolor="white", layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, 3, number)
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points), color="tab:blue", linewidth=1.2)
        else:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        axes.set_title(name.replace("_", " "), fontsize=10, parse_math=False)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return _render(figure)


def save_png(path: str | os.PathLike[str], plot: np.ndarray) -> None:
    """Writes a uint8 plot [height, width, 3] as PNG, making its folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plot).save(path)


def _panels(original: np.ndarray, prediction: ArrayLike, mask: ArrayLike, stream: StreamConfig) -> Panels:
    """`Panels` [n, H, W, C] in the model's input space."""
    # Rearranging keeps NumPy's arrays what they are: nothing goes to a device here.
    patches = np.asarray(patchify(original, stream.patch_size))
    predicted = np.asarray(prediction, np.float32)
    removed = np.asarray(mask, bool)[..., None]
    if stream.normalize_targets:  # what a masked patch's mean and deviation are, the model does not say
        deviation, shown = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6), ~removed
        mean = patches.mean(-1, keepdims=True).mean(1, keepdims=True, where=shown)
        predicted = predicted * deviation.mean(1, keepdims=True, where=shown) + mean
    visible = np.where(removed, np.nan, patches)
    rebuilt = np.where(removed, predicted, patches)
    images = [np.asarray(unpatchify(part, stream)) for part in (visible, rebuilt)]
    return Panels(original, *images)


def _draw_frames(axes: Sequence[Axes], frames: list[np.ndarray]) -> None:
    for one, frame in zip(axes, frames, strict=True):
        one.set_axis_off()
        one.imshow(
            frame if frame.dtype == np.uint8 else np.where(np.isnan(frame), HIDDEN, frame), interpolation="nearest"
        )


def _draw_spectrograms(axes: Sequence[Axes], spectrograms: list[np.ndarray]) -> None:
    """One colour scale for all three, that of the original."""
    low, high = np.percentile(spectrograms[0], (1, 99.5))
    for one, spectrogram in zip(axes, spectrograms, strict=True):
        one.set_axis_off()
        one.imshow(
            spectrogram,
            origin="lower",
            cmap=AUDIO_COLOURS,
            vmin=low,
            vmax=max(high, low + 1e-3),
            interpolation="nearest",
        )


def _render(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A frame uint8 [H, W, 3], darkened where the mask [H, W] (0 … 1) is not."""
    return (image * (0.25 + 0.75 * np.clip(mask, 0, 1)[..., None])).astype(np.uint8)
