"""How long a training step takes on TPU chips, by their public data: the roofline, and the tables of scaling.

- Compute: matrix products at the peak rate, contracted and output sizes rounded up to the matrix unit's tile.
- Memory: the bytes that the compiler counts for its instructions, at the rate of the memory.
- Interconnect: of an array of V bytes shared by g chips, a ring sends 2 V (g - 1) / g bytes per chip to sum it, and
  half of that to gather it, or to sum and scatter it. An exchange among all chips of a slice uses the links of all
  dimensions, one among some of them those of one dimension. Where rings do not close (v5e and v6e: fewer than 16 chips
  in a row) half of the links are idle. Between slices, each chip sends its part of a sum through the data-centre
  network.

A step takes the longer of compute and memory, then all exchanges that the compiled program does not run beside other
instructions; those that it does cost what exceeds the rest.

TPUs, Google Cloud's documentation as read in November 2026: docs.cloud.google.com/tpu/docs/v5e (197 TFLOP/s bfloat16,
16 GB and 819 GB/s of HBM, 400 GB/s of interconnect counting both directions, 2D torus up to 256 chips, 6.4 Tb/s of
data-centre network for these), /v5p-training (459 TFLOP/s, 95 GiB, 2,765 GB/s, 1,200 GB/s, 3D torus up to 8,960
chips, 50 Gb/s a chip) and /v6e (918 TFLOP/s, 32 GB, 1,600 GB/s, 800 GB/s, 2D torus up to 256 chips, 25.6 Tb/s for
these). GPUs: NVIDIA's data sheets of H100 SXM5, H200 SXM and A100 SXM4 (dense bfloat16).
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from av_mae import benchmark
from av_mae.benchmark.compiled import Collective
from av_mae.config import sized_model
from av_mae.errors import UserError
from av_mae.models import AVMAEConfig, closed_form_flops
from av_mae.recipes import load_recipe
from av_mae.train.sharding import BYTES_PER_PARAMETER, STATE_SHARE
from av_mae.train.step import PASSES, Pretraining, count_parameters

Metrics = dict[str, Any]  # of one training step, as `pod.measure` and `assumed` make them


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU.

    kind: JAX's name of it. flops: peak in dense bfloat16 [FLOP/s]. memory: [bytes]. memory_rate: [bytes/s]. link_rate:
    what a chip sends over all links of the interconnect together [bytes/s]. network_rate: a chip's share of the
    data-centre network [bytes/s]. dimensions: of the torus of a slice, whose rings close where an axis has a multiple
    of `ring` chips. most: chips of the largest slice. tile: matrix units take squares of tile × tile values. clock:
    of the matrix units [Hz], the peak over the units' multiply-adds.
    """

    kind: str
    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    network_rate: float
    dimensions: int
    most: int
    ring: int
    tile: int
    clock: float


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 3.1e9, 2, 256, 16, 128, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 6.2e9, 3, 8960, 4, 128, 1.75e9),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1600e9, 400e9, 12.5e9, 2, 256, 16, 256, 1.75e9),
}
# Dense bfloat16 peak FLOP/s by `device_kind`.
PEAK_FLOPS = {chip.kind: chip.flops for chip in CHIPS.values()} | {
    "TPU v4": 275e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
# By dimensions of the torus: the slices that are offered, as square as possible, by their chips.
_SLICES = {2: "2x2 2x4 4x4 4x8 8x8 8x16 16x16", 3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"}
SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    dimensions: {math.prod(shape): shape for shape in (tuple(map(int, name.split("x"))) for name in names.split())}
    for dimensions, names in _SLICES.items()
}
# Chip and shape of each slice by name, e.g. 'v5e:4x4'.
TOPOLOGIES = {
    f"{name}:{'x'.join(map(str, shape))}": (chip, shape)
    for name, chip in CHIPS.items()
    for size, shape in SHAPES[chip.dimensions].items()
    if size <= chip.most
}
COUNTS = (16, 32, 64, 128, 256, 512, 1024)  # chips of the curve
CLIPS_PER_CORE = 250  # clips per second that a host core is assumed to prepare


def link_rate(chip: Chip, shape: Sequence[int], group: int) -> float:
    """Bytes per second that each chip of a slice of this shape sends in an exchange among `group` chips."""
    whole = group >= math.prod(shape)
    used = [n for n in shape if n > 1] if whole else [max(shape)]
    closed = [1.0 if n % chip.ring == 0 else 0.5 for n in used]
    return chip.link_rate * sum(closed) / chip.dimensions


def exchange_seconds(kind: str, size: int, group: int, chip: Chip, shape: Sequence[int], slices: int = 1) -> float:
    """Seconds of one collective.

    Args:
      kind: a key of `SENT`.
      size: bytes of the whole array.
      group: chips that exchange with one another.
      chip: the kind of chip.
      shape: chips of a slice along each dimension.
      slices: slices over which the group reaches.
    """
    inside = max(1, group // slices)
    seconds = SENT[kind] * size * (inside - 1) / inside / link_rate(chip, shape, inside) if inside > 1 else 0.0
    if slices > 1:
        seconds += SENT[kind] * size / inside * (slices - 1) / slices / chip.network_rate
    return seconds


def step_seconds(compute: float, memory: float, shown: float, hidden: float) -> float:
    """Seconds of a step from those of its parts; `hidden` exchanges run beside instructions, `shown` ones do not."""
    return max(compute, memory, hidden) + shown


def predicted(metrics: Metrics, chip: Chip) -> Metrics:
    """Seconds of a compiled step and of its parts, and the share of the peak that it reaches."""
    exchanged = metrics["collectives"].values()
    parts = {
        "compute": metrics["padded_flops"] / chip.flops,
        "memory": metrics["bytes_accessed"] / chip.memory_rate,
        "shown": sum(kind["seconds"] for kind in exchanged),
        "hidden": sum(kind["hidden_seconds"] for kind in exchanged),
    }
    seconds = step_seconds(**parts)
    mfu = metrics["closed_form_flops"] / seconds / chip.flops
    return {"seconds": parts, "predicted_step_seconds": seconds, "predicted_mfu": mfu}


def exchanges(
    found: Sequence[Collective], chip: Chip, shape: Sequence[int], slices: int, across: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Count, bytes and seconds of the exchanges of a program, by kind.

    Args:
      found: the collectives of the program.
      chip: the kind of chip.
      shape: chips of a slice along each dimension.
      slices: number of slices.
      across: sizes of the groups that reach over all slices, where there are several.

    Returns:
      kind → `count`, `bytes`, `seconds`, and `hidden_seconds` of those that run beside other instructions.
    """
    kinds: dict[str, dict[str, float]] = {}
    for one in found:
        total = kinds.setdefault(one.kind, {"count": 0, "bytes": 0, "seconds": 0.0, "hidden_seconds": 0.0})
        seconds = exchange_seconds(one.kind, one.bytes, one.group, chip, shape, slices if one.group in across else 1)
        total["count"] += 1
        total["bytes"] += one.bytes
        total["hidden_seconds" if one.hidden else "seconds"] += seconds
    return kinds


def slices_for(chip: Chip, chips: int) -> tuple[tuple[int, ...], int]:
    """The shape of a slice, and how many of them make `chips`."""
    shapes = SHAPES[chip.dimensions]
    inside = min(chips, chip.most, max(shapes))
    return shapes[inside], chips // inside


def parallel_exchanges(chip: Chip, chips: int, fsdp: int, parameters: int) -> dict[str, float]:
    """Seconds by kind of what data and fully sharded parallelism exchange in a step.

    Each pass gathers the parameters, and a reduce-scatter leads the gradients back; a chip's part of the gradients is
    then summed over the copies of the model.

    Args:
      chip: the kind of chip.
      chips: number of chips.
      fsdp: chips that share one copy of the model.
      parameters: of the model, exchanged in bfloat16.
    """
    shape, slices = slices_for(chip, chips)
    size, copies = 2 * parameters, chips // fsdp
    seconds = {}
    if fsdp > 1:
        seconds["all-gather"] = 2 * exchange_seconds("all-gather", size, fsdp, chip, shape)
        seconds["reduce-scatter"] = exchange_seconds("reduce-scatter", size, fsdp, chip, shape)
    if copies > 1:
        seconds["all-reduce"] = exchange_seconds("all-reduce", size // fsdp, copies, chip, shape, slices)
    return seconds


def curve(metrics: Metrics) -> list[dict[str, Any]]:
    """Predicted efficiency of a step over numbers of chips (`COUNTS`), at its clips per chip.

    The efficiency is the seconds of the step without exchanges over those of the whole step, no exchange hidden. The
    exchanges are those of data and fully sharded parallelism; `limit` names the one that costs most.

    Args:
      metrics: what `pod.measure` returns or `assumed`.
    """
    chip, local, rows = TOPOLOGIES[metrics["topology"]][0], local_seconds(metrics), []
    for chips in COUNTS:
        parts = parallel_exchanges(chip, chips, metrics["mesh"]["fsdp"], metrics["parameters"])
        shape, slices = slices_for(chip, chips)
        seconds = sum(parts.values())
        rows.append(
            {
                "chips": chips,
                "shape": "x".join(map(str, shape)),
                "slices": slices,
                "limit": max(parts, key=lambda kind: parts[kind], default="none"),
                "exchange_seconds": seconds,
                "efficiency": local / (local + seconds),
            }
        )
    return rows


def plot(steps: Sequence[Metrics], path: str | os.PathLike[str]) -> None:
    """Predicted efficiency of steps over chips as PNG: a panel for each kind of chip."""
    panels: dict[str, dict[str, Any]] = {}
    for metrics in steps:
        rows = curve(metrics)
        line = [row["chips"] for row in rows], [row["efficiency"] for row in rows]
        panels.setdefault(metrics["topology"].split(":")[0], {})[metrics["config"]] = line
    benchmark.save_plot(path, panels, "chips", ylim=(0, 1.05), ylabel="efficiency (exchanges not hidden)")


CLIPS, CHIPS_EACH = 32, 16  # clips per chip, and chips, where a step is assumed
RECIPES = {"vggsound": 180_000, "audioset": 2_000_000}  # clips of an epoch
ASSUMED = [(size, kind) for size in ("base", "large", "huge") for kind in ("factorized", "dense")]
COMPILED_HEAD: tuple[str, ...] = ("compiled", "topology", "clips per chip", "GB per chip", "TFLOP per chip")
COMPILED_HEAD += ("beside closed form", "step ms", "MFU", "largest exchange")
RECIPE_HEAD = ("recipe", "chip", "chips", "clips per chip", "clips/s", "hours", "host cores")
ASSUMED_TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")


def load(path: str) -> Metrics:
    """The metrics of one `benchmark pod`. Raises UserError where the file is none."""
    try:
        metrics = json.loads(pathlib.Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the metrics {path}: {error}") from error
    if "topology" not in metrics:
        raise UserError(f"{path} holds no metrics of benchmark pod: write them with its --json={path}")
    return metrics


def assumed(label: str, model: AVMAEConfig, name: str, share: float, batch: int) -> Metrics:
    """Metrics of a step that was not compiled.

    Args:
      label: name of the step in the tables.
      model: the model. mesh.fsdp is as small as the memory of the chips allows.
      name: the topology, a key of `TOPOLOGIES`.
      share: of the chips' peak that the step reaches, 0 to 1.
      batch: clips of a step, on `CHIPS_EACH` chips.
    """
    chips = CHIPS_EACH
    chip = TOPOLOGIES[name][0]
    parameters = count_layers(model)
    needed = BYTES_PER_PARAMETER * parameters / (STATE_SHARE * chip.memory)
    fsdp = next(n for n in range(1, chips + 1) if chips % n == 0 and n >= needed)
    flops = PASSES * closed_form_flops(model) * batch / chips
    return {
        "config": label,
        "topology": name,
        "chips": chips,
        "batch_size": batch,
        "fits": True,
        "mesh": {"fsdp": fsdp},
        "parameters": parameters,
        "closed_form_flops": flops,
        "seconds": {"compute": flops / (share * chip.flops), "memory": 0.0},
    }


def assumed_steps(share: float) -> list[Metrics]:
    """The sizes and kinds with CLIPS clips per chip, and the recipes of DeepAVFusion, on each kind of chip."""
    steps = [
        assumed(f"{size}_{kind}", sized_model(size, kind), name, share, CLIPS * CHIPS_EACH)
        for name in ASSUMED_TOPOLOGIES
        for size, kind in ASSUMED
    ]
    for variant, clips in RECIPES.items():
        config = load_recipe(f"configs/pretrain.py:{variant}")
        steps += [
            assumed(variant, config.model, name, share, config.batch_size) | {"recipe_clips": config.epochs * clips}
            for name in ASSUMED_TOPOLOGIES
        ]
    return steps


@functools.cache
def count_layers(model: AVMAEConfig) -> int:
    """Parameters of a model whose streams are equally deep: counted with one and with two encoder layers."""

    def count(depth: int) -> int:
        streams = {name: dataclasses.replace(getattr(model, name), depth=depth) for name in ("image", "audio")}
        return count_parameters(Pretraining(dataclasses.replace(model, **streams)))

    one, two = count(1), count(2)
    return one + (model.layers - 1) * (two - one)


def local_seconds(metrics: Metrics) -> float:
    """Seconds of the step without exchanges."""
    return max(metrics["seconds"]["compute"], metrics["seconds"]["memory"])


def compiled_row(metrics: Metrics) -> tuple[str, ...]:
    """One compiled step as text."""
    if not metrics["fits"]:
        total = metrics["bytes_per_chip"]["total"]
        return metrics["config"], metrics["topology"], "", f"{total / 1e9:.1f}, does not fit", "", "", "", "", ""
    kinds = {kind: one["seconds"] + one["hidden_seconds"] for kind, one in metrics["collectives"].items()}
    return (
        metrics["config"],
        metrics["topology"],
        str(metrics["batch_size"] // metrics["chips"]),
        f"{metrics['bytes_per_chip']['total'] / 1e9:.1f}",
        f"{metrics['flops'] / 1e12:.2f}",
        f"{metrics['flops'] / metrics['closed_form_flops'] - 1:+.1%}",
        f"{1e3 * metrics['predicted_step_seconds']:.1f}",
        f"{metrics['predicted_mfu']:.2f}",
        max(kinds, key=lambda kind: kinds[kind], default="none"),
    )


def derived_row(metrics: Metrics) -> tuple[str, ...]:
    """The step on other numbers of chips at the same clips per chip: efficiency, and what limits it on most chips."""
    rows = curve(metrics)
    return (
        metrics["config"],
        metrics["topology"].split(":")[0],
        str(metrics["mesh"]["fsdp"]),
        f"{1e3 * local_seconds(metrics):.1f}",
        *(f"{row['efficiency']:.2f}" for row in rows),
        rows[-1]["limit"],
    )


def recipe_rows(metrics: Metrics) -> benchmark.Table:
    """Hours of a recipe whose batch stays the same, on as many chips as divide it, and the host cores for its input."""
    batch, rows = metrics["batch_size"], benchmark.Table()
    for row in curve(metrics):
        seconds = local_seconds(metrics) * metrics["chips"] / row["chips"] + row["exchange_seconds"]
        if batch % row["chips"] == 0:
            cells = (
                metrics["config"],
                metrics["topology"].split(":")[0],
                str(row["chips"]),
                str(batch // row["chips"]),
                f"{batch / seconds:,.0f}",
                f"{metrics['recipe_clips'] / batch * seconds / 3600:.2f}",
                f"{batch / seconds / CLIPS_PER_CORE:.0f}",
            )
            rows.append(cells)
    return rows


def scaling(files: Sequence[str], share: float, plot_file: str | None = None) -> list[benchmark.Table]:
    """The tables of docs/scaling.md: compiled steps, steps on other numbers of chips, and whole recipes.

    A step without exchanges takes as long at the same clips per chip, and in proportion to them where a recipe's batch
    is kept.

    Args:
      files: what `benchmark pod --json=FILE` wrote.
      share: of the chips' peak, at which base, large and huge are added without a compilation; 0 adds none.
      plot_file: a PNG to write, of predicted efficiency over chips.

    Returns:
      Tables, each a list of rows with a head.

    Raises:
      UserError: a file cannot be read, or there is neither a file nor a share.
    """
    if not 0 <= share <= 1 or not (files or share):
        raise UserError(f"--share={share} must be between 0 and 1, and above 0 where no FILE is given")
    compiled = [load(path) for path in files]
    derived = [metrics for metrics in compiled if metrics["fits"]] + (assumed_steps(share) if share else [])
    if plot_file:
        plot(derived, plot_file)
    known = [metrics for metrics in derived if "recipe_clips" in metrics]
    return [
        *([[COMPILED_HEAD, *map(compiled_row, compiled)]] if compiled else []),
        [("efficiency", "chip", "fsdp", "step ms", *map(str, COUNTS), "limit"), *map(derived_row, derived)],
        [RECIPE_HEAD, *(row for metrics in known for row in recipe_rows(metrics))],
    ]
