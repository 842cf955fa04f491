"""AdamW with linear warm-up and cosine decay, as the published recipe has it."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from av_mae.config import OptimizerConfig, TrainConfig
from av_mae.errors import UserError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is: optimizer steps in all, and (fractional) steps of warm-up and of the decay's end.

    A run that ends before its warm-up does never reaches the full learning rate.
    """

    steps: int
    warmup: float
    end: float


def run_length(config: TrainConfig, clips: int) -> Length:
    """Steps of a run over `clips` clips per epoch.

    Raises:
      UserError: not exactly one of `steps` and `epochs` is given, or the warm-up is negative.
    """
    if (config.steps > 0) == (config.epochs > 0):
        raise UserError(f"exactly one of steps and epochs must be above 0, got steps={config.steps}, "
                        f"epochs={config.epochs}: set the other to 0")
    per_epoch = clips / config.batch_size if config.epochs > 0 else 1.0
    end = config.epochs * per_epoch if config.epochs > 0 else float(config.steps)
    warmup = config.optimizer.warmup * per_epoch
    if warmup < 0:
        raise UserError(f"optimizer.warmup={config.optimizer.warmup} must be at least 0")
    return Length(max(1, math.ceil(end - 1e-9)), warmup, end)


def learning_rate(config: TrainConfig, length: Length) -> Schedule:
    """step (updates done before) → learning rate, float32: 0 → base_lr × batch_size / 256 → 0."""
    peak = config.optimizer.base_lr * config.batch_size / 256

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(length.warmup, 1e-9)
        done = jnp.clip((step - length.warmup) / max(length.end - length.warmup, 1e-9), 0, 1)
        return peak * jnp.where(step < length.warmup, rising, 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return schedule


def decayed(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
    """Which parameters get weight decay: all but biases, norms and others of one dimension."""
    return {name: x.ndim > 1 for name, x in parameters.items()}


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    """AdamW over a flat dict of parameters, with decoupled weight decay; gradients are clipped by their global norm."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule))
