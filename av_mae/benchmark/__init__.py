"""`python -m av_mae.benchmark`. Here: timing in one process, competitors in turn, beside a large matrix product."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from av_mae.console import Progress

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
Table = list[tuple[str, ...]]  # rows of cells, the first is the head
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name of a line → its x and its y values
# Ends of metrics' names → the unit that they are shown in, and how many of it one of the metric's own are.
UNITS = {
    "seconds": ("s", 1.0),
    "bytes": ("GB", 1e-9),
    "flops_per_clip": ("GFLOP", 1e-9),
    "flops_per_second": ("GFLOP/s", 1e-9),
}


def matmul(dtype: str) -> tuple[Callable[[], object], float]:
    """A large matrix product as a function without arguments, and its FLOPs."""
    n = MATMUL_SIZE.get(jax.default_backend(), 2048)
    a, b = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b), 2.0 * n**3


def in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of each function in each of `rounds` rounds, one after the other, after one warm-up round.

    Seconds are those of `clock` until everything that the function returns is there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with Progress(rounds + 1, "measuring", "rounds") as progress:
        for _ in range(rounds + 1):
            for name, function in functions.items():
                start = clock()
                jax.block_until_ready(function())
                seconds[name].append(clock() - start)
            progress.update()
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def memory_bytes(compiled: Any) -> int:
    """Peak device memory of a compiled function, as the compiler plans it: arguments, results, temporaries."""
    m = compiled.memory_analysis()
    return int(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)


def table(rows: Table) -> str:
    """Rows as a Markdown table; the first is the head, numbers stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def metric_rows(metrics: Mapping[str, object]) -> Table:
    """Metrics as rows of text, with the unit that the end of their names tells."""
    rows: Table = [("metric", "value")]
    for name, value in metrics.items():
        unit, factor = next((unit for end, unit in UNITS.items() if name.endswith(end)), ("", 1.0))
        number = isinstance(value, float) or bool(unit)
        rows.append((name, f"{float(str(value)) * factor:.4g} {unit}".rstrip() if number else str(value)))
    return rows


def save_plot(path: str | os.PathLike[str], panels: Mapping[str, Lines], across: str, **axes_settings: Any) -> None:
    """Lines as PNG, a panel for each title.

    Args:
      path: of the file.
      panels: title → lines; lines of one name have one colour in all panels.
      across: what lies along the logarithmic x axes.
      axes_settings: further properties of the axes, e.g. `yscale` or `ylim`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, line in lines.items():
            axes.plot(*line, marker="o", label=name, color=f"C{names.index(name)}")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel=across, **axes_settings)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
