"""`python -m av_mae.benchmark.loop`: what the loop costs beside its steps: hooks, metrics, input thread, checkpoints.

A run with everything that runs have, start and last checkpoint included; after every few of its steps the same compiled
step is called bare as often, so that both see the machine alike. The share is (loop - bare) / bare, of the time that
passed and of the processors' time (which other work on the machine disturbs less). Batches are made once: reading clips
is `benchmark input`'s matter.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import numpy as np

from av_mae import recipes
from av_mae.benchmark import timing
from av_mae.checkpoint import Checkpoints, Restored, TrainState
from av_mae.config import TrainConfig
from av_mae.console import quiet_libraries
from av_mae.errors import UserError, run_command
from av_mae.train.loop import Feed
from av_mae.train.optimizer import run_length
from av_mae.train.run import train_from
from av_mae.train.sharding import make_mesh
from av_mae.train.step import Metrics, TrainStep


def host_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Random clips as the input pipeline hands them over."""
    random, b = np.random.default_rng(0), config.batch_size
    return {
        "image": random.integers(0, 256, (b, *config.model.image.size, 3), np.uint8),
        "audio": random.standard_normal((b, *config.model.audio.size), np.float32),
        "valid": np.ones(b, bool),
        "id": np.full(b, "clip", object),
        "stage": np.full(b, "", object),
        "cause": np.full(b, "", object),
    }


def clocks() -> np.ndarray:
    """Seconds that have passed, and seconds of all processors for this process."""
    return np.array([time.perf_counter(), time.process_time()])


class Alternating:
    """A step that after every `block` calls runs as many bare ones; `bare` is how far both clocks went in these.

    The first ones come after half a block: what the loop starts at a multiple of `block` falls into its own time.
    """

    def __init__(self, step: Callable, batch: dict, block: int):
        self.step, self.batch, self.block = step, batch, block
        self.calls, self.bare_calls, self.bare = 0, 0, np.zeros(2)

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
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


def looped(step: TrainStep, state: TrainState, host: dict, steps: int, folder: pathlib.Path) -> np.ndarray:
    """How far both clocks went in a run of so many steps in `folder`, whose last checkpoint is waited for."""
    folder.mkdir()
    data = SimpleNamespace(batches=lambda position: itertools.repeat(host), clips=1000)
    checkpoints = Checkpoints(folder / "checkpoints")
    began = clocks()
    train_from(
        step.config,
        folder,
        step,
        Restored(state, {"step": 0, "position": 0, "skipped": 0}),
        data,
        steps,
        checkpoints,
        "loop",
    )
    seconds = clocks() - began
    checkpoints.close()
    return seconds


def measure(config: TrainConfig, steps: int, block: int) -> dict:
    """Seconds per step of both, and the loop's overhead as a share of a bare step."""
    step = TrainStep(config, make_mesh(config.mesh), run_length(config, 1000))
    host = host_batch(config)
    feed = Feed(itertools.repeat(host), step.rows)
    batch = next(feed)[1]
    feed.close()
    with tempfile.TemporaryDirectory() as folder:
        looped(step, step.init(), host, 3, pathlib.Path(folder) / "first")  # compiles, checkpoints too
        turns = Alternating(step.step, batch, block)
        state, step = step.init(), copy.copy(step)
        step.step = turns
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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark.loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m av_mae.benchmark.loop --config=configs/demo.py --config.checkpoint_every=100",
    )
    recipes.add_config_argument(parser)
    parser.add_argument("--steps", type=int, default=200, help="of the run (200)")
    parser.add_argument("--block", type=int, default=10, help="steps of the run, then bare ones, in turn (10)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    if not 1 <= arguments.block <= arguments.steps:
        raise UserError(f"--block={arguments.block} must be from 1 to --steps={arguments.steps}")
    config = recipes.load_recipe(arguments.config, overrides)
    quiet_libraries()
    config = dataclasses.replace(config, steps=arguments.steps, epochs=0.0, images_every=0)
    figures = {"config": arguments.config} | measure(config, arguments.steps, arguments.block)
    print(
        timing.table(
            [
                ("figure", "value"),
                *((name, f"{x:.4g}" if isinstance(x, float) else str(x)) for name, x in figures.items()),
            ]
        )
    )
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
