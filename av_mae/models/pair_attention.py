"""Attention of fusion tokens over all pairs (image token i, audio token j), in three implementations.

A pair's key is k_i + k_j ('sum': what a linear map of the concatenated pair gives) or k_i ∘ k_j ('product', the
bilinear interaction), and so is its value. With sums the softmax over pairs is the product of two softmaxes, so
`separable` costs O(I + A); `chunked` walks over chunks of image tokens with an online softmax and holds O(I + A)
numbers for either; `materialized` builds all I · A pairs and is the reference. The last two can drop attention
weights and return them.

Shapes: q [B, F, H, K]; image and audio are (keys [B, I, H, K], values [B, I, H, V]) and the same with A.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from av_mae.models.config import require
from av_mae.models.layers import at_least_float32, attend, softmax


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


def materialized(q: jax.Array, image: KeysValues, audio: KeysValues, scale: float, pair: str = "sum",
                 dropout: Dropout | None = None, return_weights: bool = False):
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


def chunked(q: jax.Array, image: KeysValues, audio: KeysValues, scale: float, pair: str = "sum",
            dropout: Dropout | None = None, return_weights: bool = False, chunk: int = 16):
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
