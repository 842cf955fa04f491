"""`benchmark fusion`: pair attention over token counts, kind × implementation: time, FLOPs, memory."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from av_mae import models
from av_mae.benchmark import timing
from av_mae.models import flops
from av_mae.models.fusion import FusionBlock

COUNTS = ((49, 19), (98, 48), (196, 96), (392, 192))
# All pairs of more tokens than this are not put into memory: (392, 192) would hold 75,000 keys per clip.
MOST_PAIRS = 20_000
CASES = (
    ("dense", "separable"),
    ("dense", "chunked"),
    ("dense", "materialized"),
    ("bilinear", "chunked"),
    ("factorized", "separable"),
    ("token", "separable"),
)


def fusion_block(kind: str, pair_attention: str, size: dict) -> tuple[models.AVMAEConfig, FusionBlock]:
    """A fusion block of one kind and implementation, and the configuration it is counted by."""
    stream = dict(width=size["width"], heads=size["heads"])
    config = models.AVMAEConfig(
        image=models.StreamConfig(**stream),
        audio=models.StreamConfig(size=(128, 192), channels=1, **stream),
        fusion=models.FusionConfig(kind=kind, heads=size["heads"], pair_attention=pair_attention),
    )
    return config, FusionBlock(size["width"], size["width"], size["width"], config.fusion, rngs=nnx.Rngs(0))


@dataclasses.dataclass
class Case:
    """One kind × implementation at one pair of token counts, compiled."""

    kind: str
    pair_attention: str
    image: int
    audio: int
    compiled: jax.stages.Compiled
    args: tuple
    flops: int

    def __call__(self):
        return self.compiled(*self.args)


def make_case(kind: str, pair_attention: str, image: int, audio: int, batch: int, size: dict) -> Case:
    config, block = fusion_block(kind, pair_attention, size)
    graph, state = nnx.split(block)
    counts = (sum(config.fusion.tokens), image, audio)
    keys = jax.random.split(jax.random.key(0), 3)
    args = (state, *(jax.random.normal(k, (batch, n, size["width"])) for k, n in zip(keys, counts, strict=True)))
    compiled = jax.jit(lambda state, *tokens: nnx.merge(graph, state)(*tokens)).lower(*args).compile()
    cost = flops.fusion_block(config, image, audio, pair_attention)
    return Case(kind, pair_attention, image, audio, compiled, args, cost)


def measure(batch: int, rounds: int, size: dict, counts=COUNTS) -> list[dict]:
    """One row of figures for each case and token count; `memory_bytes` are the compiler's temporaries."""
    rows = []
    for image, audio in counts:
        cases = {
            f"{kind} {how}": make_case(kind, how, image, audio, batch, size)
            for kind, how in CASES
            if how != "materialized" or image * audio <= MOST_PAIRS
        }
        seconds = timing.in_turn(cases, rounds)
        for name, case in cases.items():
            rows.append(
                {
                    "kind": case.kind,
                    "pair_attention": case.pair_attention,
                    "image_tokens": image,
                    "audio_tokens": audio,
                    "seconds": float(np.median(seconds[name])),
                    "flops_per_clip": case.flops,
                    "memory_bytes": int(case.compiled.memory_analysis().temp_size_in_bytes),
                }
            )
    return rows


def plot(rows: list[dict], path) -> None:
    """Seconds and memory over the number of tokens, one line per kind and implementation, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label, unit in zip(
        figure.subplots(1, 2),
        ("seconds", "memory_bytes"),
        ("time [ms]", "temporary memory [MB]"),
        (1e3, 1e-6),
        strict=True,
    ):
        for kind, how in CASES:
            line = [row for row in rows if (row["kind"], row["pair_attention"]) == (kind, how)]
            axes.loglog(
                [row["image_tokens"] + row["audio_tokens"] for row in line],
                [row[key] * unit for row in line],
                marker="o",
                label=f"{kind}, {how}",
            )
        axes.set_xlabel("image + audio tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
