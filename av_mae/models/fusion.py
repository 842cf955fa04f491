"""Fusion blocks: fusion tokens read the image and audio tokens of a layer (paper section 3.2).

The method `image_weights` of a block and of each attention says how strongly tokens attend to each image token. The
weights are averaged over heads, and summed over the audio tokens where pairs are read. Training does not use them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from av_mae.models.config import FusionConfig, require
from av_mae.models.layers import (
    FROM_HEADS,
    MERGE_HEADS,
    MLP,
    SPLIT_HEADS,
    TO_HEADS,
    Attention,
    LayerNorm,
    Linear,
    at_least_float32,
    attend,
    attention_weights,
)

# Fusion, image and audio tokens of a layer; queries of fusion tokens; what they read of all pairs, and the weights.
FusionTokens = Float[Array, "B F Df"]
ImageTokens = Float[Array, "B I Di"]
AudioTokens = Float[Array, "B A Da"]
Queries = Float[Array, "B F H K"]
Outputs = Float[Array, "B F H V"]
PairWeights = Float[Array, "B H F I A"]


class KeysValues(NamedTuple):
    """Keys and values of one stream's tokens."""

    keys: Float[Array, "B N H K"]
    values: Float[Array, "B N H V"]


class Dropout(NamedTuple):
    """Rate and random key of attention dropout. The draw for an image token depends on its index, not on chunks."""

    rate: float
    key: Array


PairFunction = Callable[[Array, Array], Array]
PAIRS: dict[str, PairFunction] = {"sum": jnp.add, "product": jnp.multiply}


def separable(q: Queries, image: KeysValues, audio: KeysValues, scale: float, pair: str = "sum") -> Outputs:
    """Attention over all pairs of summed keys and values, computed without the pairs, in O(I + A).

    The logits of the pair (i, j) are s_i + t_j. So the softmax over pairs is softmax_i(s) · softmax_j(t), and the
    output is the sum of one attention over the image tokens and one over the audio tokens.

    Raises:
      UserError: `pair` is not 'sum'.
    """
    require(pair == "sum", f"separable pair attention needs pair='sum', got {pair!r}")
    return attend(q, *image, scale) + attend(q, *audio, scale)


def _keep_scale(dropout: Dropout, tokens: Int[Array, " I"], shape: tuple[int, ...]) -> PairWeights:
    """Dropout factors, 0 or 1 / (1 - rate), for image tokens of these indices; `shape` is (B, H, F, A)."""

    def draw(token: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(dropout.key, token), 1 - dropout.rate, shape)

    return jnp.moveaxis(jax.vmap(draw)(tokens), 0, 3) / (1 - dropout.rate)


def materialized(
    q: Queries,
    image: KeysValues,
    audio: KeysValues,
    scale: float,
    pair: str = "sum",
    dropout: Dropout | None = None,
    return_weights: bool = False,
) -> Outputs | tuple[Outputs, PairWeights]:
    """Attention over all pairs, which are put into memory: O(I · A). The reference for the other implementations.

    Args:
      q: queries.
      image: keys and values of the image tokens.
      audio: keys and values of the audio tokens.
      scale: what the products of queries and keys are multiplied by.
      pair: how keys and values of a pair are made of those of its tokens (see `PAIRS`).
      dropout: of the weights.
      return_weights: whether the weights of the pairs, before dropout, are returned too.
    """
    keys, values = (PAIRS[pair](i[:, :, None], a[:, None]) for i, a in zip(image, audio, strict=True))
    b, i, a, h, _ = keys.shape
    logits = at_least_float32(jnp.einsum("bfhk,biahk->bhfia", q * scale, keys))
    weights = jax.nn.softmax(logits.reshape(b, h, -1, i * a), axis=-1).reshape(logits.shape)
    used = weights
    if dropout is not None:
        used = weights * _keep_scale(dropout, jnp.arange(i), (b, h, q.shape[1], a))
    out = jnp.einsum("bhfia,biahv->bfhv", used.astype(values.dtype), values)
    return (out, weights) if return_weights else out


def chunked(
    q: Queries,
    image: KeysValues,
    audio: KeysValues,
    scale: float,
    pair: str = "sum",
    dropout: Dropout | None = None,
    return_weights: bool = False,
    chunk: int = 16,
) -> Outputs | tuple[Outputs, PairWeights]:
    """As `materialized`, with the pairs of `chunk` image tokens in memory at a time, also in the backward pass."""
    # an online softmax: highest logit, sum of weights and output so far are corrected with every chunk
    b, tokens, h, _ = image.keys.shape
    f, a, width = q.shape[1], audio.keys.shape[1], audio.values.shape[-1]
    chunks = -(-tokens // chunk)
    pad = [(0, 0), (0, chunks * chunk - tokens), (0, 0), (0, 0)]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q * scale

    def split(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, pad).reshape(b, chunks, chunk, h, -1), 1, 0)

    @jax.checkpoint
    def read(
        carry: tuple[Array, Array, Array], part: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], Array | None]:
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


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "separable": separable,
    "chunked": chunked,
    "materialized": materialized,
}


class TokenAttention(nnx.Module):
    """`token`: fusion tokens read [image ; audio] with one key and one value weight for both streams.

    Args:
      width: of the fusion tokens.
      image_width: of the image tokens.
      audio_width: of the audio tokens, the same as that of the image tokens.
      config: of the fusion.
      rngs: random keys for the weights.
    """

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        inner = config.inner_width(width)
        self.query = Linear(width, inner, axes=TO_HEADS, rngs=rngs)
        self.key = Linear(image_width, inner, fan_out=2 * inner, axes=TO_HEADS, rngs=rngs)
        self.value = Linear(image_width, inner, fan_out=2 * inner, axes=TO_HEADS, rngs=rngs)
        self.out = Linear(inner, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = config.heads
        self.scale = (inner / config.heads) ** -0.5

    def __call__(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> FusionTokens:
        read = jnp.concatenate([image, audio], axis=1)
        q, k, v = (
            rearrange(y, SPLIT_HEADS, h=self.heads) for y in (self.query(fusion), self.key(read), self.value(read))
        )
        return self.out(rearrange(attend(q, k, v, self.scale), MERGE_HEADS))

    def image_weights(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> Float[Array, "B F I"]:
        """How strongly tokens attend to each image token; the rest, up to 1, is the weight of the audio tokens."""
        read = jnp.concatenate([image, audio], axis=1)
        q, k = (rearrange(y, SPLIT_HEADS, h=self.heads) for y in (self.query(fusion), self.key(read)))
        return attention_weights(q, k, self.scale).mean(1)[..., : image.shape[1]]


class PairAttention(nnx.Module):
    """`dense` and `bilinear`: fusion tokens read all pairs of image and audio tokens.

    Key and value weights are kept as their image and audio halves. The bias of a pair belongs to the image half; the
    products of 'bilinear' have a bias on both halves. The scale is (width / heads)^-1/2 whatever the inner width, as in
    DeepAVFusion.

    Args:
      width: of the fusion tokens.
      image_width: of the image tokens.
      audio_width: of the audio tokens.
      config: of the fusion.
      value_width: width of the values of all heads; by default the inner width, as that of queries and keys.
      rngs: random keys for the weights.
    """

    def __init__(
        self,
        width: int,
        image_width: int,
        audio_width: int,
        config: FusionConfig,
        *,
        value_width: int | None = None,
        rngs: nnx.Rngs,
    ):
        inner = config.inner_width(width)
        values = value_width or inner
        self.pair = "product" if config.kind == "bilinear" else "sum"

        def half(inputs: int, outputs: int, other: int, bias: bool) -> Linear:
            # DeepAVFusion's weight leads from the concatenated pair, so its fan-in counts the other width too
            return Linear(inputs, outputs, bias=bias, fan_out=outputs + other, axes=TO_HEADS, rngs=rngs)

        both = self.pair == "product"
        self.query = Linear(width, inner, axes=TO_HEADS, rngs=rngs)
        self.key_image = half(image_width, inner, audio_width, True)
        self.key_audio = half(audio_width, inner, image_width, both)
        self.value_image = half(image_width, values, audio_width, True)
        self.value_audio = half(audio_width, values, image_width, both)
        self.out = Linear(values, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = config.heads
        self.scale = (width / config.heads) ** -0.5
        self.implementation = config.pair_attention

    def read(
        self,
        fusion: FusionTokens,
        image: ImageTokens,
        audio: AudioTokens,
        implementation: str,
        **options: Any,
    ) -> Any:
        """Pair attention before the projection; `options` go to the implementation (dropout, return_weights)."""
        images = self.key_image(image), self.value_image(image)
        audios = self.key_audio(audio), self.value_audio(audio)
        q, *read = (rearrange(y, SPLIT_HEADS, h=self.heads) for y in (self.query(fusion), *images, *audios))
        of_image, of_audio = KeysValues(*read[:2]), KeysValues(*read[2:])
        return IMPLEMENTATIONS[implementation](q, of_image, of_audio, self.scale, self.pair, **options)

    def __call__(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> FusionTokens:
        return self.out(rearrange(self.read(fusion, image, audio, self.implementation), MERGE_HEADS))

    def image_weights(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> Float[Array, "B F I"]:
        """How strongly tokens attend to each image token, summed over the audio tokens of its pairs."""
        if self.pair == "sum":  # the softmax over pairs is a product, whose sum over the audio is that of the image
            q, k = (rearrange(y, SPLIT_HEADS, h=self.heads) for y in (self.query(fusion), self.key_image(image)))
            return attention_weights(q, k, self.scale).mean(1)
        weights: Array = self.read(fusion, image, audio, "chunked", return_weights=True)[1]
        return weights.sum(-1).mean(1)


class FactorizedAttention(nnx.Module):
    """`factorized`: aggregation tokens read their stream, fusion tokens read all pairs of aggregated tokens.

    Args:
      width: of fusion and aggregation tokens.
      image_width: of the image tokens.
      audio_width: of the audio tokens.
      config: of the fusion, with the numbers of fusion and aggregation tokens.
      rngs: random keys for the weights.
    """

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        self.aggregate_image = Attention(width, config.heads, context_width=image_width, fused=2, rngs=rngs)
        self.aggregate_audio = Attention(width, config.heads, context_width=audio_width, fused=2, rngs=rngs)
        self.pairs = PairAttention(width, width, width, config, value_width=width, rngs=rngs)
        self.tokens = config.tokens

    def __call__(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> FusionTokens:
        """`fusion` is [fusion ; image-aggregation ; audio-aggregation], and so is the result."""
        f, v = self.tokens[0], self.tokens[0] + self.tokens[1]
        image = self.aggregate_image(fusion[:, f:v], image)
        audio = self.aggregate_audio(fusion[:, v:], audio)
        return jnp.concatenate([self.pairs(fusion[:, :f], image, audio), image, audio], axis=1)

    def image_weights(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> Float[Array, "B _ I"]:
        """Of fusion tokens, through the aggregation tokens whose pairs they read, and of image-aggregation tokens."""
        f, v = self.tokens[0], self.tokens[0] + self.tokens[1]
        read = self.aggregate_image.weights(fusion[:, f:v], image).mean(1)
        aggregated = self.aggregate_image(fusion[:, f:v], image), self.aggregate_audio(fusion[:, v:], audio)
        pairs = self.pairs.image_weights(fusion[:, :f], *aggregated)
        return jnp.concatenate([jnp.einsum("bfv,bvi->bfi", pairs, read), read], axis=1)


ATTENTIONS: dict[str, type[TokenAttention] | type[PairAttention] | type[FactorizedAttention]] = {
    "token": TokenAttention,
    "dense": PairAttention,
    "bilinear": PairAttention,
    "factorized": FactorizedAttention,
}


class FusionBlock(nnx.Module):
    """Fusion tokens read image and audio tokens, then go through an MLP.

    The residual starts from the *normalised* fusion tokens, as in DeepAVFusion.

    Args:
      width: of the fusion tokens.
      image_width: of the image tokens.
      audio_width: of the audio tokens.
      config: of the fusion.
      rngs: random keys for the weights.
    """

    def __init__(self, width: int, image_width: int, audio_width: int, config: FusionConfig, *, rngs: nnx.Rngs):
        self.norm_fusion = LayerNorm(width, eps=1e-5)
        self.norm_image = LayerNorm(image_width, eps=1e-5)
        self.norm_audio = LayerNorm(audio_width, eps=1e-5)
        self.attention = ATTENTIONS[config.kind](width, image_width, audio_width, config, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, config.mlp_ratio, rngs=rngs)

    def __call__(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> FusionTokens:
        fusion = self.norm_fusion(fusion)
        fusion = fusion + self.attention(fusion, self.norm_image(image), self.norm_audio(audio))
        return fusion + self.mlp(self.norm2(fusion))

    def image_weights(self, fusion: FusionTokens, image: ImageTokens, audio: AudioTokens) -> Float[Array, "B _ I"]:
        """How strongly the tokens that read the image attend to each of its tokens, in at least float32."""
        return self.attention.image_weights(self.norm_fusion(fusion), self.norm_image(image), self.norm_audio(audio))
