"""One optimizer step as a pure function, compiled over a mesh: (state, batch) → (state, metrics)."""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae import models
from av_mae.config import TrainConfig
from av_mae.models.layers import Initial
from av_mae.training.mesh import (ROWS, batch_sharding, check_batch, gather, keep_all_but_gathered,
                                  parameter_shardings, replicated, row_shards)
from av_mae.training.optimizer import Length, learning_rate, make_optimizer

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# What a layer keeps for the backward pass: everything, nothing but its input, or its matrix products as well.
REMAT = {"none": None, "full": jax.checkpoint_policies.nothing_saveable,
         "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
# Folded into the seed for the initial parameters; steps, which are folded in for the masks, stay below it.
INIT_STREAM = 2 ** 32 - 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt_state"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Optimizer steps done (int32), parameters by dotted name (float32), and optax's state over the same names."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its parameters, which are kept as a flat dict by dotted name."""

    graph: nnx.GraphDef
    paths: dict[str, tuple]
    initials: dict[str, Initial]

    def merge(self, params: Params) -> models.AVMAE:
        """The model that computes with these parameters."""
        return nnx.merge(self.graph, nnx.from_flat_state([(self.paths[name], x) for name, x in params.items()]))


def flat_params(model: nnx.Module) -> Params:
    """Parameters of a model by dotted name, e.g. 'encoder.image.blocks.0.mlp.fc1.kernel'."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def define_model(config: models.AVMAEConfig) -> tuple[ModelDefinition, dict[str, jax.ShapeDtypeStruct]]:
    """The model's structure and the shapes of its parameters; nothing is allocated."""
    model = nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model, nnx.Param)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    initials = {name: variable.get_metadata("initial") for name, (_, variable) in flat.items()}
    return ModelDefinition(graph, {name: path for name, (path, _) in flat.items()}, initials), flat_params(model)


def draw_params(initials: dict[str, Initial], shardings: dict[str, NamedSharding], key: jax.Array) -> Params:
    """Initial parameters, each drawn from a key of its name straight into its shards.

    One small program per kind of parameter: drawing all in one takes minutes to compile at ViT-B.
    """
    programs = {}
    for name, initial in initials.items():
        program = (initial, shardings[name])
        if program not in programs:
            programs[program] = jax.jit(initial.__call__, out_shardings=shardings[name])
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in initials}
    return {name: programs[initial, shardings[name]](keys[name]) for name, initial in initials.items()}


def mask_noises(config: TrainConfig, step: jax.Array, rows: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """Noise [B, tokens] of both streams; row b of step s depends on (seed, s, b) alone, never on the mesh."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    streams = (config.model.image, config.model.audio)
    noises = (models.mask_noise(key, config.batch_size, stream.tokens) for key, stream in zip(keys, streams))
    return tuple(jax.lax.with_sharding_constraint(noise, rows) for noise in noises)


def weighted_losses(definition: ModelDefinition, config: TrainConfig, shardings: dict[str, NamedSharding],
                    params: Params, rows: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Σ weight · loss over the given rows, in all and per stream (float32 scalars)."""
    model = definition.merge(gather(params, shardings, DTYPES[config.dtype]))
    if REMAT[config.remat] is not None:
        remat = functools.partial(jax.checkpoint, policy=REMAT[config.remat])
        model.encoder.remat = model.image_decoder.remat = model.audio_decoder.remat = remat
    image = models.normalize_image(rows["image"])
    losses = model.losses(image, rows["audio"], rows["image_noise"], rows["audio_noise"])
    image_loss, audio_loss = (jnp.sum(rows["weight"] * loss.astype(jnp.float32)) for loss in losses)
    return image_loss + audio_loss, (image_loss, audio_loss)


def split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[B, …] → [parts, shards, B / (parts · shards), …] so that every device keeps its own rows."""
    shards = row_shards(mesh)
    x = x.reshape(shards, parts, x.shape[0] // (shards * parts), *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *ROWS)))


def accumulate(gradient: Callable, params: Params, rows: Batch, parts: int, mesh: Mesh):
    """Sums of `gradient(params, rows)` over `parts` parts of the rows, one after the other."""
    if parts == 1:
        return gradient(params, rows)
    shapes = jax.eval_shape(gradient, params, rows)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add_part(total, part: Batch):
        part = {name: x.reshape(-1, *x.shape[2:]) for name, x in part.items()}
        part = jax.lax.with_sharding_constraint(part, batch_sharding(mesh))
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    return jax.lax.scan(add_part, start, {name: split_rows(x, parts, mesh) for name, x in rows.items()})[0]


class TrainStep:
    """The compiled step of one recipe on one mesh, and the state it begins with.

    `step(state, batch)` takes the global batch (`image` uint8 [B, H, W, 3], `audio` float32 [B, mels, frames],
    `valid` bool [B], rows over 'data' and 'fsdp'), donates the state and returns the next state and float32 scalars
    `loss`, `image_loss`, `audio_loss` (means over valid clips), `grad_norm`, `learning_rate`, `valid` (clips).

    Raises:
      UserError: the batch does not divide over the mesh.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, length: Length):
        check_batch(mesh, config.batch_size, config.grad_accumulation)
        self.config, self.mesh = config, mesh
        self.definition, self.shapes = define_model(config.model)
        self.schedule = learning_rate(config, length)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.rows = batch_sharding(mesh)
        self.shardings = self._state_shardings(self.shapes)
        whole = replicated(mesh)
        self.step = jax.jit(self.train_step, in_shardings=(self.shardings, self.rows),
                            out_shardings=(self.shardings, whole), donate_argnums=0)
        self.predict = jax.jit(self._predict, in_shardings=(self.shardings, self.rows), out_shardings=whole,
                               static_argnums=2)

    def _state_shardings(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Optimizer moments lie as their parameters do, scalars on every device."""
        params = parameter_shardings({name: x.shape for name, x in shapes.items()}, self.mesh)
        whole = replicated(self.mesh)

        def of(path, _) -> NamedSharding:
            name = getattr(path[-1], "key", None)
            return params.get(name, whole)

        opt_state = jax.tree_util.tree_map_with_path(of, jax.eval_shape(self.optimizer.init, shapes))
        return TrainState(whole, params, opt_state)

    def _start(self, params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def init(self, params: Params | None = None) -> TrainState:
        """The state of step 0, every parameter born in its shards; with `params`, from these weights."""
        if params is None:
            key = jax.random.fold_in(jax.random.key(self.config.seed), INIT_STREAM)
            params = draw_params(self.definition.initials, self.shardings.params, key)
        return jax.jit(self._start, in_shardings=(self.shardings.params,), out_shardings=self.shardings)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored to."""
        shapes = jax.eval_shape(self._start, self.shapes)
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                            shapes, self.shardings)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The pure function behind `step`."""
        image_noise, audio_noise = mask_noises(self.config, state.step, self.rows)
        valid = batch["valid"].astype(jnp.float32)
        count = valid.sum()
        rows = {"image": batch["image"], "audio": batch["audio"], "image_noise": image_noise,
                "audio_noise": audio_noise, "weight": valid / jnp.maximum(count, 1)}
        loss = functools.partial(weighted_losses, self.definition, self.config, self.shardings.params)
        if self.mesh.shape["fsdp"] > 1:
            loss = jax.checkpoint(loss, policy=keep_all_but_gathered)
        (loss, (image_loss, audio_loss)), gradients = accumulate(
            jax.value_and_grad(loss, has_aux=True), state.params, rows, self.config.grad_accumulation, self.mesh)
        metrics = {"loss": loss, "image_loss": image_loss, "audio_loss": audio_loss,
                   "grad_norm": optax.tree.norm(gradients), "learning_rate": self.schedule(state.step),
                   "valid": count}
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    def _predict(self, state: TrainState, batch: Batch, clips: int) -> tuple[jax.Array, jax.Array, models.Output]:
        """The batch's first clips (image, audio) and the predictions for them, masked as in the step after `state`."""
        noises = mask_noises(self.config, state.step, self.rows)
        model = self.definition.merge(gather(state.params, self.shardings.params, DTYPES[self.config.dtype]))
        image, audio = batch["image"][:clips], batch["audio"][:clips]
        return image, audio, model(models.normalize_image(image), audio, *(noise[:clips] for noise in noises))
