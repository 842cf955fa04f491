"""Fusion blocks: fusion tokens read the image and audio tokens of a layer (paper section 3.2).

`image_weights` of a block and of its attention tell how strongly tokens attend to each image token, averaged over
heads and summed over the sound's tokens where pairs are read. Nothing of it is computed in training.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae.models.config import FusionConfig, require
from av_mae.models.layers import (
    FROM_HEADS,
    MLP,
    TO_HEADS,
    Attention,
    LayerNorm,
    Linear,
    at_least_float32,
    attend,
    attention_weights,
    merge_heads,
    softmax,
    split_heads,
)


class KeysValues(NamedTuple):
    keys: jax.Array
    values: jax.Array


class Dropout(NamedTuple):
    """Rate and key of attention dropout; the draw for image token i depends on i alone, not on chunks."""

    rate: float
    key: jax.Array


PairFunction = Callable[[jax.Array, jax.Array], jax.Array]
PAIRS: dict[str, PairFunction] = {"sum": jnp.add, "product": jnp.multiply}


def separable(q: jax.Array, image: KeysValues, audio: KeysValues, scale: float, pair: str = "sum") -> jax.Array:
    """Output [B, F, H, V] for pair 'sum': softmax_i(s) V_i + softmax_j(t) V_j (DESIGN: pairs separate)."""
    require(pair == "sum", f"separable pair attention needs pair='sum', got {pair!r}")
    return attend(q, *image, scale) + attend(q, *audio, scale)


def _keep_scale(dropout: Dropout, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Dropout factors for image tokens `tokens` [C]: [B, H, F, C, A], 0 or 1 / (1 - rate)."""
    draw = lambda i: jax.random.bernoulli(jax.random.fold_in(dropout.key, i), 1 - dropout.rate, shape)
    return jnp.moveaxis(jax.vmap(draw)(tokens), 0, 3) / (1 - dropout.rate)


def materialized(
    q: jax.Array,
    image: KeysValues,
    audio: KeysValues,
    scale: float,
    pair: str = "sum",
    dropout: Dropout | None = None,
    return_weights: bool = False,
):
    """Output [B, F, H, V] from all pairs in memory; with `return_weights` also [B, H, F, I, A]."""
    keys, values = (PAIRS[pair](i[:, :, None], a[:, None]) for i, a in zip(image, audio, strict=True))
    b, i, a, h, _ = keys.shape
    logits = at_least_float32(jnp.einsum("bfhk,biahk->bhfia", q * scale, keys))
    weights = softmax(logits.reshape(b, h, -1, i * a)).reshape(logits.shape)
    used = weights
    if dropout is not None:
        used = weights * _keep_scale(dropout, jnp.arange(i), (b, h, q.shape[1], a))
    out = jnp.einsum("bhfia,biahv->bfhv", used.astype(values.dtype), values)
    return (out, weights) if return_weights else out


def chunked(
    q: jax.Array,
    image: KeysValues,
    audio: KeysValues,
    scale: float,
    pair: str = "sum",
    dropout: Dropout | None = None,
    return_weights: bool = False,
    chunk: int = 16,
):
    """As `materialized`, holding the pairs of `chunk` image tokens at a time (also in the backward pass)."""
    b, tokens, h, _ = image.keys.shape
    f, a, width = q.shape[1], audio.keys.shape[1], audio.values.shape[-1]
    chunks = -(-tokens // chunk)
    pad = [(0, 0), (0, chunks * chunk - tokens), (0, 0), (0, 0)]
    split = lambda x: jnp.moveaxis(jnp.pad(x, pad).reshape(b, chunks, chunk, h, -1), 1, 0)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q * scale

    @jax.checkpoint
    def read(carry, part):
        highest, total, out = carry
        index, keys, values = part
        ids = index * chunk + jnp.arange(chunk)
        logits = jnp.einsum("bfhk,bcahk->bhfca", q, PAIRS[pair](keys[:, :, None], audio.keys[:, None])).astype(dtype)
        logits = jnp.where((ids < tokens)[:, None], logits, -jnp.inf)
        new_highest = jnp.maximum(highest, logits.max((-2, -1)))
        decay = jnp.exp(highest - new_highest)
        weights = jnp.exp(logits - new_highest[..., None, None])
        total = total * decay + weights.sum((-2, -1))
        if dropout is not None:
            weights = weights * _keep_scale(dropout, ids, (b, h, f, a))
        pairs = PAIRS[pair](values[:, :, None], audio.values[:, None])
        out = out * decay[..., None] + jnp.einsum("bhfca,bcahv->bhfv", weights.astype(pairs.dtype), pairs)
        return (new_highest, total, out), logits if return_weights else None

    start = (jnp.full((b, h, f), -jnp.inf, dtype), jnp.zeros((b, h, f), dtype), jnp.zeros((b, h, f, width), dtype))
    parts = (jnp.arange(chunks), split(image.keys), split(image.values))
    (highest, total, out), logits = jax.lax.scan(read, start, parts)
    out = jnp.moveaxis(out / total[..., None], 1, 2).astype(audio.values.dtype)
    if not return_weights:
        return out
    logits = jnp.moveaxis(logits, 0, 3).reshape(b, h, f, chunks * chunk, a)[:, :, :, :tokens]
    return out, jnp.exp(logits - highest[..., None, None]) / total[..., None, None]


IMPLEMENTATIONS = {"separable": separable, "chunked": chunked, "materialized": materialized}


class TokenAttention(nnx.Module):
    """Fusion tokens read [image ; audio] with one key and one value weight for both streams."""

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        inner = config.inner_width(width)
        self.query = Linear(width, inner, axes=TO_HEADS, rngs=rngs)
        self.key = Linear(image_width, inner, fan_out=2 * inner, axes=TO_HEADS, rngs=rngs)
        self.value = Linear(image_width, inner, fan_out=2 * inner, axes=TO_HEADS, rngs=rngs)
        self.out = Linear(inner, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = config.heads
        self.scale = (inner / config.heads) ** -0.5

    def __call__(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        read = jnp.concatenate([image, audio], axis=1)
        q, k, v = (split_heads(y, self.heads) for y in (self.query(fusion), self.key(read), self.value(read)))
        return self.out(merge_heads(attend(q, k, v, self.scale)))

    def image_weights(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        """[B, F, I]; what is left to 1 is the sound's."""
        read = jnp.concatenate([image, audio], axis=1)
        q, k = (split_heads(y, self.heads) for y in (self.query(fusion), self.key(read)))
        return attention_weights(q, k, self.scale).mean(1)[..., : image.shape[1]]


class PairRead(nnx.Module):
    """Queries over all pairs of two sets of tokens. Key and value weights are kept as their image and audio halves.

    The bias of a pair belongs to the image half ('product' pairs have one on each half). The scale is
    (width / heads)^-1/2 whatever the inner width, as in the published system.
    """

    def __init__(self, widths: tuple[int, int, int], value_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        width, image_width, audio_width = widths
        inner = config.inner_width(width)
        self.pair = "product" if config.kind == "bilinear" else "sum"
        both = self.pair == "product"
        self.query = Linear(width, inner, axes=TO_HEADS, rngs=rngs)
        # The published weight leads from the concatenated pair, so its fan-in counts both widths.
        image, audio = dict(axes=TO_HEADS, rngs=rngs), dict(axes=TO_HEADS, bias=both, rngs=rngs)
        self.key_image = Linear(image_width, inner, fan_out=inner + audio_width, **image)
        self.key_audio = Linear(audio_width, inner, fan_out=inner + image_width, **audio)
        self.value_image = Linear(image_width, value_width, fan_out=value_width + audio_width, **image)
        self.value_audio = Linear(audio_width, value_width, fan_out=value_width + image_width, **audio)
        self.out = Linear(value_width, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = config.heads
        self.scale = (width / config.heads) ** -0.5
        self.implementation = config.pair_attention

    def read(self, fusion: jax.Array, image: jax.Array, audio: jax.Array, implementation: str, **options):
        """Pair attention before the projection; `options` go to the implementation (dropout, return_weights)."""
        q, ki, vi, ka, va = (
            split_heads(y, self.heads)
            for y in (
                self.query(fusion),
                self.key_image(image),
                self.value_image(image),
                self.key_audio(audio),
                self.value_audio(audio),
            )
        )
        return IMPLEMENTATIONS[implementation](
            q, KeysValues(ki, vi), KeysValues(ka, va), self.scale, self.pair, **options
        )

    def __call__(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        return self.out(merge_heads(self.read(fusion, image, audio, self.implementation)))

    def image_weights(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        """[B, F, I]. With sums the softmax over pairs is a product: that over images alone is its sum over sounds."""
        if self.pair == "sum":
            q, k = (split_heads(y, self.heads) for y in (self.query(fusion), self.key_image(image)))
            return attention_weights(q, k, self.scale).mean(1)
        _, weights = self.read(fusion, image, audio, "chunked", return_weights=True)
        return weights.sum(-1).mean(1)


class PairAttention(PairRead):
    """`dense` and `bilinear`: fusion tokens read all pairs of image and audio tokens, values at the inner width."""

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        super().__init__((width, image_width, audio_width), config.inner_width(width), config, rngs=rngs)


class FactorizedAttention(nnx.Module):
    """Aggregation tokens read their stream; fusion tokens read all pairs of aggregated tokens; [f ; v ; a] again."""

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        self.aggregate_image = Attention(width, config.heads, context_width=image_width, fused=2, rngs=rngs)
        self.aggregate_audio = Attention(width, config.heads, context_width=audio_width, fused=2, rngs=rngs)
        self.pairs = PairRead((width, width, width), width, config, rngs=rngs)
        self.tokens = config.tokens

    def __call__(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        f, v = self.tokens[0], self.tokens[0] + self.tokens[1]
        image = self.aggregate_image(fusion[:, f:v], image)
        audio = self.aggregate_audio(fusion[:, v:], audio)
        return jnp.concatenate([self.pairs(fusion[:, :f], image, audio), image, audio], axis=1)

    def image_weights(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        """[B, F, I] of fusion tokens, through the aggregation tokens whose pairs they read, and of these themselves."""
        f, v = self.tokens[0], self.tokens[0] + self.tokens[1]
        read = self.aggregate_image.weights(fusion[:, f:v], image).mean(1)
        aggregated = self.aggregate_image(fusion[:, f:v], image), self.aggregate_audio(fusion[:, v:], audio)
        pairs = self.pairs.image_weights(fusion[:, :f], *aggregated)
        return jnp.concatenate([jnp.einsum("bfv,bvi->bfi", pairs, read), read], axis=1)


ATTENTIONS = {
    "token": TokenAttention,
    "dense": PairAttention,
    "bilinear": PairAttention,
    "factorized": FactorizedAttention,
}


class FusionBlock(nnx.Module):
    """fusion [B, F, D], image [B, I, Di], audio [B, A, Da] → fusion [B, F, D].

    The residual starts from the *normalised* fusion tokens, as in the published system.
    """

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        self.norm_fusion = LayerNorm(width, eps=1e-5)
        self.norm_image = LayerNorm(image_width, eps=1e-5)
        self.norm_audio = LayerNorm(audio_width, eps=1e-5)
        self.attention = ATTENTIONS[config.kind](width, image_width, audio_width, config, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, config.mlp_ratio, rngs=rngs)

    def __call__(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        fusion = self.norm_fusion(fusion)
        fusion = fusion + self.attention(fusion, self.norm_image(image), self.norm_audio(audio))
        return fusion + self.mlp(self.norm2(fusion))

    def image_weights(self, fusion: jax.Array, image: jax.Array, audio: jax.Array) -> jax.Array:
        """How strongly the tokens that read the image attend to each of its tokens: [B, F, I], at least float32."""
        return self.attention.image_weights(self.norm_fusion(fusion), self.norm_image(image), self.norm_audio(audio))
