"""`python -m av_mae.train`: pretrains by masked reconstruction; the same command again resumes."""

import argparse
import contextlib
import errno
import logging
import pathlib
import tempfile

import jax

from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.data.failures import FailureCount
from av_mae.data.pipeline import TrainingData, open_training_data
from av_mae.errors import UserError, run_command
from av_mae.progress import Progress
from av_mae.training import hooks
from av_mae.training.checkpoint import Checkpoints, Restored, load_params, note
from av_mae.training.events import Events
from av_mae.training.feed import Feed
from av_mae.training.loop import stop_on_sigterm, train
from av_mae.training.mesh import batch_sharding, check_batch, initialize_processes, local_rows, make_mesh
from av_mae.training.optimizer import run_length
from av_mae.training.step import TrainStep

# What the system says where a run cannot begin to write; once it runs, hooks and checkpoints warn and go on.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def make_workdir(path: str) -> pathlib.Path:
    """Makes the work directory. Raises UserError where nothing can be written in it."""
    workdir = pathlib.Path(path).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            return workdir
    except OSError as error:
        raise UserError(f"cannot write to --workdir={path}: {error.strerror}; name a folder that you may "
                        "write to") from error


def first_state(step: TrainStep, checkpoints: Checkpoints, config: TrainConfig) -> Restored:
    """The state to begin with, in this order: own checkpoint, then `init`, then random weights."""
    abstract = step.abstract_state()
    restored = checkpoints.restore(abstract, config)
    if restored is not None:
        checkpoints.set_aside(restored.meta["step"])
        if restored.meta["position"] % config.batch_size:
            raise UserError(f"batch_size={config.batch_size} must divide the position in the data at which the run "
                            f"stopped, {restored.meta['position']} clips: use the batch_size of before")
        note(f"resuming after step {restored.meta['step']}")
        return restored
    meta = {"step": 0, "position": 0, "skipped": 0}
    if config.init:
        note(f"starting from the weights of {config.init}")
        return Restored(step.init(load_params(config.init, abstract.model)), meta)
    return Restored(step.init(), meta)


def run(config: TrainConfig, workdir: pathlib.Path) -> None:
    """One pretraining run in this process (one of several, when they were joined before).

    Raises:
      UserError: the recipe does not fit the devices, the data or the checkpoints in `workdir`, or the run went wrong.
    """
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.batch_size, config.grad_accumulation)
    rows = local_rows(batch_sharding(mesh), config.batch_size)
    sizes = config.model.image.size, config.model.audio.size
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(open_training_data(config.data, *sizes, config.seed, config.batch_size, rows))
        length = run_length(config, data.clips)
        step = TrainStep(config, mesh, length)
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep_last, config.keep_every)
        stack.callback(checkpoints.close)
        begin = first_state(step, checkpoints, config)
        if jax.process_index() == 0:
            recipes.save(config, workdir / "config.json")
        if begin.meta["step"] >= length.steps:
            note(f"this run is finished: it has done {begin.meta['step']} of {length.steps} steps")
            return
        train_from(config, workdir, step, begin, data, length.steps, checkpoints)


def train_from(config: TrainConfig, workdir: pathlib.Path, step: TrainStep, begin: Restored, data: TrainingData,
               last: int, checkpoints: Checkpoints) -> None:
    """Runs the loop from a state to step `last` with all hooks."""
    first, lead = begin.meta["step"], jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(Feed(data.batches(begin.meta["position"]), step.rows, config.data.prefetch))
        progress = stack.enter_context(Progress(last, "pretraining", "steps", initial=first))
        checkpoints.say = say = progress.write if lead else (lambda _: None)
        events = Events(workdir, first) if lead else None
        metrics = hooks.MetricsHook(config, workdir, events, progress, feed, last, first, begin.meta["skipped"],
                                    step.objective.flops)
        running = [hooks.FailureHook(FailureCount(config.data.max_failure_share), progress.write), metrics,
                   hooks.PictureHook(config, step, workdir, events, say),
                   hooks.ProfileHook(config.profile_at, workdir, say),
                   hooks.CheckpointHook(config, checkpoints, metrics, first, begin.meta["position"])]
        for hook in running:
            stack.callback(hook.close)
        should_stop = stack.enter_context(stop_on_sigterm())
        say(f"{data.clips} clips per epoch, {last} steps of {config.batch_size} clips on {step.mesh.size} "
            f"{jax.devices()[0].platform} devices; the first step compiles")
        done = int(train(step.step, begin.state, feed, first, last, running, should_stop).step)
        checkpoints.wait()
        if done < last:
            say(f"asked to stop: step {done} is saved, the same command goes on from there")
    if checkpoints.failed is not None:
        raise UserError(f"the checkpoint of step {checkpoints.failed} could not be saved: make room for "
                        f"{workdir} and run the same command again")


def quiet_libraries() -> None:
    """Failures in the background are told in one line by whoever waits for them; the libraries' traces are noise."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def main(argv: list[str]) -> None:
    """Reads recipe and options, joins the processes, runs."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.train", description="Pretrains by masked reconstruction. Resumes by itself.",
        epilog="example: python -m av_mae.train --config=configs/demo.py --workdir=runs/demo --config.steps=200")
    recipes.add_config_argument(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR",
                        help="config.json, checkpoints/, metrics.jsonl, TensorBoard events and images/ go here")
    parser.add_argument("--coordinator", metavar="HOST:PORT",
                        help="several processes: address of process 0, or 'auto' on TPU pods and Slurm")
    parser.add_argument("--process_id", type=int, metavar="N", help="number of this process, from 0")
    parser.add_argument("--process_count", type=int, metavar="N", help="processes of the run")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    config = recipes.load_recipe(arguments.config, overrides, TrainConfig)
    quiet_libraries()
    workdir = make_workdir(arguments.workdir)
    initialize_processes(arguments.coordinator, arguments.process_id, arguments.process_count)
    try:
        run(config, workdir)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"cannot write to --workdir={arguments.workdir}: {error}; make room or name another "
                        "folder, the same command goes on from the last checkpoint") from error


if __name__ == "__main__":
    run_command(main)
