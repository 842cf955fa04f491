"""A tiny model, its recipe and random batches for tests of training."""

import dataclasses
import functools

import jax
import numpy as np

from av_mae.checkpoint import TrainState
from av_mae.config import DataConfig, MeshConfig, OptimizerConfig, SoundConfig, TrainConfig
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig
from av_mae.train import loop, optimizer, step
from av_mae.train import sharding as mesh

ENCODER = dict(width=32, depth=1, heads=2)
MODEL = AVMAEConfig(
    image=StreamConfig(size=(32, 48), patch=16, mask_ratio=0.5, **ENCODER),
    audio=StreamConfig(size=(32, 32), channels=1, patch=16, mask_ratio=0.5, **ENCODER),
    fusion=FusionConfig(tokens=(2, 1, 1), heads=2),
    decoder=DecoderConfig(width=32, depth=1, heads=2),
)
# Nothing is gained from optimised code in a few steps of a tiny model; compiling takes half the time without.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def recipe(model: AVMAEConfig = MODEL, **changes) -> TrainConfig:
    """A recipe of 20 steps of 16 clips in float32."""
    defaults = dict(
        steps=20,
        batch_size=16,
        dtype="float32",
        validate_every=0,
        optimizer=OptimizerConfig(base_lr=0.05, warmup=2.0),
        data=DataConfig(sound=SoundConfig(mels=model.audio.size[0])),
        model=model,
    )
    return TrainConfig(**{**defaults, **changes})


def unfused(model: AVMAEConfig = MODEL) -> AVMAEConfig:
    """The smallest program: no fusion tokens."""
    return dataclasses.replace(model, fusion=FusionConfig(kind="none"))


def batches(config: TrainConfig, count: int, invalid: bool = True) -> list[dict[str, np.ndarray]]:
    """Random host batches; with `invalid` one clip in each is marked as failed."""
    random, b = np.random.default_rng(0), config.batch_size
    made = []
    for number in range(count):
        valid = np.arange(b) != number if invalid else np.ones(b, bool)
        made.append(
            {
                "image": random.integers(0, 256, (b, *config.model.image.size, 3), np.uint8),
                "audio": random.standard_normal((b, *config.model.audio.size), np.float32),
                "label": np.zeros(b, np.int32),
                "start": np.zeros(b, np.float32),
                "valid": valid,
                "id": np.array([f"clip{number}-{row}" for row in range(b)], object),
                "stage": np.array([""] * b, object),
                "cause": np.array([""] * b, object),
            }
        )
    return made


def make_step(config: TrainConfig, devices: int = 1, clips: int = 1000) -> step.TrainStep:
    """The step on the first `devices` devices."""
    return step.TrainStep(
        config, mesh.make_mesh(config.mesh, jax.devices()[:devices]), optimizer.run_length(config, clips)
    )


def on_mesh(config: TrainConfig, data: int, fsdp: int, tensor: int = 1) -> step.TrainStep:
    """The step on data × fsdp × tensor devices."""
    return make_step(dataclasses.replace(config, mesh=MeshConfig(data, fsdp, tensor)), data * fsdp * tensor)


@functools.cache
def first_parameters(model: AVMAEConfig) -> dict[str, np.ndarray]:
    """Initial parameters, made on one device once and for all tests."""
    return {name: np.array(x) for name, x in make_step(recipe(model)).init().params.items()}


def first_state(train_step: step.TrainStep) -> TrainState:
    """The state of step 0 on the step's mesh, without compiling its initialisation again."""
    # copies: the step writes into what it is given
    params = {name: x.copy() for name, x in first_parameters(train_step.config.model).items()}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), train_step.abstract_state())
    return jax.device_put(dataclasses.replace(zeros, params=params), train_step.shardings)


def compile_step(train_step: step.TrainStep):
    """The compiled step, as `train_step.step` would compile it but unoptimised."""
    config = train_step.config
    shapes = {
        "image": ((*config.model.image.size, 3), np.uint8),
        "audio": (config.model.audio.size, np.float32),
        "label": ((), np.int32),
        "start": ((), np.float32),
        "valid": ((), bool),
    }
    batch = {name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    return train_step.step.lower(train_step.abstract_state(), batch).compile(FAST_COMPILE)


def run_steps(train_step: step.TrainStep, host: list[dict[str, np.ndarray]], state=None):
    """Runs the given batches; returns the last state and the metrics of each step."""
    state = first_state(train_step) if state is None else state
    rows, compiled = mesh.local_rows(train_step.rows, train_step.config.batch_size), compile_step(train_step)
    history = []
    for batch in host:
        local = {name: x[rows] for name, x in batch.items()}
        state, metrics = compiled(state, loop.to_global(local, train_step.rows))
        history.append({name: float(x) for name, x in metrics.items()})
    return state, history
