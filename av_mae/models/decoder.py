"""Decoders: from visible tokens and fusion tokens to the values of patches (paper section 3.3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae.models.config import DecoderConfig, StreamConfig
from av_mae.models.layers import Block, Initial, LayerNorm, Linear
from av_mae.models.patches import take
from av_mae.models.stack import in_turn
from av_mae.models.swin import SwinBlock


def complement(keep: jax.Array, tokens: int) -> jax.Array:
    """Ids [B, N - K] in ascending order that are not in keep [B, K]."""
    rows = jnp.arange(keep.shape[0])[:, None]
    removed = jnp.ones((keep.shape[0], tokens), jnp.int32).at[rows, keep].set(0)
    return jnp.argsort(-removed, axis=1, stable=True)[:, : tokens - keep.shape[1]].astype(jnp.int32)


class Decoder(nnx.Module):
    """decoder(tokens [B, K, D], fusion [B, F, Df], keep [B, K], positions=None) → predictions [B, N, P].

    `keep` names the patches that the tokens stand for (None: all N in order). With `positions`, which must be the
    patches that are not kept, the predictions are [B, M, P] and the last block computes queries and MLP there only
    (a Swin block its MLP only, since its windows need all queries). `fusion_width` None: no fusion tokens (F = 0).
    """

    def __init__(self, config: DecoderConfig, stream: StreamConfig, fusion_width: int | None, *, rngs: nnx.Rngs):
        width = config.width
        self.embed = Linear(stream.width, width, rngs=rngs)
        same = fusion_width in (None, stream.width)
        self.fusion_embed = None if same else Linear(fusion_width, width, rngs=rngs)
        self.mask_token = Initial("normal", (1, 1, width), 0.02).parameter(rngs)
        self.positions = Initial("positions", (1, stream.tokens, width), grid=stream.grid).parameter()
        sizes = (width, config.heads, config.mlp_ratio)
        if config.kind == "swin":
            blocks = [SwinBlock(*sizes, grid=stream.grid, window=config.window, shifted=number % 2 == 1, rngs=rngs)
                      for number in range(config.depth)]
        else:
            blocks = [Block(*sizes, eps=1e-5, rngs=rngs) for _ in range(config.depth)]
        self.blocks = nnx.List(blocks)
        self.norm = LayerNorm(width, eps=1e-5)
        self.predict = Linear(width, stream.patch_values, rngs=rngs)
        self.kind = config.kind
        self.tokens = stream.tokens
        self.run = in_turn

    def __call__(self, tokens: jax.Array, fusion: jax.Array, keep: jax.Array | None = None,
                 positions: jax.Array | None = None) -> jax.Array:
        visible = self.embed(tokens)
        if fusion.shape[1]:
            fusion = (self.fusion_embed or self.embed)(fusion)
        else:
            fusion = visible[:, :0]
        if keep is None:
            keep = jnp.broadcast_to(jnp.arange(self.tokens, dtype=jnp.int32), visible.shape[:2])
        removed = complement(keep, self.tokens) if positions is None else positions
        visible = visible + self.positions[...][0][keep]
        hidden = self.mask_token[...] + self.positions[...][0][removed]
        blocks = self.swin_blocks if self.kind == "swin" else self.plain_blocks
        everywhere = positions is None
        x = blocks(fusion, visible, hidden, jnp.concatenate([keep, removed], axis=1), everywhere)
        return self.predict(self.norm(x))

    def plain_blocks(self, fusion, visible, hidden, order, everywhere: bool) -> jax.Array:
        """Attention does not mind the order of tokens, so they stay as [fusion ; visible ; hidden]."""
        *blocks, last = self.blocks
        x = jnp.concatenate([fusion, visible, hidden], axis=1)
        x, _ = self.run(lambda block, x, _: (block(x), None), blocks, x, [None] * len(blocks))
        read = fusion.shape[1] + (0 if everywhere else visible.shape[1])
        x, _ = self.run(lambda block, x, _: (block(*x), None), [last], (x[:, read:], x[:, :read]), [None])
        return take(x, jnp.argsort(order, axis=1)) if everywhere else x

    def swin_blocks(self, fusion, visible, hidden, order, everywhere: bool) -> jax.Array:
        """Windows need the grid: tokens go back to their places first."""
        *blocks, last = self.blocks
        x = take(jnp.concatenate([visible, hidden], axis=1), jnp.argsort(order, axis=1)), fusion
        x, _ = self.run(lambda block, x, _: (block(*x), None), blocks, x, [None] * len(blocks))
        positions = None if everywhere else order[:, visible.shape[1]:]
        return self.run(lambda block, x, _: (block(*x, positions), None), [last], x, [None])[0][0]
