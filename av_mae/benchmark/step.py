"""`benchmark step`: one training step of a recipe on random clips, beside a large matmul and the plain formulation."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from av_mae import models
from av_mae.benchmark import timing
from av_mae.benchmark.chips import PEAK_FLOPS
from av_mae.benchmark.plain import Plain, fuse
from av_mae.config import TrainConfig
from av_mae.models.kinds import flat_values
from av_mae.train.optimizer import Length
from av_mae.train.sharding import make_mesh
from av_mae.train.step import DTYPES, TrainStep, fitted_mesh


def random_batch(config: TrainConfig) -> dict[str, jax.Array]:
    """A global batch of noise: image uint8 [B, H, W, 3], audio float32 [B, mels, frames], valid bool [B]."""
    keys, b = jax.random.split(jax.random.key(config.seed)), config.batch_size
    return {
        "image": jax.random.bits(keys[0], (b, *config.model.image.size, 3), jnp.uint8),
        "audio": jax.random.normal(keys[1], (b, *config.model.audio.size)),
        "valid": jnp.ones(b, bool),
    }


class Runner:
    """Calls a step that donates its state again and again on one batch; `compile_seconds` is its compilation."""

    def __init__(self, step, state, batch):
        start = time.perf_counter()
        self.compiled = step.lower(state, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state, self.batch = state, batch

    def __call__(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def noises(config: TrainConfig, step: jax.Array) -> list[jax.Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    return [
        models.mask_noise(key, config.batch_size, stream.tokens)
        for key, stream in zip(keys, (config.model.image, config.model.audio), strict=True)
    ]


def plain_runner(config: TrainConfig, train_step: TrainStep, batch: dict[str, jax.Array]) -> Runner:
    """The same step in the plain formulation, with the same optimizer."""
    plain, dtype = Plain(config.model), DTYPES[config.dtype]

    def loss(params, image_noise, audio_noise, image, audio):
        cast = {name: x.astype(dtype) for name, x in params.items()}
        image, audio = plain.losses(
            cast, models.normalize_image(image).astype(dtype), audio.astype(dtype), image_noise, audio_noise
        )
        return image.mean() + audio.mean()

    def step(state, batch):
        number, params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, *noises(config, number), batch["image"], batch["audio"])
        updates, opt_state = train_step.optimizer.update(gradients, opt_state, params)
        return (number + 1, optax.apply_updates(params, updates), opt_state), value

    params = fuse(train_step.init().params)
    state = (jnp.zeros((), jnp.int32), params, train_step.optimizer.init(params))
    return Runner(jax.jit(step, donate_argnums=0), state, batch)


def forward_flops(config: TrainConfig, train_step: TrainStep) -> float:
    """The compiler's count of the forward loss for one clip."""
    definition, b = train_step.definition, config.batch_size
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    forward = lambda params, *args: definition.merge(params).losses(*args)
    image, audio = config.model.image, config.model.audio
    lowered = jax.jit(forward).lower(
        train_step.shapes.params,
        shape(b, *image.size, 3),
        shape(b, *audio.size),
        shape(b, image.tokens),
        shape(b, audio.tokens),
    )
    return lowered.compile().cost_analysis()["flops"] / b


def measure(config: TrainConfig, rounds: int, with_plain: bool) -> dict:
    """The figures of `benchmark step` (DESIGN: names in the JSON file).

    Rates and shares are medians over rounds of ratios taken within a round, since machines drift.
    """
    mesh = make_mesh(fitted_mesh(config))
    train_step = TrainStep(config, mesh, Length(1000, 10, 1000))
    batch = jax.device_put(random_batch(config), train_step.rows)
    ours = Runner(train_step.step, train_step.init(), batch)
    product, product_flops = timing.matmul(config.dtype)
    runs = {"matmul": product, "step": ours, "matmul again": product}
    if with_plain:
        runs["plain"] = plain = plain_runner(config, train_step, batch)
    seconds = timing.in_turn(runs, rounds)
    closed = models.closed_form_flops(config.model)
    step_flops = 3.0 * closed * config.batch_size
    matmul_rate = product_flops / ((seconds["matmul"] + seconds["matmul again"]) / 2)
    step_seconds = float(np.median(seconds["step"]))
    figures = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "rounds": rounds,
        "step_seconds": step_seconds,
        "clips_per_second": config.batch_size / step_seconds,
        "flops_per_clip": closed,
        "compiler_flops_per_clip": forward_flops(config, train_step),
        "matmul_flops_per_second": float(np.median(matmul_rate)),
        "matmul_share": float(np.median(step_flops / seconds["step"] / (matmul_rate * jax.device_count()))),
        "peak_bytes": timing.memory_bytes(ours.compiled),
        "compile_seconds": ours.compile_seconds,
    }
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak and config.dtype == "bfloat16":
        figures["mfu"] = step_flops / step_seconds / (peak * jax.device_count())
    if with_plain:
        figures |= {
            "plain_step_seconds": float(np.median(seconds["plain"])),
            "plain_compile_seconds": plain.compile_seconds,
            "plain_peak_bytes": timing.memory_bytes(plain.compiled),
            "times_plain": float(np.median(seconds["plain"] / seconds["step"])),
        }
    return figures


def encoder_forward(config: TrainConfig, pair_attention: str):
    """The encoder of all patches of a batch of noise as a compiled function without arguments, pairs read as named."""
    fusion = dataclasses.replace(config.model.fusion, pair_attention=pair_attention)
    model = dataclasses.replace(config.model, fusion=fusion)
    graph, state = nnx.split(models.Encoder(model, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x.astype(DTYPES[config.dtype]), state)
    batch = random_batch(config)
    image = models.normalize_image(batch["image"])
    run = jax.jit(lambda state, image, audio: nnx.merge(graph, state)(image, audio)[:3])
    return lambda: run(state, image, batch["audio"])


def plain_encoder_forward(config: TrainConfig):
    """The same in the plain formulation: pairs [v ; a] put into memory before they are projected."""
    plain, batch = Plain(config.model), random_batch(config)
    model = models.AVMAE(config.model, rngs=nnx.Rngs(0))
    params = {name: x.astype(DTYPES[config.dtype]) for name, x in fuse(flat_values(model)).items()}
    inputs = {"image": models.normalize_image(batch["image"]), "audio": batch["audio"][..., None]}
    keep = {name: jnp.tile(jnp.arange(getattr(config.model, name).tokens), (config.batch_size, 1)) for name in inputs}
    run = jax.jit(plain.encode)
    return lambda: run(params, inputs, keep)


def measure_encoder(config: TrainConfig, rounds: int) -> dict:
    """Forward passes of the unmasked encoder, in turn: pairs separated, pairs materialized after their tokens'
    projections, and the plain formulation."""
    seconds = timing.in_turn(
        {
            "encoder": encoder_forward(config, "separable"),
            "materialized_encoder": encoder_forward(config, "materialized"),
            "plain_encoder": plain_encoder_forward(config),
        },
        rounds,
    )
    ratio = lambda other: float(np.median(seconds[other] / seconds["encoder"]))
    return {f"{name}_seconds": float(np.median(values)) for name, values in seconds.items()} | {
        "times_materialized": ratio("materialized_encoder"),
        "times_plain": ratio("plain_encoder"),
    }
