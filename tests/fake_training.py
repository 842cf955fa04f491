"""States that tell their step, a step that counts, and AdamW in NumPy: what tests of training share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tiny_training import recipe

from av_mae import checkpoint
from av_mae.checkpoint import TrainState
from av_mae.config import MeshConfig
from av_mae.train import loop
from av_mae.train import sharding as mesh

SHAPES = {"encoder.kernel": (8, 16), "encoder.bias": (16,), "token": (1, 1, 4)}
CONFIG = recipe()
OPTIMIZER = optax.adamw(0.1)


def shardings(data: int, fsdp: int) -> TrainState:
    """Kernels cut over fsdp on data × fsdp devices, the rest whole."""
    made = mesh.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    shapes = jax.eval_shape(lambda: state_of(0))
    return jax.tree.map(
        lambda x: NamedSharding(made, PartitionSpec("fsdp") if x.shape == (8, 16) else PartitionSpec()), shapes
    )


def state_of(step: int) -> TrainState:
    """A state whose numbers tell its step."""
    params = {
        name: jnp.full(shape, step, jnp.float32) + jnp.arange(np.prod(shape)).reshape(shape) / 7
        for name, shape in SHAPES.items()
    }
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), OPTIMIZER.init(params))
    return TrainState(jnp.int32(step), params, {}, opt_state)


def state_on(step: int, data: int = 1, fsdp: int = 1) -> TrainState:
    return jax.device_put(state_of(step), shardings(data, fsdp))


def abstract(data: int = 1, fsdp: int = 1) -> TrainState:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: state_of(0)),
        shardings(data, fsdp),
    )


def assert_same(restored: checkpoint.Restored, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.state), jax.device_get(state_of(step)))
    assert restored.meta["step"] == step and restored.meta["position"] == 16 * step


class FakePrefetch:
    """Endless (host, batch) pairs; clips are named after their step."""

    wait_seconds = 0.0

    def __init__(self, first=0):
        self.number = first

    def __next__(self):
        self.number += 1
        ids = np.array([f"step{self.number}-{row}" for row in range(16)], object)
        return {"id": ids, "stage": np.array([""] * 16, object), "cause": np.array([""] * 16, object)}, {
            "number": self.number
        }


def counting_step(bad=()):
    """A step whose state is the number of steps done; losses of the steps `bad` are NaN."""

    def step(state, batch):
        assert batch["number"] == state + 1
        loss = math.nan if state + 1 in bad else 1.0 / (state + 1)
        values = {
            "loss": loss,
            "image_loss": 0.5,
            "audio_loss": 0.25,
            "grad_norm": 2.0,
            "learning_rate": 0.1,
            "valid": 15.0,
        }
        return state + 1, {name: jnp.float32(x) for name, x in values.items()}

    return step


class Recorder(loop.Hook):
    """Writes down what it is told."""

    def __init__(self, every=3):
        self.every, self.seen = every, []

    def due(self, step, finished, stopped):
        return finished or stopped or step % self.every == 0

    def after_step(self, moment):
        self.seen.append(("state", moment.step, moment.state, moment.finished, moment.stopped))

    def after_metrics(self, step, metrics, host):
        self.seen.append(("metrics", step))


def never(_):
    return False


def numpy_adamw(params, gradients, rate, config):
    """Decoupled AdamW with global clipping, written out; float64."""
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for number, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, g in gradient.items():
            g = g * scale
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g**2
            update = first[name] / (1 - config.b1**number)
            update = update / (np.sqrt(second[name] / (1 - config.b2**number)) + 1e-8)
            if params[name].ndim > 1:
                update = update + config.weight_decay * params[name]
            params[name] = params[name] - rate(number - 1) * update
    return params
