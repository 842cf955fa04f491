"""One run in a work directory: from its checkpoint or a first state, through the loop with all hooks, to the end."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax

from av_mae.checkpoint import Checkpoints, Restored
from av_mae.config import TrainConfig
from av_mae.console import Progress, note
from av_mae.data.pipeline import TrainingData, open_training_data
from av_mae.errors import FailureCount, SkippedFile, UserError
from av_mae.models.kinds import Params
from av_mae.train import hooks
from av_mae.train.goodput import Goodput, Stragglers, Watchdog, open_record
from av_mae.train.hooks import Events
from av_mae.train.local_checkpoint import LocalCheckpoints
from av_mae.train.loop import Feed, Hook, stop_on_sigterm, train
from av_mae.train.optimizer import run_length
from av_mae.train.sharding import batch_sharding, check_batch, local_rows, make_mesh
from av_mae.train.step import Objective, TrainStep, fitted_mesh

# Further hooks of a run, made from its TensorBoard events (None: not the first process), its metrics and how to tell
# the user.
MakeHooks = Callable[[Events | None, hooks.MetricsHook, Callable[[str], None]], Sequence[Hook]]


@contextlib.contextmanager
def open_run(config: TrainConfig, objective: Objective | None = None) -> Iterator[tuple[TrainStep, TrainingData, int]]:
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
    """The run's fast checkpoints on the local disk, where the recipe has them."""
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
    """The state of the run's own newest checkpoint, in the store or on the local disks, or the first state from the
    weights that `begin` gives (None: random).

    Raises:
      UserError: the checkpoint is of another run, or its position does not fit the batch size.
    """
    stored = checkpoints.steps()
    restored = local.restore(step.abstract_state(), config, stored[-1] if stored else 0) if local else None
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


def train_from(
    config: TrainConfig,
    workdir: pathlib.Path,
    step: TrainStep,
    begin: Restored,
    data: TrainingData,
    last: int,
    checkpoints: Checkpoints,
    description: str,
    more_hooks: MakeHooks = lambda *_: (),
    local: LocalCheckpoints | None = None,
) -> Restored:
    """Runs the loop from a state to step `last` with all hooks; returns the state after the last step done.

    It is before `last` where the process was asked to stop.

    Raises:
      UserError: the run went wrong, or its last checkpoint could not be saved.
    """
    first, lead = begin.meta["step"], jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(Feed(data.batches(begin.meta["position"]), step.rows, config.data.prefetch))
        progress = stack.enter_context(Progress(last, description, "steps", initial=first))
        checkpoints.say = say = progress.write if lead else (lambda _: None)
        events = Events(workdir, first) if lead else None
        metrics = hooks.MetricsHook(
            config, workdir, events, progress, feed, last, first, begin.meta["skipped"], step.objective.flops
        )
        saving = hooks.CheckpointHook(config, checkpoints, metrics, first, begin.meta["position"], local)
        goodput = Goodput(open_record(workdir), workdir, feed, first)
        metrics.goodput = goodput.share
        running = [
            Watchdog(config.hang_seconds, config.hang_factor),
            hooks.FailureHook(
                FailureCount(config.data.max_failure_share),
                SkippedFile(workdir, progress.write),
                progress.write,
                config.checkpoint_every,
            ),
            hooks.UpdateHook(config, say),
            metrics,
            *more_hooks(events, metrics, say),
            hooks.ProfileHook(config.profile_at, workdir, say),
            saving,
            Stragglers(config.checkpoint_every, feed, say),
            goodput,
        ]
        goodput.count(running, saving)
        for hook in running:
            stack.callback(hook.close)
        should_stop = stack.enter_context(stop_on_sigterm())
        say(
            f"{data.clips} clips per epoch, {last} steps of {config.batch_size} clips on {step.mesh.size} "
            f"{jax.devices()[0].platform} devices; the first step compiles"
        )
        state = train(goodput.compiling(step.step), begin.state, feed, first, last, running, should_stop)
        with goodput.saving():
            checkpoints.wait()
        done = int(state.step)
        goodput.ended = True
        say(goodput.report())
        if done < last:
            say(f"asked to stop: step {done} is saved, the same command goes on from there")
    checkpoints.say = note
    if checkpoints.failed is not None:
        raise UserError(
            f"the checkpoint of step {checkpoints.failed} could not be saved: make room for "
            f"{workdir} and run the same command again"
        )
    return Restored(state, begin.meta | {"step": done})
