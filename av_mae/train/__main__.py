"""`python -m av_mae.train`: pretrains by masked reconstruction; the same command again resumes."""

import argparse
import contextlib
import errno
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from av_mae import recipes
from av_mae.checkpoint import Checkpoints, load_params
from av_mae.config import TrainConfig
from av_mae.console import note
from av_mae.convert.store import stream_arrays
from av_mae.data.copies import copy_sets
from av_mae.errors import CHECKPOINT_STORES, LASTING_STORES, UserError, run_command
from av_mae.model_card import write_card
from av_mae.models.kinds import Params
from av_mae.train.agreement import check_processes, held_by_run
from av_mae.train.hooks import Events, MetricsHook, ReconstructionHook
from av_mae.train.hosts import Stopped, joined
from av_mae.train.loop import Hook
from av_mae.train.run import Run, first_state, open_local, open_run, read_command, train_from
from av_mae.train.step import Batch, TrainStep
from av_mae.workdir import collected, make_workdir

URLS = {  # options that take those of stores
    "--workdir": CHECKPOINT_STORES,
    "--config.init": CHECKPOINT_STORES,
    "--config.data.path": LASTING_STORES,
}

# What the system says where a run cannot begin to write; once it runs, hooks and checkpoints warn and go on.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def first_weights(step: TrainStep, config: TrainConfig) -> Params | None:
    """The weights that a run begins with where it has no checkpoint of its own: those of `init`, or of the streams
    that start from `init_image` and `init_audio`; all others are random."""
    if config.init:
        note(f"starting from the weights of {config.init}")
        wanted: Mapping[str, Any] = step.abstract_state().model
        return load_params(config.init, wanted)
    weights: Params = {}
    shardings: Mapping[str, Any] = step.shardings.params
    for stream, path in config.pretrained.items():
        note(f"starting the {stream} stream from {path}")
        weights |= {
            name: jax.make_array_from_callback(x.shape, shardings[name], x.__getitem__)
            for name, x in stream_arrays(path, stream, config.model).items()
        }
    return weights or None


def periodic(
    config: TrainConfig,
    step: TrainStep,
    workdir: pathlib.Path,
    events: Events | None,
    metrics: MetricsHook,
    say: Callable[[str], None],
    begin: Mapping[str, Any],
) -> list[Hook]:
    """What pretraining does besides training now and then."""
    hooks: list[Hook] = []
    shown: Batch | None = None
    if config.validate_every:
        from av_mae.evaluate.validation import ValidationHook

        validation = ValidationHook(config, step, workdir, metrics, say, begin)
        hooks.append(validation)
        shown = validation.shown(step) if config.images_every else None
    hooks.append(ReconstructionHook(config, step, workdir, events, say, shown))
    if config.neighbours_every:
        from av_mae.evaluate.neighbours import NeighboursHook

        hooks.append(NeighboursHook(config, step, workdir, metrics, say))
    return hooks


def stopped_early(config: TrainConfig, workdir: pathlib.Path, step: int) -> bool:
    """Whether a run has ended because `stop_after` validations brought nothing."""
    if not config.stop_after:
        return False
    from av_mae.evaluate.validation import best_so_far

    return best_so_far(config, workdir, step).since >= config.stop_after


def run(config: TrainConfig, workdir: pathlib.Path) -> None:
    """One pretraining run in this process (one of several, when they were joined before).

    Raises:
      UserError: the recipe does not fit the devices, the data or the checkpoints in `workdir`, or the run went wrong.
      Stopped: the process was asked to stop before the last step.
    """
    with contextlib.ExitStack() as stack:
        step, data, last = stack.enter_context(open_run(config))
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep_last, config.keep_every)
        stack.callback(checkpoints.close)
        local = open_local(config, workdir)
        begin = first_state(step, checkpoints, config, lambda: first_weights(step, config), local)
        if jax.process_index() == 0:
            recipes.save(config, workdir / "config.json")
        done = begin.meta["step"]
        if done >= last or stopped_early(config, workdir, done):
            early = "" if done >= last else f"; stop_after={config.stop_after} validations brought nothing"
            note(f"this run is finished: it has done {done} of {last} steps{early}")
            return
        hooks = functools.partial(periodic, config, step, workdir)
        end = train_from(Run(config, workdir, step, data, last, checkpoints, "pretraining", local, hooks), begin)
        if not end.meta["ended"]:
            raise Stopped
        if jax.process_index() == 0:
            write_card(workdir, config, sum(math.prod(x.shape) for x in step.shapes.params.values()))


def main(argv: list[str]) -> None:
    """Reads recipe and options, joins the processes, runs."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.train",
        description="Pretrains by masked reconstruction. Resumes by itself.",
        epilog="example: python -m av_mae.train --config=configs/demo.py --workdir=runs/demo --config.steps=200",
    )
    output = "config.json, checkpoints/, metrics.jsonl, TensorBoard events, images/ and a model card go here"
    arguments, config = read_command(parser, argv, output)
    workdir = make_workdir(arguments.workdir)
    with joined(arguments):
        try:
            check_processes(config, workdir)
            with held_by_run(workdir), collected(workdir) as files:
                copy_sets(config.data.paths, config.data.local)
                run(config, files)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"cannot write to --workdir={arguments.workdir}: {error}; make room or name another "
                "folder, the same command goes on from the last checkpoint"
            ) from error


if __name__ == "__main__":
    run_command(main, URLS)
