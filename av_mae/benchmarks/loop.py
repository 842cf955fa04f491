"""`python -m av_mae.benchmarks.loop`: what the loop costs beside its steps: hooks, metrics, input thread, checkpoints.

The same compiled step is called bare and by the training loop with everything that a run has, in turn; the share is
the median over rounds of (loop - bare) / bare, of the time that passed and of the processors' time (which other work
on the machine does not disturb). Batches are made once: reading clips is `benchmark input`'s matter.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
from types import SimpleNamespace

import jax
import numpy as np

from av_mae import recipes
from av_mae.benchmarks import timing
from av_mae.config import TrainConfig
from av_mae.errors import UserError, run_command
from av_mae.progress import Progress
from av_mae.training.checkpoint import Checkpoints, Restored, quiet_libraries
from av_mae.training.feed import Feed
from av_mae.training.mesh import make_mesh
from av_mae.training.optimizer import run_length
from av_mae.training.run import train_from
from av_mae.training.step import TrainState, TrainStep


def host_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Random clips as the input pipeline hands them over."""
    random, b = np.random.default_rng(0), config.batch_size
    return {"image": random.integers(0, 256, (b, *config.model.image.size, 3), np.uint8),
            "audio": random.standard_normal((b, *config.model.audio.size), np.float32),
            "valid": np.ones(b, bool), "id": np.full(b, "clip", object), "error": np.full(b, "", object)}


def clocks() -> np.ndarray:
    """Seconds that have passed, and seconds of all processors for this process."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(step: TrainStep, state: TrainState, batch: dict, steps: int) -> tuple[TrainState, np.ndarray]:
    """The state after `steps` calls of the step, and how far both clocks went."""
    began = clocks()
    for _ in range(steps):
        state, metrics = step.step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, clocks() - began


def looped(step: TrainStep, state: TrainState, host: dict, steps: int,
           folder: pathlib.Path) -> tuple[TrainState, np.ndarray]:
    """The same by the loop of a run in `folder`, whose last checkpoint is waited for."""
    first = int(state.step)
    folder.mkdir()
    data = SimpleNamespace(batches=lambda position: itertools.repeat(host), clips=1000)
    checkpoints = Checkpoints(folder / "checkpoints")
    began = clocks()
    end = train_from(step.config, folder, step, Restored(state, {"step": first, "position": 0, "skipped": 0}), data,
                     first + steps, checkpoints, "loop")
    seconds = clocks() - began
    checkpoints.close()
    return end.state, seconds


def measure(config: TrainConfig, steps: int, rounds: int) -> dict:
    """Seconds per step of both, and the loop's overhead as a share of a bare step."""
    step = TrainStep(config, make_mesh(config.mesh), run_length(config, 1000))
    host = host_batch(config)
    feed = Feed(itertools.repeat(host), step.rows)
    batch = next(feed)[1]
    feed.close()
    seconds = {"bare": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder, Progress(rounds, "loop and bare steps", "rounds") as progress:
        state, _ = looped(step, step.init(), host, 3, pathlib.Path(folder) / "first")  # compiles, checkpoints too
        for number in range(rounds):
            state, plain = bare(step, state, batch, steps)
            state, loop = looped(step, state, host, steps, pathlib.Path(folder) / str(number))
            seconds["bare"].append(plain / steps)
            seconds["loop"].append(loop / steps)
            progress.update(1)
    plain, loop = (np.array(seconds[name]) for name in ("bare", "loop"))  # [rounds, clocks]
    overhead = np.median(loop / plain - 1, axis=0)
    return {"device": jax.devices()[0].device_kind, "batch_size": config.batch_size, "steps": steps, "rounds": rounds,
            "bare_step_seconds": float(np.median(plain[:, 0])), "loop_step_seconds": float(np.median(loop[:, 0])),
            "overhead_share": float(overhead[0]), "processor_overhead_share": float(overhead[1])}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmarks.loop", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m av_mae.benchmarks.loop --config=configs/demo.py --steps=100 --rounds=5")
    recipes.add_config_argument(parser)
    parser.add_argument("--steps", type=int, default=100, help="of each round; one checkpoint at their end (100)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    if min(arguments.steps, arguments.rounds) < 1:
        raise UserError(f"--steps={arguments.steps} and --rounds={arguments.rounds} must be at least 1")
    config = recipes.load_recipe(arguments.config, overrides)
    quiet_libraries()
    total = 3 + 2 * arguments.steps * arguments.rounds
    config = dataclasses.replace(config, steps=total, epochs=0.0, checkpoint_every=arguments.steps, images_every=0)
    figures = {"config": arguments.config} | measure(config, arguments.steps, arguments.rounds)
    print(timing.table([("figure", "value"), *((name, f"{x:.4g}" if isinstance(x, float) else str(x))
                                               for name, x in figures.items())]))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
