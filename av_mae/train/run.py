"""One run in a work directory: from its checkpoint or a first state, through the loop with all hooks, to the end."""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from av_mae import recipes
from av_mae.checkpoint import Checkpoints, Restored
from av_mae.config import TrainConfig
from av_mae.console import Progress, note, quiet_libraries
from av_mae.data.pipeline import TrainingData, open_training_data
from av_mae.errors import FailureCount, UserError
from av_mae.models.kinds import Params
from av_mae.train import hooks
from av_mae.train.goodput import Goodput, Stragglers, Watchdog, open_record
from av_mae.train.hooks import Events
from av_mae.train.hosts import add_process_arguments
from av_mae.train.local_checkpoint import LocalCheckpoints
from av_mae.train.loop import Hook, Prefetch, stop_on_sigterm, train
from av_mae.train.optimizer import rate_change, run_length
from av_mae.train.sharding import batch_sharding, check_batch, local_rows, make_mesh
from av_mae.train.step import Objective, TrainStep, fitted_mesh
from av_mae.workdir import SkippedFile


def read_command(
    parser: argparse.ArgumentParser,
    argv: list[str],
    output: str,
    kind: type | Callable[[dict[str, Any]], type] = TrainConfig,
    kinds: Iterable[type] = (TrainConfig,),
) -> tuple[argparse.Namespace, Any]:
    """What a command that runs a recipe in a work directory is given; from here on libraries are quiet.

    Args:
      parser: of the command; what all these commands take is added.
      argv: the command line.
      output: what goes into the work directory, for the help.
      kind: the dataclass that the recipe fills, or a function that tells it from the recipe's values.
      kinds: the dataclasses whose keys the help lists.

    Returns:
      The options, and the recipe as a `kind`.
    """
    recipes.add_config_argument(parser, *kinds)
    parser.add_argument("--workdir", required=True, metavar="DIR", help=output)
    add_process_arguments(parser)
    arguments, overrides = recipes.parse_arguments(parser, argv)
    quiet_libraries()
    return arguments, recipes.load_recipe(arguments.config, overrides, kind)


# Further hooks of a run, made from its TensorBoard events (`None` where the process is not the first one), its metrics,
# the function that tells the user, and the meta of the checkpoint that it goes on from.
MakeHooks = Callable[[Events | None, hooks.MetricsHook, Callable[[str], None], Mapping[str, Any]], Sequence[Hook]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, on which clips, for how long, and where the files go.

    Args:
      config: the recipe.
      workdir: metrics, events and `skipped.jsonl` go here.
      step: the compiled step.
      data: the clips.
      last: number of steps to do.
      checkpoints: those of `workdir`.
      description: what the progress bar says, e.g. 'pretraining'.
      local: fast checkpoints on the hosts' own disks, `None` where the recipe has none.
      more_hooks: makes the hooks that only this kind of run has.
    """

    config: TrainConfig
    workdir: pathlib.Path
    step: TrainStep
    data: TrainingData
    last: int
    checkpoints: Checkpoints
    description: str
    local: LocalCheckpoints | None = None
    more_hooks: MakeHooks = lambda *_: ()


@contextlib.contextmanager
def open_run(
    config: TrainConfig, objective: Objective[Any] | None = None
) -> Iterator[tuple[TrainStep, TrainingData, int]]:
    """The compiled step of a recipe (`objective` None: pretraining), its data, and the number of steps to do.

    Raises:
      UserError: the recipe does not fit the devices or the data.
    """
    mesh = make_mesh(fitted_mesh(config, objective))
    check_batch(mesh, config.batch_size, config.grad_accumulation)
    rows = local_rows(batch_sharding(mesh), config.batch_size)
    sizes = config.model.image.size, config.model.audio.size
    with open_training_data(config.data, *sizes, config.seed, config.batch_size, rows) as data:
        length = run_length(config, data.clips)
        yield TrainStep(config, mesh, length, objective), data, length.steps


def open_local(config: TrainConfig, workdir: pathlib.Path) -> LocalCheckpoints | None:
    """The run's fast checkpoints on the local disk; `None` where the recipe has none."""
    if not config.checkpoint_local:
        return None
    return LocalCheckpoints(pathlib.Path(config.checkpoint_local).absolute(), open_record(workdir)["id"])


def first_state(
    step: TrainStep,
    checkpoints: Checkpoints,
    config: TrainConfig,
    begin: Callable[[], Params | None],
    local: LocalCheckpoints | None = None,
) -> Restored:
    """The state that a run begins with: that of its newest checkpoint, else a first state.

    Args:
      step: the compiled step, which knows shapes and shardings.
      checkpoints: the run's own.
      config: the recipe.
      begin: gives the weights of a first state, `None` for random ones; called where there is no checkpoint.
      local: further checkpoints, on the hosts' own disks.

    Raises:
      UserError: the checkpoint is of another run, or its position in the data does not fit the batch size.
    """
    known = checkpoints.steps()
    restored = local.restore(step.abstract_state(), config, known[-1] if known else 0) if local else None
    if restored is None:
        restored = checkpoints.restore(step.abstract_state(), config)
    if restored is None:
        return Restored(step.init(begin()), {"step": 0, "position": 0, "skipped": 0})
    checkpoints.set_aside(restored.meta["step"])
    if restored.meta["position"] % config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size} must divide the position in the data at which the run "
            f"stopped, {restored.meta['position']} clips: use the batch_size of before"
        )
    note(f"resuming after step {restored.meta['step']}")
    return restored


def note_rate_change(run: "Run", begin: Restored) -> None:
    """Says where the learning rate jumps: the recipe has changed since the checkpoint that a run goes on from."""
    if not begin.meta["step"]:
        return
    with contextlib.suppress(UserError):  # a recipe that today's rules refuse was none to be refused then
        saved = recipes.from_dict(begin.meta["config"])
        said = rate_change(saved, run.config, run.data.clips, begin.meta["step"])
        if said:
            run.checkpoints.say(said)


def train_from(run: Run, begin: Restored) -> Restored:
    """Runs the loop from a state to the last step with all hooks; returns the state after the last step done.

    A process that was asked to stop returns an earlier state than that of `run.last`; the meta's `ended` is False then.

    Raises:
      UserError: the run went wrong, or its last checkpoint could not be saved.
    """
    config, step, first = run.config, run.step, begin.meta["step"]
    batches = run.data.batches(begin.meta["position"])
    with contextlib.ExitStack() as stack:
        prefetch = stack.enter_context(Prefetch(batches, step.rows, config.data.prefetch))
        progress = stack.enter_context(Progress(run.last, run.description, "steps", initial=first))
        goodput = Goodput(open_record(run.workdir), run.workdir, prefetch, first)
        running = make_hooks(run, begin, prefetch, progress, goodput)
        for hook in running:
            stack.callback(hook.close)
        should_stop = stack.enter_context(stop_on_sigterm())
        run.checkpoints.say(
            f"{run.data.clips} clips per epoch, {run.last} steps of {config.batch_size} clips on {step.mesh.size} "
            f"{jax.devices()[0].platform} devices; the first step compiles"
        )
        note_rate_change(run, begin)
        state = train(goodput.compiling(step.step), begin.state, prefetch, first, run.last, running, should_stop)
        with goodput.saving():
            run.checkpoints.wait()
        done = int(state.step)
        goodput.ended = True
        run.checkpoints.say(goodput.report())
        ended = done == run.last or any(hook.enough for hook in running)
        if not ended:
            run.checkpoints.say(f"asked to stop: step {done} is saved, the same command goes on from there")
    run.checkpoints.say = note
    if run.checkpoints.failed is not None:
        raise UserError(
            f"the checkpoint of step {run.checkpoints.failed} could not be saved: make room for "
            f"{run.checkpoints.folder} and run the same command again"
        )
    return Restored(state, begin.meta | {"step": done, "ended": ended})


def make_hooks(run: Run, begin: Restored, prefetch: Prefetch, progress: Progress, goodput: Goodput) -> list[Hook]:
    """All hooks of a run, in the order in which they are called; what they say does not break the progress bar."""
    config, workdir, lead, first = run.config, run.workdir, jax.process_index() == 0, begin.meta["step"]
    run.checkpoints.say = say = progress.write if lead else (lambda _: None)
    events = Events(workdir, first) if lead else None
    metrics = hooks.MetricsHook(
        config,
        workdir,
        events,
        progress=progress,
        prefetch=prefetch,
        last=run.last,
        resumed=first,
        skipped=begin.meta["skipped"],
        flops=run.step.objective.flops,
        goodput=goodput.share,
    )
    saving = hooks.CheckpointHook(config, run.checkpoints, metrics, first, begin.meta["position"], run.local)
    count, skipped = FailureCount(config.data.max_failure_share), SkippedFile(workdir, progress.write)
    made = [
        Watchdog(config.hang_seconds, config.hang_factor),
        hooks.FailureHook(count, skipped, progress.write, config.checkpoint_every),
        hooks.UpdateHook(config, say),
        metrics,
        *run.more_hooks(events, metrics, say, begin.meta),
        hooks.ProfileHook(config.profile_at, workdir, say),
        saving,
        Stragglers(config.checkpoint_every, prefetch, say),
        goodput,
    ]
    goodput.count(made, saving)
    return made
