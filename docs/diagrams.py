"""Draws the diagrams of the documentation into docs/diagrams: `python docs/diagrams.py`.

Masks, softmaxes and FLOPs are computed by the package, so that the diagrams say what the code does.
"""

import pathlib

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from av_mae import config as sizes
from av_mae import models
from av_mae.models import flops

FOLDER = pathlib.Path(__file__).resolve().parent / "diagrams"
IMAGE, FUSION, AUDIO, GREY = "#3b7dd8", "#8a4fbe", "#d9822b", "#9aa3af"
KINDS = {
    "dense, all pairs in memory": ("dense", "materialized", "#c0392b", "-"),
    "factorized": ("factorized", "separable", FUSION, "-"),
    "dense": ("dense", "separable", IMAGE, "-"),
    "token": ("token", "separable", AUDIO, "--"),
}


def _box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.2) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.32), width, 0.64, boxstyle="round,pad=0.06", facecolor=colour, edgecolor="none"
        )
    )
    axes.text(x, y, text, ha="center", va="center", color="white", fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.3, shrinkA=0, shrinkB=0
        )
    )


def layer() -> Figure:
    """One layer with fusion: who reads whom."""
    figure = Figure(figsize=(7.6, 3.7), layout="constrained")
    axes = figure.add_subplot(xlim=(-1.5, 9.5), ylim=(-0.7, 4.5))
    axes.set_axis_off()
    columns = ((0, IMAGE, "image"), (4, FUSION, "fusion"), (8, AUDIO, "audio"))
    for x, colour, name in columns:
        _box(axes, x, 0, f"{name}, layer l", colour)
        _box(axes, x, 3.9, f"{name}, layer l + 1", colour)
        _arrow(axes, (x, 0.4), (x, 1.55), colour)
        _arrow(axes, (x, 2.35), (x, 3.5), colour)
    _box(axes, 0, 1.95, "ViT block", "#26415f")
    _box(axes, 4, 1.95, "fusion block", "#4a2a68")
    _box(axes, 8, 1.95, "ViT block", "#7a4512")
    for x, target in ((3.4, 1.2), (4.6, 6.8)):
        _arrow(axes, (x, 0.4), (target, 1.75), FUSION)
    _arrow(axes, (0.7, 0.4), (2.8, 1.75), IMAGE)
    _arrow(axes, (7.3, 0.4), (5.2, 1.75), AUDIO)
    for x in (1.6, 6.4):
        axes.text(x, 2.35, "keys and\nvalues only", ha="center", fontsize=8, color=FUSION)
    return figure


def masking() -> Figure:
    """What the two encoders see of one clip: random patches, as the model draws them."""
    config = sizes.sized_model("base")
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    for index, (name, stream) in enumerate((("image", config.image), ("sound", config.audio))):
        noise = models.mask_noise(jax.random.key(index), 1, stream.tokens)
        kept = 1 - np.asarray(models.random_mask(noise, stream.keep).mask)[0].reshape(stream.grid)
        axes = figure.add_subplot(1, 2, index + 1)
        axes.pcolormesh(
            kept, cmap="Blues" if index == 0 else "Oranges", vmin=-0.15, vmax=1.5, edgecolors="white", linewidth=1
        )
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"{name}: {stream.keep} of {stream.tokens} patches are seen", fontsize=10)
    return figure


def pairs() -> Figure:
    """The softmax over all pairs is the outer product of two softmaxes."""
    generator = np.random.default_rng(3)
    s, t = generator.normal(0, 0.6, 7), generator.normal(0, 0.6, 10)
    together = np.asarray(jax.nn.softmax((s[:, None] + t).reshape(-1))).reshape(7, 10)
    p, r = np.asarray(jax.nn.softmax(s)), np.asarray(jax.nn.softmax(t))
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    shown = ((together, "softmax over all pairs of s_i + t_j"), (np.outer(p, r), "softmax(s)_i · softmax(t)_j"))
    for index, (weights, title) in enumerate(shown):
        axes = figure.add_subplot(1, 2, index + 1)
        axes.imshow(weights, cmap="magma", vmin=0, vmax=together.max())
        axes.set(xlabel="sound token j", ylabel="image token i", xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    np.testing.assert_allclose(together, np.outer(p, r), atol=1e-6)
    return figure


def cost() -> Figure:
    """FLOPs of one ViT-B fusion block over the number of tokens it reads, two image tokens to one of sound."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="tokens read (image + sound)", ylabel="GFLOP per clip and block"
    )
    audio = np.unique(np.geomspace(8, 1024, 40).astype(int))
    for label, (kind, implementation, colour, line) in KINDS.items():
        config = sizes.sized_model("base", kind)
        values = [flops.fusion_block(config, 2 * int(n), int(n), implementation) / 1e9 for n in audio]
        axes.plot(3 * audio, values, line, color=colour, label=label)
    for tokens, text in ((68, "masked"), (292, "all patches")):
        axes.axvline(tokens, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(tokens, 0.97, f" {text}", fontsize=8, color="#5b6577", va="top", transform=axes.get_xaxis_transform())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return figure


DIAGRAMS = {"layer": layer, "masking": masking, "pairs": pairs, "cost": cost}


def draw(folder: pathlib.Path) -> None:
    """Writes every diagram as SVG; the same versions of the libraries write the same bytes."""
    folder.mkdir(exist_ok=True)
    for name, make in DIAGRAMS.items():
        with rc_context({"svg.hashsalt": name}):
            figure = make()
            figure.set_facecolor("white")
            FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(FOLDER)
