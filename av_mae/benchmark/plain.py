"""The plain formulation of the model: the reference of tests and benchmarks.

Everything that the model avoids is done here as the published system does it: queries, keys and values in one weight
that is sliced inside the step; fusion tokens as full tokens of the ViT blocks, their outputs thrown away; keys and
values of all pairs [v_i ; a_j] in memory; both decoders complete to their last block, all patches predicted. Plain
decoders, `factorized` and `dense` fusion at every layer, equal widths.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import models
from av_mae.models.layers import sin_cos_2d
from av_mae.models.patches import patchify, random_mask, take, targets

Params = dict[str, jax.Array]
PAIR_HALVES = ("image", "audio")


def fuse(params: Params) -> Params:
    """The model's parameters by dotted name, with q, k, v (and k, v of the aggregations, and pair halves) fused."""
    fused = dict(params)
    for name in params:
        match = re.match(r"(.*attention)\.(aggregate_\w+\.)?value\.(kernel|bias)$", name)
        if match:
            base, leaf = name.removesuffix(f"value.{match.group(3)}"), match.group(3)
            parts = ("key", "value") if match.group(2) else ("query", "key", "value")
            fused[f"{base}fused.{leaf}"] = jnp.concatenate([fused.pop(f"{base}{p}.{leaf}") for p in parts], -1)
        match = re.match(r"(.*)\.(key|value)_image\.kernel$", name)
        if match:
            base, part = match.groups()
            halves = [fused.pop(f"{base}.{part}_{half}.kernel") for half in PAIR_HALVES]
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

    def heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, heads: int, scale: float) -> jax.Array:
        q, k, v = (self.heads(x, heads) for x in (q, k, v))
        x = jax.nn.softmax(q @ k.swapaxes(-1, -2) * scale, axis=-1) @ v
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)

    def block(self, p: Params, name: str, x: jax.Array, heads: int, eps: float) -> jax.Array:
        y = self.linear(p, f"{name}.attention.fused", self.norm(p, f"{name}.norm1", x, eps))
        width = x.shape[-1]
        q, k, v = y[..., :width], y[..., width : 2 * width], y[..., 2 * width :]
        y = self.attend(q, k, v, heads, (width // heads) ** -0.5)
        x = x + self.linear(p, f"{name}.attention.out", y)
        return x + self.mlp(p, f"{name}.mlp", self.norm(p, f"{name}.norm2", x, eps))

    def aggregate(self, p: Params, name: str, q: jax.Array, x: jax.Array) -> jax.Array:
        width, heads = q.shape[-1], self.config.fusion.heads
        y = self.linear(p, f"{name}.fused", x)
        y = self.attend(
            self.linear(p, f"{name}.query", q), y[..., :width], y[..., width:], heads, (width // heads) ** -0.5
        )
        return self.linear(p, f"{name}.out", y)

    def read_pairs(self, p: Params, name: str, q: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        (b, i, d), a, heads = image.shape, audio.shape[1], self.config.fusion.heads
        pairs = jnp.concatenate(
            [jnp.broadcast_to(image[:, :, None], (b, i, a, d)), jnp.broadcast_to(audio[:, None], (b, i, a, d))], -1
        ).reshape(b, i * a, 2 * d)
        k, v = self.linear(p, f"{name}.key_pair", pairs), self.linear(p, f"{name}.value_pair", pairs)
        y = self.attend(self.linear(p, f"{name}.query", q), k, v, heads, (d / heads) ** -0.5)
        return self.linear(p, f"{name}.out", y)

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
