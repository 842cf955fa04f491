"""One optimizer step as a pure function, compiled over a mesh: (state, batch) → (state, metrics)."""

import abc
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae import models
from av_mae.checkpoint import TrainState
from av_mae.config import MeshConfig, TrainConfig
from av_mae.models.encoder import Encoder, run_layers
from av_mae.models.kinds import Params, define_model, flat_values
from av_mae.models.layers import Initial, activation_sharding
from av_mae.models.masked_autoencoder import Decoder
from av_mae.train.optimizer import Length, Multipliers, learning_rate, make_optimizer, pretrained_multipliers
from av_mae.train.sharding import (
    LAYERS,
    ROWS,
    RULES,
    batch_sharding,
    check_batch,
    check_heads,
    fitted,
    gather,
    gather_layer,
    keep_all_but_gathered,
    memory_limit,
    param_shardings,
    replicated,
    row_shards,
)

Rows = dict[str, jax.Array]
Model = TypeVar("Model", bound=nnx.Module)
# Forward and backward pass cost three forward passes.
PASSES = 3


class Objective(abc.ABC, Generic[Model]):
    """A model and its loss, for `TrainStep`. Everything here is pure and traced under jit.

    `flops`: matrix products of one clip, forward and backward, in FLOPs; 0 where they are not counted.
    """

    flops: float = 0.0

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> Model:
        """The model with random weights."""

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """Random numbers of one step, [batch_size, …] each: row b is for clip b of the global batch."""
        return {}

    def prepare(self, rows: Rows) -> Rows:
        """The fields of a whole batch and those of `draw` → what `losses` takes, before the rows are split for gradient
        accumulation. What joins rows belongs here."""
        return rows

    @abc.abstractmethod
    def losses(self, model: Model, rows: Rows) -> tuple[jax.Array, Rows]:
        """Loss [b] of each row of (a part of) a batch that `prepare` made, and further metrics [b]."""

    def trained(self, name: str) -> bool:
        """Whether the parameter of this dotted name is trained; others stay as they are, without optimizer state."""
        return True

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        """What the learning rates of single parameters are multiplied by; others have the full rate."""
        return {}


class Pretraining(Objective[models.AVMAE]):
    """Masked reconstruction: the sum of both streams' losses, each times its `loss_weight` (paper section 3.3: 1).

    `pretrained` streams ('image', 'audio') come from unimodal encoders: their learning rates rise over the first half.
    """

    def __init__(self, config: models.AVMAEConfig, pretrained: Iterable[str] = ()):
        self.config, self.pretrained = config, tuple(pretrained)
        self.flops = PASSES * models.closed_form_flops(config)

    def build(self, rngs: nnx.Rngs) -> models.AVMAE:
        return models.AVMAE(self.config, rngs=rngs)

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """Mask noise of both streams, [B, patches]."""
        image, audio = jax.random.split(key)
        return {
            "image_noise": models.mask_noise(image, batch_size, self.config.image.tokens),
            "audio_noise": models.mask_noise(audio, batch_size, self.config.audio.tokens),
        }

    def losses(self, model: models.AVMAE, rows: Rows) -> tuple[jax.Array, Rows]:
        image = models.normalize_image(rows["image"])
        image_loss, audio_loss = model.losses(image, rows["audio"], rows["image_noise"], rows["audio_noise"])
        loss = self.config.image.loss_weight * image_loss + self.config.audio.loss_weight * audio_loss
        return loss, {"image_loss": image_loss, "audio_loss": audio_loss}

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return pretrained_multipliers(params, self.pretrained, length)


Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# What a layer keeps for the backward pass: everything, nothing but its input, or its matrix products as well.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Folded into the seed for the initial parameters; steps, which are folded in for the masks, stay below it.
INIT_STREAM = 2**32 - 1


def count_parameters(objective: Objective[Any]) -> int:
    """Values of all parameters of an objective's model."""
    return sum(math.prod(x.shape) for x in define_model(objective.build)[1].values())


def fitted_mesh(config: TrainConfig, objective: Objective[Any] | None = None) -> MeshConfig:
    """The recipe's mesh, its fsdp=0 replaced by what the model needs on this machine's devices.

    Raises:
      UserError: the model does not fit.
    """
    memory = memory_limit()
    if config.mesh.fsdp or not memory:
        return config.mesh
    return fitted(config.mesh, jax.devices(), count_parameters(objective or Pretraining(config.model)), memory)


def draw_values(initials: dict[str, Initial], shardings: dict[str, NamedSharding], key: jax.Array) -> Params:
    """Initial values under the names of `shardings`, each drawn from a key of its name straight into its shards.

    One small program per kind of parameter: drawing all in one takes minutes to compile at ViT-B.
    """
    programs = {}
    for name, sharding in shardings.items():
        program = (initials[name], sharding)
        if program not in programs:
            programs[program] = jax.jit(initials[name].__call__, out_shardings=sharding)
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in shardings}
    return {name: programs[initials[name], sharding](keys[name]) for name, sharding in shardings.items()}


def prepare_rows(
    objective: Objective[Any], config: TrainConfig, step: jax.Array, batch: Batch, sharding: NamedSharding
) -> Batch:
    """The batch of a step with the step's random numbers, as the objective prepares it.

    The numbers of row b in step s depend on (config.seed, s, b) alone, never on the mesh.
    """
    drawn = objective.draw(jax.random.fold_in(jax.random.key(config.seed), step), config.batch_size)
    return objective.prepare({name: jax.lax.with_sharding_constraint(x, sharding) for name, x in drawn.items()} | batch)


def split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[B, …] → [parts, shards, B / (parts · shards), …] so that every device keeps its own rows."""
    shards = row_shards(mesh)
    x = x.reshape(shards, parts, x.shape[0] // (shards * parts), *x.shape[1:]).swapaxes(0, 1)
    split: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *ROWS)))
    return split


def accumulate(gradient: Callable[[Params, Batch], Any], params: Params, rows: Batch, parts: int, mesh: Mesh) -> Any:
    """Sums of `gradient(params, rows)` over `parts` parts of the rows, one after the other."""
    shapes = jax.eval_shape(gradient, params, rows)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add_part(total: Any, part: Batch) -> tuple[Any, None]:
        part = {name: x.reshape(-1, *x.shape[2:]) for name, x in part.items()}
        part = jax.lax.with_sharding_constraint(part, batch_sharding(mesh))
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    return jax.lax.scan(add_part, start, {name: split_rows(x, parts, mesh) for name, x in rows.items()})[0]


class TrainStep:
    """The compiled step of one recipe on one mesh, and the state it begins with.

    `step(state, batch)` takes the global batch (`image` uint8 [B, H, W, 3], `audio` float32 [B, mels, frames],
    `valid` bool [B], rows over 'data' and 'fsdp'), donates the state and returns the next state and float32 scalars
    `loss` and the objective's metrics (means over valid clips), `grad_norm`, `learning_rate`, `valid` (clips).

    `objective` None: masked reconstruction with `config.model`.

    Raises:
      UserError: the batch, the heads or a parameter do not divide over the mesh.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, length: Length, objective: Objective[Any] | None = None):
        check_batch(mesh, config.batch_size, config.grad_accumulation)
        check_heads(config.model, mesh)
        self.config, self.mesh = config, mesh
        self.objective: Objective[Any] = objective or Pretraining(config.model, config.pretrained)
        self.definition, shapes, statistics = define_model(self.objective.build)
        count: Any = jax.ShapeDtypeStruct((), jnp.int32)
        self.shapes = TrainState(count, shapes, statistics, None)
        self.schedule = learning_rate(config, length)
        self.optimizer = make_optimizer(config.optimizer, self.schedule, self.objective.multipliers(shapes, length))
        self.rows = batch_sharding(mesh)
        self.trained = [name for name in shapes if self.objective.trained(name)]
        self.param_shardings = param_shardings({name: self.definition.initials[name] for name in shapes}, mesh)
        self.shardings = self._state_shardings()
        # What stays for the backward pass: everything, but where parameters are gathered not those
        gathered = any(sharding.gathered for sharding in self.param_shardings.values())
        self.keep: Callable[..., bool] | None = keep_all_but_gathered if gathered else None
        # Whether equal layers are a loop; by default where they gather their weights, but on CPUs (docs/scaling.md)
        loops = gathered and mesh.devices.flat[0].platform != "cpu"
        self.scan = loops if config.scan_layers == "auto" else config.scan_layers == "on"
        whole = replicated(mesh)
        self.step = jax.jit(
            self.train_step,
            in_shardings=(self.shardings, self.rows),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )

    def forward(self, function: Callable[[Any, Batch], Any], drawn: bool = False) -> Callable[[TrainState, Batch], Any]:
        """`function(model, batch) -> arrays` as compiled forward(state, batch); what comes out is whole everywhere.

        With `drawn` the batch also holds the random rows of the step after `state`.
        """

        def run(state: TrainState, batch: Batch) -> Any:
            if drawn:
                batch = prepare_rows(self.objective, self.config, state.step, batch, self.rows)
            with activation_sharding(self.mesh, RULES):
                return function(self._model(state.params, state.statistics), batch)

        compiled: Callable[[TrainState, Batch], Any] = jax.jit(
            run, in_shardings=(self.shardings, self.rows), out_shardings=replicated(self.mesh)
        )
        return compiled

    def init(self, params: Params | None = None) -> TrainState:
        """The state of step 0, every value born in its shards; `params`: weights and statistics to begin with."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), INIT_STREAM)
        known: Params = params or {}
        shardings: Any = self.shardings.model
        missing = {name: sharding for name, sharding in shardings.items() if name not in known}
        values = known | draw_values(self.definition.initials, missing, key)
        start = jax.jit(self._first_state, in_shardings=(shardings,), out_shardings=self.shardings)
        state: TrainState = start({name: values[name] for name in shardings})
        return state

    def _first_state(self, values: Params) -> TrainState:
        params, statistics = (
            {name: values[name] for name in part} for part in (self.shapes.params, self.shapes.statistics)
        )
        moments = self.optimizer.init({name: params[name] for name in self.trained})
        return TrainState(jnp.zeros((), jnp.int32), params, statistics, moments)

    def _state_shardings(self) -> TrainState:
        """Optimizer moments lie as their parameters do, scalars and statistics on every device."""
        params: dict[str, Any] = {name: sharding.stored for name, sharding in self.param_shardings.items()}
        whole: Any = replicated(self.mesh)

        def of(path: tuple[Any, ...], _: Any) -> Any:
            return params.get(getattr(path[-1], "key", ""), whole)

        moments = jax.eval_shape(self.optimizer.init, {name: self.shapes.params[name] for name in self.trained})
        return TrainState(
            whole, params, dict.fromkeys(self.shapes.statistics, whole), jax.tree_util.tree_map_with_path(of, moments)
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored to."""
        shapes = jax.eval_shape(self._first_state, self.shapes.model)
        abstract: TrainState = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self.shardings
        )
        return abstract

    def _model(self, params: Params, statistics: Params) -> nnx.Module:
        """The model in the dtype of the computation; statistics keep theirs. Layers gather their own weights."""
        cast = {name: x.astype(DTYPES[self.config.dtype]) for name, x in params.items()}
        around = {name: x for name, x in cast.items() if not LAYERS.search(name)}
        model = self.definition.merge(cast | gather(around, self.param_shardings) | statistics)
        policy = REMAT[self.config.remat] or self.keep
        remat = None if policy is None else functools.partial(jax.checkpoint, policy=policy)
        read = functools.partial(gather_layer, mesh=self.mesh)
        for part in vars(model).values():
            if isinstance(part, Encoder | Decoder):
                part.run = functools.partial(run_layers, read=read, remat=remat, scan=self.scan)
        return model

    def weighted_loss(
        self, statistics: Params, frozen: Params, trained: Params, rows: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Params]]:
        """Σ weight · loss over the given rows; the same sums of the metrics; the statistics after them."""
        model = self._model(trained | frozen, statistics)
        with activation_sharding(self.mesh, RULES):
            loss, metrics = self.objective.losses(model, rows)
        metrics = {name: jnp.sum(rows["weight"] * x.astype(jnp.float32)) for name, x in metrics.items()}
        loss = jnp.sum(rows["weight"] * loss.astype(jnp.float32))
        return loss, (metrics, flat_values(model, nnx.BatchStat))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The pure function behind `step`."""
        parts = self.config.grad_accumulation
        valid = batch["valid"].astype(jnp.float32)
        count = valid.sum()
        rows = prepare_rows(self.objective, self.config, state.step, batch, self.rows)
        rows = rows | {"weight": valid / jnp.maximum(count, 1)}
        trained = {name: state.params[name] for name in self.trained}
        frozen = {name: x for name, x in state.params.items() if name not in trained}
        loss: Callable[..., Any] = functools.partial(self.weighted_loss, state.statistics, frozen)
        if self.keep:
            loss = jax.checkpoint(loss, policy=self.keep)
        gradient = jax.value_and_grad(loss, has_aux=True)
        sums = gradient(trained, rows) if parts == 1 else accumulate(gradient, trained, rows, parts, self.mesh)
        (loss, (metrics, statistics)), gradients = sums
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": self.schedule(state.step),
            "valid": count,
        }
        statistics = {name: (x / parts).astype(state.statistics[name].dtype) for name, x in statistics.items()}
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        params = {name: (trained | frozen)[name] for name in state.params} | optax.apply_updates(trained, updates)
        new = TrainState(state.step + 1, params, statistics, opt_state)
        if self.config.max_skipped_updates:
            new, metrics["skipped_update"] = self.unless_bad(state, new, metrics)
        return new, metrics

    def unless_bad(self, old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, jax.Array]:
        """`new`, but for the step `old` where the update is not finite or its gradient too large; and 1.0 there."""
        norm, largest = metrics["grad_norm"], self.config.max_grad_norm or jnp.inf
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (norm <= largest)
        kept = jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)
        return dataclasses.replace(kept, step=new.step), 1.0 - good.astype(jnp.float32)
