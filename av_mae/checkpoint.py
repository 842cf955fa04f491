"""Checkpoints of a run, and the model in a checkpoint.

A checkpoint is a folder with three items of Orbax: `model` and `optimizer` (arrays by name) and `meta` (JSON: step,
seed, recipe, checksums). Where the model is not the masked autoencoder, the meta names its `kind` and the configuration
of its `head` (av_mae.models.kinds).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from av_mae import recipes
from av_mae.checkpoint_files import (
    Abstract,
    Arrays,
    arrays_handler,
    check_shapes,
    checksum,
    digest,
    find_checkpoint,
    meta_hash,
    read_arrays,
    read_back,
    read_meta,
    unfinished,
)
from av_mae.config import TrainConfig
from av_mae.console import first_line, note
from av_mae.errors import StoreError, UserError
from av_mae.models import AVMAEConfig, kinds
from av_mae.models.kinds import ModelDefinition, Params, define_model
from av_mae.storage import as_path, is_url, move_tree, reached, remove_tree
from av_mae.workdir import original, push

SLOW = 15.0  # seconds of waiting for a store, after which a line is printed
FREE_FIELDS = ("fusion.pair_attention",)  # how a model is computed, not what it is: they may change between two starts


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("step", "params", "statistics", "opt_state"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: optimizer steps done, int32.
      params: parameters by dotted name, float32.
      statistics: running statistics of batch norms by dotted name; pretraining has none.
      opt_state: optax's state over the names of the trained parameters.
    """

    step: jax.Array
    params: Params
    statistics: Params
    opt_state: optax.OptState

    @property
    def model(self) -> Params:
        """Parameters and statistics."""
        return self.params | self.statistics


def flat_optimizer(state: TrainState) -> Arrays:
    """The optimizer's arrays by dotted path, e.g. '1.mu.encoder.fusion_tokens'."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflat_state(abstract: TrainState, step: int, model: Arrays, optimizer: Arrays) -> TrainState:
    """The state after `step` steps of these arrays: the model's by name, those of `flat_optimizer` in its order."""
    params, statistics = ({name: model[name] for name in part} for part in (abstract.params, abstract.statistics))
    opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), optimizer.values())
    step_array = jax.make_array_from_callback((), abstract.step.sharding, lambda _: jnp.int32(step))
    return TrainState(step_array, params, statistics, opt_state)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from a checkpoint, and the meta that was saved with it."""

    state: TrainState
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls.

    A save that fails, because the disk is full for example, is reported and leaves earlier checkpoints as they are.
    `failed` is the step of the last save if it failed, else `None`. `failures` counts the failures in a row.

    Args:
      folder: of the checkpoints, each in a folder named by its step.
      keep_last: number of newest checkpoints that are kept.
      keep_every: checkpoints of multiples of this step are kept too; 0 means none.
      say: prints a message.
      labels: what the run is besides its recipe, in JSON's types. Labels are saved with each checkpoint, and must be
        the same when a checkpoint is restored.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep_last: int = 3,
        keep_every: int = 0,
        say: Callable[[str], None] = note,
        labels: Mapping[str, Any] | None = None,
    ):
        self.folder, self.say, self.labels = as_path(original(folder)), say, dict(labels or {})
        self.failed: int | None = None
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        self.failures, self._read_back = 0, False
        self._pending: int | None = None
        self._first: tuple[str, jax.Array] | None = None  # an array to read back
        with reached(self.folder):
            for step in sorted(path.name.split(".")[0] for path in unfinished(self.folder)):
                say(f"checkpoint {step} was not finished when its run ended; it is dropped")
            self._manager: ocp.CheckpointManager | None = self._open()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"model": arrays_handler(), "optimizer": arrays_handler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=self._options, item_handlers=handlers)

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened anew after a failure. Raises what the file system or store raises."""
        if self._manager is None:
            self._manager = self._open()
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: TrainState, config: TrainConfig, **meta) -> None:
        """Copies the state and writes it in the background, unless there is a checkpoint of this step already.

        Args:
          step: optimizer steps done.
          state: on the devices.
          config: the run's recipe.
          **meta: further values for the meta, in JSON's types.
        """
        self.wait()
        push()  # what a run has written before a checkpoint is there when it goes on from it
        try:
            if step in self.steps():
                return
        except Exception as error:  # a store that does not answer
            self._give_up(step, error)
            return
        items = {"model": state.model, "optimizer": flat_optimizer(state)}
        meta = {
            "step": step,
            "seed": config.seed,
            "config": recipes.to_dict(config),
            "checksums": {name: int(jax.device_get(checksum(arrays))) for name, arrays in items.items()},
            "digests": {name: digest(arrays) for name, arrays in items.items()},
            **self.labels,
            **meta,
        }
        meta["sha256"] = meta_hash(meta)
        try:
            self._pending, self.failed = step, None
            name = min(state.params, key=lambda name: (state.params[name].is_fully_replicated, state.params[name].size))
            self._first = None if self._read_back else (name, jnp.copy(state.params[name]))  # the next step takes it
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.PyTreeSave(state.model),
                    optimizer=ocp.args.PyTreeSave(items["optimizer"]),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:  # whatever hinders a save must not end the training
            self._give_up(step, error)

    def wait(self) -> None:
        """Waits until the last save is finished, and reports a failure."""
        try:
            began = time.monotonic()
            if self._manager is not None:
                self._manager.wait_until_finished()
            if (waited := time.monotonic() - began) > SLOW and is_url(self.folder):  # drivers try again without a word
                self.say(f"waited {waited:.0f} s until {self.folder} took checkpoint {self._pending}; training goes on")
            pending, self._pending = self._pending, None
            self.failures = self.failures if pending is None else 0
        except Exception as error:  # as in `save`
            self._give_up(self._pending, error)
            return
        try:
            if pending is not None and self._first is not None:
                read_back(self.folder / str(pending), *self._first)
                self._read_back, self._first = True, None
        except Exception as error:  # whatever it is: nobody could go on from such checkpoints
            if is_url(self.folder):  # which may be away for a moment; the next one is read back, too
                return self._give_up(pending, error)
            raise UserError(
                f"checkpoint {pending}, the first of this run, was written to {self.folder} and cannot be read there "
                f"({first_line(error)}): name a folder that all processes read and write alike"
            ) from error

    def close(self) -> None:
        """Finishes what is being written."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def _give_up(self, step: int | None, error: Exception) -> None:
        self.failed, self._pending, self.failures = step, None, self.failures + 1
        self._manager = None
        try:
            if jax.process_index() == 0:
                for path in unfinished(self.folder, f"{step}"):
                    remove_tree(path)
            kept = self.steps()
            left = f"the last checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        except Exception:  # a store that does not answer: the next save asks again
            left = f"{self.folder} does not answer"
        self.say(f"warning: checkpoint {step} could not be saved ({first_line(error)}); training goes on, {left}")

    def restore(self, abstract: TrainState, config: TrainConfig) -> Restored | None:
        """The newest checkpoint that can be read; `None` if there is no checkpoint.

        A damaged checkpoint is reported and passed over.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          config: the run's recipe.

        Raises:
          UserError: a checkpoint is of another model, seed or labels, or none of the checkpoints can be read.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                meta = read_meta(self.folder / str(step))
                check_same_run(meta["config"], config)
                check_same_labels(meta, self.labels)
                return Restored(self._read(step, abstract, meta), meta)
            except UserError:
                raise
            except Exception as error:  # damage shows in many ways
                damaged.append(step)
                self.say(
                    f"warning: checkpoint {step} is damaged or half-written ({first_line(error)}); "
                    "going back to the one before"
                )
        if damaged:
            raise UserError(
                f"none of the checkpoints {damaged} in {self.folder} can be read: give another "
                "--workdir, or move them away to start anew"
            )
        return None

    def set_aside(self, newest: int) -> None:
        """Moves the checkpoints after step `newest`, which are damaged, to `<folder>-damaged/`."""
        later = [step for step in self.steps() if step > newest]
        target = self.folder.with_name(self.folder.name + "-damaged")
        if jax.process_index() == 0:
            for step in later:
                number = sum(1 for _ in target.glob(f"{step}*"))
                move_tree(self.folder / str(step), target / (f"{step}-{number}" if number else str(step)))
        if later:
            self._manager = None

    def _read(self, step: int, abstract: TrainState, meta: Mapping) -> TrainState:
        folder = self.folder / str(step)
        check_shapes(folder, abstract.model)
        values = read_arrays(folder, "model", abstract.model, meta)
        return unflat_state(abstract, step, values, read_arrays(folder, "optimizer", flat_optimizer(abstract), meta))


def first_difference(ours: Mapping, theirs: Mapping, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name of the first field in which two nested dicts differ, and both values; `None` if they are equal.

    FREE_FIELDS are passed over. `prefix` goes before the names.
    """
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        name, a, b = prefix + key, ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found = first_difference(a, b, name + ".")
            if found is not None:
                return found
        elif a != b and name not in FREE_FIELDS:
            return name, a, b
    return None


def check_same_run(saved: Mapping, config: TrainConfig) -> None:
    """Raises UserError, which names the field, if the recipe `saved` has another model or seed than this one."""
    ours = recipes.to_dict(config)
    difference = first_difference(ours["model"], saved["model"])
    if difference is not None:
        name, here, there = difference
        raise UserError(
            f"the checkpoint is of another model: model.{name} is {there} in it and {here} in the recipe; "
            "set it alike, or give another --workdir (and init=CHECKPOINT to start from its weights)"
        )
    check_same_labels(saved, {"seed": ours["seed"]})


def check_same_labels(meta: Mapping, labels: Mapping) -> None:
    """Raises UserError, which names the label, if a checkpoint's meta has other labels than the run."""
    difference = first_difference(labels, {name: meta.get(name) for name in labels})
    if difference is not None:
        name, here, there = difference
        raise UserError(
            f"the checkpoint is of another run: {name} is {there} in it and {here} now; set it alike, or give another "
            "--workdir"
        )


def load_params(path: str, abstract: Abstract, partly: bool = False) -> Arrays:
    """Parameters and statistics of a checkpoint.

    Args:
      path: a checkpoint, or a folder with checkpoints (see `find_checkpoint`).
      abstract: shapes, dtypes and shardings of the arrays to read, by dotted name.
      partly: whether the checkpoint may hold other arrays besides.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it is one of another model.
    """
    folder = find_checkpoint(path)
    try:
        check_shapes(folder, abstract, partly)
        return read_arrays(folder, "model", abstract, read_meta(folder))
    except (UserError, StoreError):
        raise
    except Exception as error:  # damage shows in many ways
        raise UserError(f"checkpoint {folder} cannot be read ({first_line(error)}): name another one") from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose meta was read: `load` reads its model.

    Attributes:
      folder: of the checkpoint.
      config: the run's recipe.
      kind: of the model (av_mae.models.kinds).
      head: configuration of the head; `None` for a model without one.
    """

    folder: pathlib.Path
    config: TrainConfig
    kind: str
    head: Any

    def load(self, config: AVMAEConfig | None = None) -> tuple[ModelDefinition, Arrays]:
        """Reads the model to this process's first device.

        Args:
          config: what the model must have; `None` means the checkpoint's own configuration.

        Returns:
          The model's definition and its arrays: `definition.merge(arrays)` is the model.

        Raises:
          UserError: the checkpoint cannot be read, or is one of another model.
        """
        config = config or self.config.model
        definition, *shapes = define_model(lambda rngs: kinds.build_model(self.kind, config, self.head, rngs))
        device = SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for part in shapes for name, x in part.items()
        }
        return definition, load_params(str(self.folder), abstract)


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that `path` names: a checkpoint, or the newest of a work directory or its `checkpoints`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    folder = find_checkpoint(path)
    try:
        meta = read_meta(folder)
        kind = meta.get("kind", kinds.PRETRAINING)
        if kind not in (kinds.PRETRAINING, kinds.ENCODER, *kinds.HEADS, *kinds.STREAMS):
            raise ValueError(f"a model of kind {kind!r} is not known")
        head = recipes.from_dict(meta.get("head") or {}, kinds.HEADS[kind][1]) if kind in kinds.HEADS else None
        return Checkpoint(folder, recipes.from_dict(meta["config"], TrainConfig), kind, head)
    except (UserError, StoreError):
        raise
    except Exception as error:  # damage shows in many ways
        raise UserError(f"checkpoint {folder} cannot be read ({first_line(error)}): name another one") from error
