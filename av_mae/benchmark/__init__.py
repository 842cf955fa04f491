"""`python -m av_mae.benchmark`. Here: timing in one process, competitors in turn, beside a large matrix product."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from av_mae.console import Progress

MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def timed(
    function: Callable[..., Any], *args: Any, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Seconds by `clock` until everything that function(*args) returns is there, and what it returns."""
    start = clock()
    result = jax.block_until_ready(function(*args))
    return clock() - start, result


def matmul(dtype: str) -> tuple[Callable[[], object], float]:
    """A large matrix product as a function without arguments, and its FLOPs."""
    n = MATMUL_SIZE.get(jax.default_backend(), 2048)
    a, b = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b), 2.0 * n**3


def in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of each function in each of `rounds` rounds, one after the other, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with Progress(rounds + 1, "measuring", "rounds") as progress:
        for _ in range(rounds + 1):
            for name, function in functions.items():
                seconds[name].append(timed(function, clock=clock)[0])
            progress.update()
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def memory_plan(compiled: jax.stages.Compiled) -> Any:
    """The compiler's plan of a function's memory, in bytes by kind (`…_size_in_bytes`)."""
    return compiled.memory_analysis()


def counts(compiled: jax.stages.Compiled) -> dict[str, float]:
    """The compiler's counts of a function, such as `flops` and `bytes accessed`."""
    return compiled.cost_analysis() or {}


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak device memory of a compiled function, as the compiler plans it: arguments, results, temporaries."""
    m = memory_plan(compiled)
    return int(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a Markdown table; the first is the head, numbers stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def metric_rows(metrics: Mapping[str, object]) -> list[tuple[str, str]]:
    """Metrics as rows of text, with the unit that the end of their names tells."""
    units = {"seconds": ("s", 1.0), "bytes": ("GB", 1e-9), "flops_per_clip": ("GFLOP", 1e-9)}
    units["flops_per_second"] = ("GFLOP/s", 1e-9)
    rows = [("metric", "value")]
    for name, value in metrics.items():
        unit, factor = next((unit for end, unit in units.items() if name.endswith(end)), ("", 1.0))
        number = isinstance(value, float) or bool(unit)
        rows.append((name, f"{float(str(value)) * factor:.4g} {unit}".rstrip() if number else str(value)))
    return rows
