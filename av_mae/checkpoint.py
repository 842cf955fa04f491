"""A checkpoint and the model in it, of whatever kind.

The meta of a checkpoint names its `kind` (models.kinds) where that is not pretraining, and the `head`'s configuration.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.console import first_line, note
from av_mae.errors import UserError
from av_mae.models import AVMAEConfig, kinds
from av_mae.models.kinds import ModelDefinition, Params, define_model

Arrays = dict[str, Any]
# Fields of the recipe that may change between stop and resume although they belong to the model: they choose how it
# is computed, not what.
FREE_FIELDS = ("fusion.pair_attention",)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("step", "params", "statistics", "opt_state"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Optimizer steps done (int32), parameters by dotted name (float32), running statistics of batch norms by dotted
    name (none in pretraining), and optax's state over the names of the trained parameters."""

    step: jax.Array
    params: Params
    statistics: Params
    opt_state: optax.OptState

    @property
    def model(self) -> Params:
        """All that the model computes with: parameters and statistics."""
        return self.params | self.statistics


def flat_optimizer(state: TrainState) -> Arrays:
    """The optimizer's arrays by dotted path, e.g. '1.mu.encoder.fusion_tokens'."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def checksum(arrays: Arrays) -> jax.Array:
    """uint32: the sum of all 32-bit words, the same on every mesh."""
    words = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in arrays.values()]
    return sum((x.sum(dtype=jnp.uint32) for x in words), jnp.uint32(0))


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes the arrays as they are, and nothing about them but shape and dtype.

    Of Orbax's defaults, zstd makes float32 weights 8 % smaller and takes as long as writing them; notes on the sharding
    of each of a thousand arrays take a third of a small checkpoint's time and are read by nobody: who restores says on
    which shardings.
    """
    handler = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False, array_metadata_store=None)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, handler), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from a checkpoint and the meta that was saved with it."""

    state: TrainState
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls.

    A save that fails (a full disk, say) is reported and leaves the earlier checkpoints as they are; `failed` holds
    the step of the last save if it failed, else None, and `failures` how many failed in a row. `labels`, as JSON has
    them, are stored with each checkpoint and must be the same when one is restored: what the run is besides its recipe.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep_last: int = 3,
        keep_every: int = 0,
        say: Callable[[str], None] = note,
        labels: Mapping[str, Any] | None = None,
    ):
        self.folder, self.say, self.failed, self.labels = folder.absolute(), say, None, dict(labels or {})
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        for unfinished in sorted(self.folder.glob("*.orbax-checkpoint-tmp*")):
            say(f"checkpoint {unfinished.name.split('.')[0]} was not finished when its run ended; it is dropped")
        self.failures = 0
        self._pending: int | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"model": arrays_handler(), "optimizer": arrays_handler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=self._options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, config: TrainConfig, **meta) -> None:
        """Copies the state and writes it in the background. Does nothing where `step` is saved already."""
        self.wait()
        if step in self.steps():
            return
        optimizer = flat_optimizer(state)
        sums = {
            name: int(jax.device_get(checksum(arrays)))
            for name, arrays in (("model", state.model), ("optimizer", optimizer))
        }
        meta = {
            "step": step,
            "seed": config.seed,
            "config": recipes.to_dict(config),
            "checksums": sums,
            **self.labels,
            **meta,
        }
        try:
            self._pending, self.failed = step, None
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.PyTreeSave(state.model),
                    optimizer=ocp.args.PyTreeSave(optimizer),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:  # whatever hinders a save must not end the training
            self._give_up(step, error)

    def wait(self) -> None:
        """Waits until the last save is finished, and reports it where it failed."""
        try:
            self._manager.wait_until_finished()
            self.failures = self.failures if self._pending is None else 0
            self._pending = None
        except Exception as error:  # as in `save`
            self._give_up(self._pending, error)

    def close(self) -> None:
        """Finishes what is being written."""
        self.wait()
        self._manager.close()

    def _give_up(self, step: int | None, error: Exception) -> None:
        self.failed, self._pending, self.failures = step, None, self.failures + 1
        if jax.process_index() == 0:
            for unfinished in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self._manager = self._open()
        kept = self.steps()
        self.say(
            f"warning: checkpoint {step} could not be saved ({first_line(error)}); training goes on, "
            + (f"the last checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint")
        )

    def restore(self, abstract: TrainState, config: TrainConfig) -> Restored | None:
        """The newest checkpoint that can be read, on the shardings of `abstract`; None where there is none.

        A damaged one is reported, moved aside to `<folder>-damaged/` and passed over.

        Raises:
          UserError: a checkpoint of another model or seed, or none of the checkpoints can be read.
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
        """Moves checkpoints after step `newest`, which were damaged, to `<folder>-damaged/`, out of the run's way."""
        later = [step for step in self.steps() if step > newest]
        target = self.folder.with_name(self.folder.name + "-damaged")
        if jax.process_index() == 0:
            for step in later:
                target.mkdir(exist_ok=True)
                number = sum(1 for _ in target.glob(f"{step}*"))
                (self.folder / str(step)).rename(target / (f"{step}-{number}" if number else str(step)))
        if later:
            self._manager = self._open()

    def _read(self, step: int, abstract: TrainState, meta: Mapping) -> TrainState:
        folder = self.folder / str(step)
        check_shapes(folder, read_shapes(folder), abstract.model)
        values = read_arrays(folder, "model", abstract.model, meta)
        params, statistics = ({name: values[name] for name in part} for part in (abstract.params, abstract.statistics))
        optimizer = read_arrays(folder, "optimizer", flat_optimizer(abstract), meta)
        opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), optimizer.values())
        step_array = jax.make_array_from_callback((), abstract.step.sharding, lambda _: jnp.int32(step))
        return TrainState(step_array, params, statistics, opt_state)


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """What was saved beside the arrays of one checkpoint."""
    return json.loads((folder / "meta" / "metadata").read_text())


def read_layout(folder: pathlib.Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays in one item of a checkpoint."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))  # Orbax warns that an item is no whole checkpoint
    try:
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(folder / item).item_metadata.tree
    finally:
        logger.setLevel(level)
    return {name: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for name, x in tree.items()}


def read_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters in one checkpoint."""
    return {name: x.shape for name, x in read_layout(folder, "model").items()}


def read_arrays(folder: pathlib.Path, item: str, abstract: Mapping[str, jax.ShapeDtypeStruct], meta: Mapping) -> Arrays:
    """One item of a checkpoint, or the part of it that `abstract` names, on the shardings of `abstract`.

    Raises:
      ValueError: the arrays are not those that were saved.
    """
    anywhere = next(iter(abstract.values())).sharding
    whole = (
        jax.sharding.NamedSharding(anywhere.mesh, jax.sharding.PartitionSpec())
        if isinstance(anywhere, jax.sharding.NamedSharding)
        else anywhere
    )
    others = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        for name, x in read_layout(folder, item).items()
        if name not in abstract
    }
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore(folder / item, {**abstract, **others})
    found, saved = int(jax.device_get(checksum(arrays))), meta["checksums"][item]
    if found != saved:
        raise ValueError(f"checksum of {item} is {found}, it was {saved} when saved")
    return {name: arrays[name] for name in abstract}


def first_difference(ours: Mapping, theirs: Mapping, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first field, by dotted name, in which two nested dicts differ, and both values."""
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
    """Raises UserError where a checkpoint's recipe has another model or seed than this one, naming the field."""
    ours = recipes.to_dict(config)
    difference = first_difference(ours["model"], saved["model"])
    if difference is not None:
        name, here, there = difference
        raise UserError(
            f"the checkpoint is of another model: model.{name} is {there} in it and {here} in the recipe; "
            "set it alike, or give another --workdir (and init=CHECKPOINT to start from its weights)"
        )
    if ours["seed"] != saved["seed"]:
        raise UserError(
            f"the checkpoint is of another run: its seed is {saved['seed']}, the recipe's is "
            f"{ours['seed']}; set it alike, or give another --workdir"
        )


def check_same_labels(meta: Mapping, labels: Mapping) -> None:
    """Raises UserError where a checkpoint's meta has other labels than the run, naming the first difference."""
    difference = first_difference(labels, {name: meta.get(name) for name in labels})
    if difference is not None:
        name, here, there = difference
        raise UserError(
            f"the checkpoint is of another run: {name} is {there} in it and {here} now; set it alike, or "
            "give another --workdir"
        )


def check_shapes(folder: pathlib.Path, found: Mapping[str, tuple], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError that names the first parameter that a checkpoint lacks, has besides or has in another shape."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        here = tuple(wanted[name].shape) if name in wanted else "none"
        there = found.get(name, "none")
        if here != there:
            raise UserError(
                f"{folder} is a checkpoint of another model: parameter {name} is {there} in it and "
                f"{here} in the recipe's model"
            )


def find_checkpoint(path: str) -> pathlib.Path:
    """The checkpoint that `path` names: a checkpoint itself, or the newest of a workdir or its `checkpoints`.

    Raises:
      UserError: there is none.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / "model").is_dir():
        return folder
    for candidate in (folder / "checkpoints", folder):
        if candidate.is_dir():
            steps = [int(child.name) for child in candidate.iterdir() if child.name.isdecimal()]
            if steps:
                return candidate / str(max(steps))
    raise UserError(f"there is no checkpoint in {path!r}: name a work directory, its checkpoints/ or one of them")


def load_params(path: str, abstract: Mapping[str, jax.ShapeDtypeStruct], partly: bool = False) -> Arrays:
    """The parameters of a checkpoint on the shardings of `abstract`; `partly`: the checkpoint may hold others besides.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it is one of another model.
    """
    folder = find_checkpoint(path)
    try:
        meta, found = read_meta(folder), read_shapes(folder)
        check_shapes(folder, {name: found[name] for name in found if name in abstract or not partly}, abstract)
        return read_arrays(folder, "model", abstract, meta)
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways
        raise UserError(f"checkpoint {folder} cannot be read ({first_line(error)}): name another one") from error


def load_config(path: str) -> TrainConfig:
    """The recipe of a checkpoint.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    folder = find_checkpoint(path)
    try:
        values = read_meta(folder)["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {folder} cannot be read ({first_line(error)}): name another one") from error
    return recipes.from_dict(values, TrainConfig)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies, its recipe, the kind of its model and the configuration of its head (or None)."""

    folder: pathlib.Path
    config: TrainConfig
    kind: str
    head: Any

    def load(self, config: AVMAEConfig | None = None) -> tuple[ModelDefinition, Arrays]:
        """The model's definition, and its arrays on this process's first device: definition.merge(arrays) is the model.

        config: that the model must have, if it is not simply the checkpoint's own.

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
    """The checkpoint that `path` names: one itself, or the newest of a work directory or its `checkpoints`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    config, folder = load_config(path), find_checkpoint(path)
    meta = read_meta(folder)
    kind = meta.get("kind", kinds.PRETRAINING)
    head = recipes.from_dict(meta.get("head") or {}, kinds.HEADS[kind][1]) if kind in kinds.HEADS else None
    return Checkpoint(folder, config, kind, head)
