"""`benchmark step`: one training step of a recipe on random clips, beside a large matmul and the plain formulation."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from av_mae import benchmark, models
from av_mae.benchmark.roofline import PEAK_FLOPS
from av_mae.config import TrainConfig
from av_mae.models.encoder import patchify, random_mask, take
from av_mae.models.kinds import flat_values
from av_mae.models.layers import sin_cos_2d
from av_mae.models.masked_autoencoder import targets
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

    def __init__(self, step: Any, state: Any, batch: dict[str, jax.Array]):
        start = time.perf_counter()
        self.compiled = step.lower(state, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state, self.batch = state, batch

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


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
        noise = train_step.objective.draw(jax.random.fold_in(jax.random.key(config.seed), number), config.batch_size)
        value, gradients = jax.value_and_grad(loss)(params, *noise.values(), batch["image"], batch["audio"])
        updates, opt_state = train_step.optimizer.update(gradients, opt_state, params)
        return (number + 1, optax.apply_updates(params, updates), opt_state), value

    params = fuse(train_step.init().params)
    state = (jnp.zeros((), jnp.int32), params, train_step.optimizer.init(params))
    return Runner(jax.jit(step, donate_argnums=0), state, batch)


def forward_flops(config: TrainConfig, train_step: TrainStep) -> float:
    """The compiler's count of the forward loss for one clip."""
    definition, b, image, audio = train_step.definition, config.batch_size, config.model.image, config.model.audio
    forward = lambda params, *args: definition.merge(params).losses(*args)  # type: ignore[attr-defined]
    sizes = ((b, *image.size, 3), (b, *audio.size), (b, image.tokens), (b, audio.tokens))
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    lowered = jax.jit(forward).lower(train_step.shapes.params, *shapes)
    return dict(lowered.compile().cost_analysis() or {})["flops"] / b


def measure(config: TrainConfig, rounds: int, with_plain: bool) -> dict[str, Any]:
    """The metrics of `benchmark step`.

    Rates and shares are medians over rounds of ratios taken within a round, since machines drift.

    Args:
      config: the recipe.
      rounds: timed rounds.
      with_plain: whether the plain formulation is measured too, in turn with the step.

    Returns:
      Metrics by the names that the JSON file has.
    """
    mesh = make_mesh(fitted_mesh(config))
    train_step = TrainStep(config, mesh, Length(1000, 10, 1000))
    batch = jax.device_put(random_batch(config), train_step.rows)
    ours = Runner(train_step.step, train_step.init(), batch)
    product, product_flops = benchmark.matmul(config.dtype)
    runs: dict[str, Callable[[], object]] = {"matmul": product, "step": ours, "matmul again": product}
    if with_plain:
        runs["plain"] = plain = plain_runner(config, train_step, batch)
    seconds = benchmark.in_turn(runs, rounds)
    closed = models.closed_form_flops(config.model)
    step_flops = 3.0 * closed * config.batch_size
    matmul_rate = product_flops / ((seconds["matmul"] + seconds["matmul again"]) / 2)
    step_seconds = float(np.median(seconds["step"]))
    metrics = {
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
        "peak_bytes": benchmark.memory_bytes(ours.compiled),
        "compile_seconds": ours.compile_seconds,
    }
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak and config.dtype == "bfloat16":
        metrics["mfu"] = step_flops / step_seconds / (peak * jax.device_count())
    if with_plain:
        metrics |= {
            "plain_step_seconds": float(np.median(seconds["plain"])),
            "plain_compile_seconds": plain.compile_seconds,
            "plain_peak_bytes": benchmark.memory_bytes(plain.compiled),
            "times_plain": float(np.median(seconds["plain"] / seconds["step"])),
        }
    return metrics


def measure_encoder(config: TrainConfig, rounds: int) -> dict[str, float]:
    """Forward passes of the unmasked encoder, in turn: pairs separated, pairs materialized after their tokens'
    projections, and the plain formulation, which puts pairs [v ; a] into memory before they are projected."""
    batch, dtype = random_batch(config), DTYPES[config.dtype]
    image, audio = models.normalize_image(batch["image"]), batch["audio"]

    def encoder(pair_attention: str) -> Callable[[], object]:
        fusion = dataclasses.replace(config.model.fusion, pair_attention=pair_attention)
        model = dataclasses.replace(config.model, fusion=fusion)
        graph, state = nnx.split(models.Encoder(model, rngs=nnx.Rngs(0)))
        state = jax.tree.map(lambda x: x.astype(dtype), state)
        run = jax.jit(lambda state, image, audio: nnx.merge(graph, state)(image, audio)[:3])
        return lambda: run(state, image, audio)

    params = fuse(flat_values(models.AVMAE(config.model, rngs=nnx.Rngs(0))))
    params = {name: x.astype(dtype) for name, x in params.items()}
    inputs = {"image": image, "audio": audio[..., None]}
    keep = {name: jnp.tile(jnp.arange(getattr(config.model, name).tokens), (config.batch_size, 1)) for name in inputs}
    plain = functools.partial(jax.jit(Plain(config.model).encode), params, inputs, keep)
    runs = {"encoder": encoder("separable"), "materialized_encoder": encoder("materialized")}
    seconds = benchmark.in_turn(runs | {"plain_encoder": plain}, rounds)
    ratio = lambda other: float(np.median(seconds[other] / seconds["encoder"]))
    return {f"{name}_seconds": float(np.median(values)) for name, values in seconds.items()} | {
        "times_materialized": ratio("materialized_encoder"),
        "times_plain": ratio("plain_encoder"),
    }


Params = dict[str, jax.Array]


def fuse(params: Params) -> Params:
    """The model's parameters by dotted name, with q, k, v (and k, v of the aggregations, and pair halves) fused."""
    fused = dict(params)
    for name in params:
        if match := re.match(r"(.*attention)\.(aggregate_\w+\.)?value\.(kernel|bias)$", name):
            base, leaf = name.removesuffix(f"value.{match.group(3)}"), match.group(3)
            parts = ("key", "value") if match.group(2) else ("query", "key", "value")
            fused[f"{base}fused.{leaf}"] = jnp.concatenate([fused.pop(f"{base}{p}.{leaf}") for p in parts], -1)
        if match := re.match(r"(.*)\.(key|value)_image\.kernel$", name):
            base, part = match.groups()
            halves = [fused.pop(f"{base}.{part}_{half}.kernel") for half in ("image", "audio")]
            fused[f"{base}.{part}_pair.kernel"] = jnp.concatenate(halves, 0)
            fused[f"{base}.{part}_pair.bias"] = fused.pop(f"{base}.{part}_image.bias")
    return fused


class Plain:
    """plain.losses(params, image, audio, image_noise, audio_noise) → losses [B] of image and audio, as AVMAE.losses.

    `params` come from `fuse`.
    """

    def __init__(self, config: models.AVMAEConfig):
        if config.fusion.kind not in ("factorized", "dense") or config.decoder.kind != "plain":
            raise ValueError(
                "the plain formulation knows factorized and dense fusion with plain decoders, got "
                f"{config.fusion.kind} and {config.decoder.kind}"
            )
        self.config = config

    def linear(self, p: Params, name: str, x: jax.Array) -> jax.Array:
        return x @ p[f"{name}.kernel"] + p[f"{name}.bias"]

    def norm(self, p: Params, name: str, x: jax.Array, eps: float) -> jax.Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + eps) * p[f"{name}.scale"] + p[f"{name}.bias"]

    def mlp(self, p: Params, name: str, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(self.linear(p, f"{name}.fc1", x), approximate=False)
        return self.linear(p, f"{name}.fc2", hidden)

    def attend(self, p: Params, name: str, q: jax.Array, k: jax.Array, v: jax.Array, *, heads: int, width: int):
        """Attention of one layer from its queries, keys and values [B, N, …]; `width` gives the scale."""
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
        x = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (width / heads) ** -0.5, axis=-1) @ v
        return self.linear(p, f"{name}.out", x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1))

    def block(self, p: Params, name: str, x: jax.Array, heads: int, eps: float) -> jax.Array:
        fused = self.linear(p, f"{name}.attention.fused", self.norm(p, f"{name}.norm1", x, eps))
        x = x + self.attend(p, f"{name}.attention", *jnp.split(fused, 3, -1), heads=heads, width=x.shape[-1])
        return x + self.mlp(p, f"{name}.mlp", self.norm(p, f"{name}.norm2", x, eps))

    def aggregate(self, p: Params, name: str, q: jax.Array, x: jax.Array) -> jax.Array:
        k, v = jnp.split(self.linear(p, f"{name}.fused", x), 2, -1)
        return self.attend(
            p, name, self.linear(p, f"{name}.query", q), k, v, heads=self.config.fusion.heads, width=q.shape[-1]
        )

    def read_pairs(self, p: Params, name: str, q: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        (b, i, d), a = image.shape, audio.shape[1]
        pairs = jnp.concatenate(
            [jnp.broadcast_to(image[:, :, None], (b, i, a, d)), jnp.broadcast_to(audio[:, None], (b, i, a, d))], -1
        ).reshape(b, i * a, 2 * d)
        q, k, v = (
            self.linear(p, f"{name}.{layer}", x)
            for layer, x in (("query", q), ("key_pair", pairs), ("value_pair", pairs))
        )
        return self.attend(p, name, q, k, v, heads=self.config.fusion.heads, width=d)

    def fuse_layer(self, p: Params, name: str, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        f, image, audio = (
            self.norm(p, f"{name}.norm_{part}", x, 1e-5)
            for part, x in (("fusion", fusion), ("image", image), ("audio", audio))
        )
        if self.config.fusion.kind == "dense":
            y = self.read_pairs(p, f"{name}.attention", f, image, audio)
        else:
            first, second = self.config.fusion.tokens[0], sum(self.config.fusion.tokens[:2])
            image = self.aggregate(p, f"{name}.attention.aggregate_image", f[:, first:second], image)
            audio = self.aggregate(p, f"{name}.attention.aggregate_audio", f[:, second:], audio)
            y = self.read_pairs(p, f"{name}.attention.pairs", f[:, :first], image, audio)
            y = jnp.concatenate([y, image, audio], 1)
        f = f + y
        return f + self.mlp(p, f"{name}.mlp", self.norm(p, f"{name}.norm2", f, 1e-5))

    def encode(self, p: Params, x: dict[str, jax.Array], keep: dict[str, jax.Array]) -> dict[str, jax.Array]:
        streams, tokens = {"image": self.config.image, "audio": self.config.audio}, {}
        for name, stream in streams.items():
            patches = patchify(x[name], stream.patch_size)
            every = self.linear(p, f"encoder.{name}.patch_embed", patches) + sin_cos_2d(stream.grid, stream.width)
            tokens[name] = take(every, keep[name])
        fusion = jnp.repeat(p["encoder.fusion_tokens"], tokens["image"].shape[0], 0)
        for layer in range(self.config.layers):
            before = dict(tokens)
            for name, stream in streams.items():
                y = jnp.concatenate([fusion, before[name]], 1)
                y = self.block(p, f"encoder.{name}.blocks.{layer}", y, stream.heads, 1e-6)
                tokens[name] = y[:, fusion.shape[1] :]
            fusion = self.fuse_layer(p, f"encoder.fusion_blocks.{layer}", fusion, before["image"], before["audio"])
        tokens = {name: self.norm(p, f"encoder.{name}.norm", y, 1e-6) for name, y in tokens.items()}
        return tokens | {"fusion": self.norm(p, "encoder.fusion_norm", fusion, 1e-5)}

    def decode(self, p: Params, name: str, tokens: jax.Array, fusion: jax.Array, restore: jax.Array) -> jax.Array:
        decoder = f"{name}_decoder"
        x = self.linear(p, f"{decoder}.embed", tokens)
        hidden = jnp.broadcast_to(p[f"{decoder}.mask_token"], (x.shape[0], restore.shape[1] - x.shape[1], x.shape[2]))
        x = take(jnp.concatenate([x, hidden], 1), restore) + p[f"{decoder}.positions"]
        x = jnp.concatenate([self.linear(p, f"{decoder}.embed", fusion), x], 1)
        for number in range(self.config.decoder.depth):
            x = self.block(p, f"{decoder}.blocks.{number}", x, self.config.decoder.heads, 1e-5)
        return self.linear(p, f"{decoder}.predict", self.norm(p, f"{decoder}.norm", x, 1e-5)[:, fusion.shape[1] :])

    def losses(self, p: Params, image: jax.Array, audio: jax.Array, image_noise: jax.Array, audio_noise: jax.Array):
        streams = {"image": self.config.image, "audio": self.config.audio}
        inputs = {"image": image, "audio": audio if audio.ndim == 4 else audio[..., None]}
        noise = {"image": image_noise, "audio": audio_noise}
        masks = {name: random_mask(noise[name], stream.keep) for name, stream in streams.items()}
        tokens = self.encode(p, inputs, {name: mask.keep for name, mask in masks.items()})
        losses = []
        for name, stream in streams.items():
            restore = jnp.argsort(jnp.concatenate([masks[name].keep, masks[name].removed], 1), axis=1)
            prediction = self.decode(p, name, tokens[name], tokens["fusion"], restore)
            error = jnp.square(prediction - targets(inputs[name], stream)).mean(-1)
            losses.append((error * masks[name].mask).sum(1) / np.float32(stream.tokens - stream.keep))
        return tuple(losses)
