"""Fusion blocks: fusion tokens read the image and audio tokens of a layer (paper section 3.2).

`image_weights` of a block and of its attention tell how strongly tokens attend to each image token, averaged over
heads and summed over the sound's tokens where pairs are read. Nothing of it is computed in training.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae.models.config import FusionConfig
from av_mae.models.layers import (FROM_HEADS, MLP, TO_HEADS, Attention, LayerNorm, Linear, attend, attention_weights,
                                  merge_heads, split_heads)
from av_mae.models.pair_attention import IMPLEMENTATIONS, KeysValues


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
        return attention_weights(q, k, self.scale).mean(1)[..., :image.shape[1]]


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
        q, ki, vi, ka, va = (split_heads(y, self.heads) for y in (
            self.query(fusion), self.key_image(image), self.value_image(image),
            self.key_audio(audio), self.value_audio(audio)))
        return IMPLEMENTATIONS[implementation](
            q, KeysValues(ki, vi), KeysValues(ka, va), self.scale, self.pair, **options)

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


ATTENTIONS = {"token": TokenAttention, "dense": PairAttention, "bilinear": PairAttention,
              "factorized": FactorizedAttention}


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
