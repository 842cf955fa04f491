"""The stated roofline: how long a training step takes on TPU chips by their public figures (chips.py).

- Compute: matrix products at the peak rate, contracted and output sizes rounded up to the matrix unit's tile.
- Memory: the bytes that the compiler counts for its instructions, at the rate of the memory.
- Interconnect: of an array of V bytes shared by g chips, a ring sends 2 V (g - 1) / g bytes per chip to sum it, and
  half of that to gather, or to sum and cut it. An exchange among all chips of a slice uses the links of all
  dimensions, one among some of them those of one dimension. Where rings do not close (v5e and v6e: fewer than 16 chips
  in a row) half of the links are idle. Between slices, each chip sends its part of a sum through the data-centre
  network.

A step takes the longer of compute and memory, then all exchanges that the compiled program does not run beside other
instructions; those that it does cost what exceeds the rest.
"""

import math
from collections.abc import Sequence

from av_mae.benchmark.chips import Chip
from av_mae.benchmark.compiled import Collective

SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
# Slices by their chips, of the shapes that are offered, as square as possible.
SHAPES = {
    2: {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
        1024: (8, 8, 16),
    },
}


def link_rate(chip: Chip, shape: Sequence[int], group: int) -> float:
    """Bytes per second that each chip of a slice of this shape sends in an exchange among `group` chips."""
    whole = group >= math.prod(shape)
    used = [n for n in shape if n > 1] if whole else [max(shape)]
    closed = [1.0 if n % chip.ring == 0 else 0.5 for n in used]
    return chip.link_rate * sum(closed) / chip.dimensions


def exchange_seconds(kind: str, size: int, group: int, chip: Chip, shape: Sequence[int], slices: int = 1) -> float:
    """Seconds of one collective on an array of `size` bytes; `slices` > 1: its groups reach over that many."""
    inside = max(1, group // slices)
    seconds = SENT[kind] * size * (inside - 1) / inside / link_rate(chip, shape, inside) if inside > 1 else 0.0
    if slices > 1:
        seconds += SENT[kind] * size / inside * (slices - 1) / slices / chip.network_rate
    return seconds


def step_seconds(compute: float, memory: float, shown: float, hidden: float) -> float:
    """Seconds of a step from those of its parts; `hidden` exchanges run beside instructions, `shown` ones do not."""
    return max(compute, memory, hidden) + shown


def exchanges(
    found: Sequence[Collective], chip: Chip, shape: Sequence[int], slices: int, across: Sequence[int]
) -> dict[str, dict]:
    """By kind: count, bytes and seconds; `hidden_seconds` of those beside other instructions.

    Where there are several slices, groups of the sizes `across` reach over them.
    """
    kinds: dict[str, dict] = {}
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


def parallel_exchanges(chip: Chip, chips: int, fsdp: int, parameters: int, bytes_each: int = 2) -> dict[str, float]:
    """Seconds by kind of what data and fully sharded parallelism exchange in a step on `chips` chips.

    Each pass gathers the parameters, one sum leads the gradients back; a chip's part of them is then summed over the
    copies of the model.
    """
    shape, slices = slices_for(chip, chips)
    size, copies = parameters * bytes_each, chips // fsdp
    seconds = {}
    if fsdp > 1:
        seconds["all-gather"] = 2 * exchange_seconds("all-gather", size, fsdp, chip, shape)
        seconds["reduce-scatter"] = exchange_seconds("reduce-scatter", size, fsdp, chip, shape)
    if copies > 1:
        seconds["all-reduce"] = exchange_seconds("all-reduce", size // fsdp, copies, chip, shape, slices)
    return seconds


def curve(chip: Chip, local: float, fsdp: int, parameters: int, counts: Sequence[int]) -> list[dict]:
    """Predicted efficiency over numbers of chips at the same clips per chip: `local` seconds of the step without
    exchanges over seconds of the whole step, nothing hidden; `limit` names the exchange that costs most."""
    rows = []
    for chips in counts:
        parts = parallel_exchanges(chip, chips, fsdp, parameters)
        shape, slices = slices_for(chip, chips)
        limit = max(parts, key=parts.get, default="none")
        rows.append(
            {
                "chips": chips,
                "shape": "x".join(map(str, shape)),
                "slices": slices,
                "limit": limit,
                "exchange_seconds": sum(parts.values()),
                "efficiency": local / (local + sum(parts.values())),
            }
        )
    return rows


def plot(curves: dict[str, dict[str, list[dict]]], path) -> None:
    """Predicted efficiency over chips as PNG: a panel for each kind of chip, a line for each of its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(curves), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))  # a colour each, in all panels
    for axes, (chip, lines) in zip(panels, curves.items(), strict=True):
        for name, rows in lines.items():
            line = [row["chips"] for row in rows], [row["efficiency"] for row in rows]
            axes.semilogx(*line, marker="o", base=2, label=name, color=f"C{names.index(name)}")
        axes.set(title=chip, xlabel="chips", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("predicted efficiency (exchanges not hidden)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
