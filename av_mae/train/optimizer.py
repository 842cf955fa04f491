"""AdamW and LARS with linear warm-up and cosine decay, as published, or others; multipliers for single parameters."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from av_mae.config import OptimizerConfig, TrainConfig
from av_mae.errors import UserError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
# What a parameter's learning rate is multiplied by: a number, or a function of the updates done before.
Multipliers = Mapping[str, float | Schedule]

FIRST_LAYER = re.compile(r"encoder\.(fusion_tokens$|(image|audio)\.patch_embed\.)")
INNER_LAYER = re.compile(r"encoder\.(?:(?:image|audio)\.(?:blocks|bridges)|fusion_blocks)\.(\d+)\.")


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
        raise UserError(
            f"exactly one of steps and epochs must be above 0, got steps={config.steps}, "
            f"epochs={config.epochs}: set the other to 0"
        )
    per_epoch = clips / config.batch_size if config.epochs > 0 else 1.0
    end = config.epochs * per_epoch if config.epochs > 0 else float(config.steps)
    warmup = config.optimizer.warmup * per_epoch
    if warmup < 0:
        raise UserError(f"optimizer.warmup={config.optimizer.warmup} must be at least 0")
    return Length(max(1, math.ceil(end - 1e-9)), warmup, end)


def learning_rate(config: TrainConfig, length: Length) -> Schedule:
    """step (updates done before) → learning rate, float32: 0 → base_lr × batch_size / 256 → 0 but for 'constant'."""
    peak, kind = config.optimizer.base_lr * config.batch_size / 256, config.optimizer.schedule

    def share(done: jax.Array) -> jax.typing.ArrayLike:
        """Of the peak, after `done` (0 to 1) of what comes after the warm-up."""
        if kind == "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * done))
        left = (1 - done) * max(length.end - length.warmup, 1e-9) / (config.optimizer.decay_share * length.end)
        return jnp.ones_like(done) if kind == "constant" else jnp.minimum(1.0, left)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(length.warmup, 1e-9)
        done = jnp.clip((step - length.warmup) / max(length.end - length.warmup, 1e-9), 0, 1)
        return peak * jnp.where(step < length.warmup, rising, share(done))

    return schedule


def rate_change(saved: TrainConfig, config: TrainConfig, clips: int, step: int) -> str:
    """What happens to the learning rate where a run goes on after `step` with another recipe; '' where nothing does.

    Args:
      saved: the recipe before.
      config: the recipe now.
      clips: per epoch.
      step: updates done.
    """
    before, now = (float(learning_rate(one, run_length(one, clips))(step)) for one in (saved, config))
    if abs(now - before) <= 0.1 * max(now, before):
        return ""
    names = ("steps", "epochs", "batch_size")
    changed = [
        f"{name} {getattr(saved, name)} → {getattr(config, name)}"
        for name in names
        if getattr(saved, name) != getattr(config, name)
    ]
    changed += ["optimizer"] if saved.optimizer != config.optimizer else []
    changed = changed or ["clips per epoch"]
    return (
        f"warning: at step {step} the learning rate is {now:.3g} where it was {before:.3g} ({', '.join(changed)}): "
        f"optimizer.schedule={config.optimizer.schedule!r} follows the length of the run. Where runs may be made "
        "longer take 'constant', or 'wsd' and go on from a checkpoint before its decay"
    )


def decayed(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
    """Which parameters get weight decay: all but biases (Swin's relative ones too) and what has one dimension."""
    return {name: x.ndim > 1 and not name.endswith("bias") for name, x in parameters.items()}


def layer_multipliers(names: Iterable[str], decay: float, layers: int) -> dict[str, float]:
    """Layer-wise learning rates of fine-tuning: decay^(layers + 1 - layer) by parameter name (published system).

    Patch embedding and fusion tokens are layer 0, blocks and fusion blocks l (with what leads into them) layer l + 1,
    final norms and heads layer `layers` + 1. `layers` counts the encoder's layers.

    Raises:
      UserError: decay is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer decay={decay} must be above 0 and at most 1 (1: the same rate everywhere)")

    def layer(name: str) -> int:
        if FIRST_LAYER.match(name):
            return 0
        match = INNER_LAYER.match(name)
        return int(match.group(1)) + 1 if match else layers + 1

    return {name: decay ** (layers + 1 - layer(name)) for name in names}


def encoder_multipliers(names: Iterable[str], encoder_rate: float, decay: float, layers: int) -> dict[str, float]:
    """`layer_multipliers`, those of the encoder times `encoder_rate`."""
    return {
        name: scale * (encoder_rate if name.startswith("encoder.") else 1)
        for name, scale in layer_multipliers(names, decay, layers).items()
    }


def pretrained_multipliers(names: Iterable[str], streams: Iterable[str], length: Length) -> dict[str, Schedule]:
    """For the parameters of pretrained unimodal encoders ('image', 'audio'): half a cosine 0 → 1 over the first half.

    Bridges from the fusion tokens are new and keep the full rate.
    """
    begins = tuple(f"encoder.{stream}.{part}." for stream in streams for part in ("patch_embed", "blocks", "norm"))

    def multiplier(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.clip(2 * jnp.asarray(step, jnp.float32) / length.end, 0, 1)
        return 0.5 - 0.5 * jnp.cos(jnp.pi * done)

    return {name: multiplier for name in names if name.startswith(begins)}


def scale_by_rates(schedule: Schedule, multipliers: Multipliers) -> optax.GradientTransformation:
    """Updates times -schedule(step) × multiplier(step) by name; a name without a multiplier has 1."""

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Mapping[str, jax.Array], state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[dict[str, jax.Array], optax.ScaleByScheduleState]:
        def rate(name: str) -> jax.Array:
            multiplier = multipliers.get(name, 1.0)
            return -schedule(state.count) * (multiplier(state.count) if callable(multiplier) else multiplier)

        scaled = {name: jnp.asarray(rate(name), x.dtype) * x for name, x in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, schedule: Schedule, multipliers: Multipliers | None = None
) -> optax.GradientTransformation:
    """AdamW (decoupled weight decay) or LARS over a flat dict of parameters, gradients clipped by their global norm.

    LARS is that of MAE's linear probe: the update of a kernel, its gradient + weight_decay · p, is multiplied by
    trust · |p| / |update| (1 where either is 0); biases and others of one dimension have neither decay nor this;
    momentum sums up the updates before the learning rate. `multipliers` of single parameters' learning rates, which
    weight decay is part of, go beside `schedule`.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    if config.kind == "lars":
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=config.trust), decayed)
        direction: tuple[optax.GradientTransformation, ...] = decay, trust, optax.trace(config.momentum)
    else:
        direction = optax.scale_by_adam(config.b1, config.b2, eps=1e-8), decay
    return optax.chain(clip, *direction, scale_by_rates(schedule, multipliers or {}))
