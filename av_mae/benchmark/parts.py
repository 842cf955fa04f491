"""Benchmarks of parts: `fusion` blocks, the training `loop` around its steps, the search for `neighbours`."""

import copy
import dataclasses
import itertools
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx

from av_mae import benchmark, models
from av_mae.benchmark.step import random_batch
from av_mae.checkpoint import Checkpoints, Restored, TrainState
from av_mae.config import TrainConfig
from av_mae.errors import UserError
from av_mae.evaluate import cosine
from av_mae.models import flops
from av_mae.models.fusion import FusionBlock
from av_mae.train.loop import to_global
from av_mae.train.optimizer import run_length
from av_mae.train.run import Run, train_from
from av_mae.train.sharding import make_mesh
from av_mae.train.step import Metrics, TrainStep

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


@dataclasses.dataclass
class Case:
    """A fusion block of one kind and implementation at one pair of token counts, compiled, with its arguments."""

    kind: str
    pair_attention: str
    compiled: Any
    args: tuple[Any, ...]
    flops: int

    def __call__(self) -> Any:
        return self.compiled(*self.args)


def make_case(kind: str, pair_attention: str, image: int, audio: int, batch: int, size: dict[str, int]) -> Case:
    """Compiles a fusion block of `size` for `batch` clips of so many image and audio tokens."""
    width, heads = size["width"], size["heads"]
    config = models.AVMAEConfig(
        image=models.StreamConfig(width=width, heads=heads),
        audio=models.StreamConfig(size=(128, 192), channels=1, width=width, heads=heads),
        fusion=models.FusionConfig(kind=kind, heads=heads, pair_attention=pair_attention),
    )
    graph, state = nnx.split(FusionBlock(width, width, width, config.fusion, rngs=nnx.Rngs(0)))
    counts = (sum(config.fusion.tokens), image, audio)
    keys = jax.random.split(jax.random.key(0), 3)
    args = (state, *(jax.random.normal(k, (batch, n, width)) for k, n in zip(keys, counts, strict=True)))
    compiled = jax.jit(lambda state, *tokens: nnx.merge(graph, state)(*tokens)).lower(*args).compile()
    return Case(kind, pair_attention, compiled, args, flops.fusion_block(config, image, audio, pair_attention))


def measure_fusion(
    batch: int, rounds: int, size: dict[str, int], counts: Sequence[tuple[int, int]] = COUNTS
) -> list[dict[str, Any]]:
    """Times fusion blocks of every kind and implementation.

    Args:
      batch: clips.
      rounds: timed rounds, in which all cases take turns.
      size: `width` and `heads` of the blocks.
      counts: image and audio tokens of the cases.

    Returns:
      One row of metrics for each case and token count; `memory_bytes` are the compiler's temporaries.
    """
    rows = []
    for image, audio in counts:
        cases = {
            f"{kind} {how}": make_case(kind, how, image, audio, batch, size)
            for kind, how in CASES
            if how != "materialized" or image * audio <= MOST_PAIRS
        }
        seconds = benchmark.in_turn(cases, rounds)
        rows += [
            {
                "kind": case.kind,
                "pair_attention": case.pair_attention,
                "image_tokens": image,
                "audio_tokens": audio,
                "seconds": float(np.median(seconds[name])),
                "flops_per_clip": case.flops,
                "memory_bytes": case.compiled.memory_analysis().temp_size_in_bytes,
            }
            for name, case in cases.items()
        ]
    return rows


def fusion_tables(metrics: dict[str, Any]) -> list[benchmark.Table]:
    """What the command prints: a row for each case."""
    head = ("kind", "pairs", "image", "audio", "ms", "MFLOP per clip", "temporary MB")
    cells = [
        (
            row["kind"],
            row["pair_attention"],
            str(row["image_tokens"]),
            str(row["audio_tokens"]),
            f"{1e3 * row['seconds']:.2f}",
            f"{row['flops_per_clip'] / 1e6:.1f}",
            f"{row['memory_bytes'] / 1e6:.1f}",
        )
        for row in metrics["rows"]
    ]
    return [[head, *cells]]


def plot_fusion(rows: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Seconds and memory over the number of tokens, one line per kind and implementation, as PNG."""

    def lines(key: str, unit: float) -> benchmark.Lines:
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            tokens, values = found.setdefault(f"{row['kind']}, {row['pair_attention']}", ([], []))
            tokens.append(row["image_tokens"] + row["audio_tokens"])
            values.append(row[key] * unit)
        return found

    panels = {"time [ms]": lines("seconds", 1e3), "temporary memory [MB]": lines("memory_bytes", 1e-6)}
    benchmark.save_plot(path, panels, "image + audio tokens", yscale="log")


def measure_neighbours(clips: int, width: int, part: int, block: int) -> dict[str, Any]:
    """Seconds and memory of the leave-one-out search among random embeddings, beside scikit-learn's brute force.

    Memory is that of the whole process: its size just before the search, embeddings included, and the most that it
    grew by until the search was done.

    Args:
      clips: number of embeddings.
      width: values of each.
      part: clips for which scikit-learn searches; its time is extrapolated to all clips.
      block: rows that are compared at a time.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise UserError("the comparison needs scikit-learn: pip install scikit-learn") from error
    embeddings = np.random.default_rng(0).standard_normal((clips, width), np.float32)
    before = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    found = cosine.nearest({"embeddings": embeddings}, block)["embeddings"]
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    search = NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(embeddings)
    start = time.perf_counter()
    index = search.kneighbors(embeddings[:part], return_distance=False)
    brute_seconds = (time.perf_counter() - start) * clips / part
    others = np.where(index[:, 0] == np.arange(part), index[:, 1], index[:, 0])
    return {
        "clips": clips,
        "width": width,
        "seconds": seconds,
        "embeddings_bytes": embeddings.nbytes,
        "before_bytes": before,
        "grown_bytes": grown,
        "scikit_learn_clips": part,
        "scikit_learn_extrapolated_seconds": brute_seconds,
        "agreement_share": float(np.mean(others == found.row[:part])),
    }


def clocks() -> np.ndarray:
    """Seconds that have passed, and seconds of all processors for this process."""
    return np.array([time.perf_counter(), time.process_time()])


class Alternating:
    """A step that after every `block` calls runs as many bare ones; `bare` is how far both clocks went in these.

    The first ones come after half a block: what the loop starts at a multiple of `block` falls into its own time.
    """

    def __init__(self, step: Callable[..., Any], batch: dict[str, Any], block: int):
        self.step, self.batch, self.block = step, batch, block
        self.calls, self.bare_calls, self.bare = 0, 0, np.zeros(2)

    def __call__(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Metrics]:
        if self.calls % self.block == self.block // 2:
            state = self.run_bare(state)
        self.calls += 1
        return self.step(state, batch)

    def run_bare(self, state: TrainState) -> TrainState:
        jax.block_until_ready(state)
        began = clocks()
        for _ in range(self.block):
            state, metrics = self.step(state, self.batch)
        jax.block_until_ready((state, metrics))
        self.bare += clocks() - began
        self.bare_calls += self.block
        return state


def looped(step: TrainStep, state: TrainState, host: dict[str, Any], steps: int, folder: pathlib.Path) -> np.ndarray:
    """How far both clocks went in a run of so many steps in `folder`, whose last checkpoint is waited for."""
    folder.mkdir()
    data: Any = SimpleNamespace(batches=lambda position: itertools.repeat(host), clips=1000)
    checkpoints = Checkpoints(folder / "checkpoints")
    began = clocks()
    run = Run(step.config, folder, step, data, steps, checkpoints, "loop")
    train_from(run, Restored(state, {"step": 0, "position": 0, "skipped": 0}))
    seconds = clocks() - began
    checkpoints.close()
    return seconds


def measure_loop(config: TrainConfig, steps: int, block: int) -> dict[str, Any]:
    """What the training loop costs beside its steps: hooks, metrics, input thread, checkpoints.

    The run has everything that runs have, its start and its last checkpoint included. After every few of its steps the
    same compiled step is called bare as often, so that both see the machine alike. Batches are made once: reading clips
    is `benchmark input`'s matter.

    Args:
      config: the recipe.
      steps: of the run.
      block: steps of the run, then bare ones, in turn.

    Returns:
      Metrics, among them the shares (loop - bare) / bare of the time that passed, and of the processors' time, which
      other work on the machine disturbs less.
    """
    step = TrainStep(config, make_mesh(config.mesh), run_length(config, 1000))
    host = {name: np.asarray(x) for name, x in random_batch(config).items()}
    texts = {"id": "clip", "stage": "", "cause": ""}
    host |= {name: np.full(config.batch_size, text, object) for name, text in texts.items()}
    with tempfile.TemporaryDirectory() as folder:
        looped(step, step.init(), host, 3, pathlib.Path(folder) / "first")  # compiles, checkpoints too
        turns = Alternating(step.step, to_global(host, step.rows), block)
        state, step = step.init(), copy.copy(step)
        step.step = turns  # type: ignore[assignment]
        total = looped(step, state, host, steps, pathlib.Path(folder) / "run")
    bare, loop = turns.bare / turns.bare_calls, (total - turns.bare) / steps
    overhead = loop / bare - 1
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "steps": steps,
        "bare_steps": turns.bare_calls,
        "checkpoint_every": config.checkpoint_every,
        "bare_step_seconds": float(bare[0]),
        "loop_step_seconds": float(loop[0]),
        "overhead_share": float(overhead[0]),
        "processor_overhead_share": float(overhead[1]),
    }
