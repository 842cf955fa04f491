"""The whole model: mask, encode with early fusion, decode, compare (paper section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from av_mae.models.config import AVMAEConfig, DecoderConfig, StreamConfig, fit_window, require
from av_mae.models.encoder import Encoder, in_turn
from av_mae.models.layers import MLP, Attention, Block, Initial, LayerNorm, Linear
from av_mae.models.patches import Mask, mask_noise, masked_error, random_mask, take, targets


def relative_position_index(window: tuple[int, int]) -> np.ndarray:
    """int [N, N] for the N places of a window: (dy + rows - 1) · (2 columns - 1) + (dx + columns - 1)."""
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 2)
    dy, dx = np.moveaxis(places[:, None] - places[None], -1, 0)
    return (dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """float32 [windows, N, N]: -100 between places that were not neighbours before the cyclic shift, else 0."""
    bands = [
        np.digitize(np.arange(n), [n - w, n - s]) if s else np.zeros(n, int)
        for n, w, s in zip(grid, window, shift, strict=True)
    ]
    region = bands[0][:, None] * 3 + bands[1][None]
    region = rearrange(region, "(a h) (b w) -> (a b) (h w)", h=window[0], w=window[1])
    return np.where(region[:, :, None] != region[:, None, :], -100.0, 0.0).astype(np.float32)


class SwinBlock(nnx.Module):
    """block(x [B, N, D], fusion [B, F, D], positions=None) → (x, fusion).

    Fusion tokens join every window with the same norm, projections and MLP as the patches, without relative bias
    and shift mask; their attention outputs are averaged over windows. With `positions` [B, M] only those patches
    are carried through the MLP and returned. A grid no larger than the window on its shorter side is one window of
    that side, unshifted.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        grid: tuple[int, int],
        window: tuple[int, int],
        shifted: bool,
        rngs: nnx.Rngs,
    ):
        fits = any(g <= w for g, w in zip(grid, window, strict=True))
        self.window = fit_window(grid, window)
        shift = (0, 0) if fits or not shifted else (self.window[0] // 2, self.window[1] // 2)
        self.norm1 = LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, rngs=rngs)
        biases = ((2 * self.window[0] - 1) * (2 * self.window[1] - 1), heads)
        self.relative_bias = Initial("normal", biases, 0.02).parameter(rngs)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, mlp_ratio, rngs=rngs)
        self.grid, self.shift = grid, shift

    def __call__(self, x: jax.Array, fusion: jax.Array, positions: jax.Array | None = None):
        y, f = self.norm1(x), self.norm1(fusion)
        y, f = self.attend_windows(y, f)
        if positions is not None:
            x, y = take(x, positions), take(y, positions)
        x, fusion = x + y, fusion + f
        return x + self.mlp(self.norm2(x)), fusion + self.mlp(self.norm2(fusion))

    def attend_windows(self, x: jax.Array, fusion: jax.Array):
        """Normed patches [B, N, D] and fusion tokens [B, F, D] → their attention outputs, fusion averaged."""
        (rows, columns), (height, width), fusions = self.grid, self.window, fusion.shape[1]
        windows = (rows // height) * (columns // width)
        x = rearrange(x, "b (r c) d -> b r c d", r=rows)
        x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = rearrange(x, "b (a h) (e w) d -> (b a e) (h w) d", h=height, w=width)
        y = jnp.concatenate([jnp.repeat(fusion, windows, axis=0), x], axis=1)
        y = self.attention(y, bias=self.bias(fusions, y.shape[0] // windows))
        fusion = rearrange(y[:, :fusions], "(b n) f d -> b n f d", n=windows).mean(1)
        x = rearrange(
            y[:, fusions:], "(b a e) (h w) d -> b (a h) (e w) d", a=rows // height, e=columns // width, h=height
        )
        x = jnp.roll(x, self.shift, (1, 2))
        return rearrange(x, "b r c d -> b (r c) d"), fusion

    def bias(self, fusions: int, batch: int) -> jax.Array:
        """Relative bias and shift mask among patches, 0 wherever a fusion token is part: [B · windows, H, N, N]."""
        bias = jnp.moveaxis(self.relative_bias[...][relative_position_index(self.window)], -1, 0)[None]
        if any(self.shift):
            mask = jnp.asarray(shift_mask(self.grid, self.window, self.shift))[:, None]
            bias = jnp.tile(bias + mask.astype(bias.dtype), (batch, 1, 1, 1))
        return jnp.pad(bias, [(0, 0), (0, 0), (fusions, 0), (fusions, 0)])


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
            blocks = [
                SwinBlock(*sizes, grid=stream.grid, window=config.window, shifted=number % 2 == 1, rngs=rngs)
                for number in range(config.depth)
            ]
        else:
            blocks = [Block(*sizes, eps=1e-5, rngs=rngs) for _ in range(config.depth)]
        self.blocks = nnx.List(blocks)
        self.norm = LayerNorm(width, eps=1e-5)
        self.predict = Linear(width, stream.patch_values, rngs=rngs)
        self.kind = config.kind
        self.tokens = stream.tokens
        self.run = in_turn

    def __call__(
        self, tokens: jax.Array, fusion: jax.Array, keep: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
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
        positions = None if everywhere else order[:, visible.shape[1] :]
        return self.run(lambda block, x, _: (block(*x, positions), None), [last], x, [None])[0][0]


class Output(NamedTuple):
    """Losses are scalars; predictions [B, N, P]; masks [B, N], 1 where a patch was removed."""

    image_loss: jax.Array
    audio_loss: jax.Array
    image_prediction: jax.Array
    audio_prediction: jax.Array
    image_mask: jax.Array
    audio_mask: jax.Array


class AVMAE(nnx.Module):
    """Audio-visual masked autoencoder with early fusion.

    Images are normalised float [B, H, W, 3], log-mels [B, mels, frames] or [B, mels, frames, 1]. Noise [B, N] decides
    what is masked (least noise is kept); without it `rng` draws it.
    """

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        fusion_width = None if config.fusion.kind == "none" else config.fusion_width
        self.image_decoder = Decoder(config.decoder, config.image, fusion_width, rngs=rngs)
        self.audio_decoder = Decoder(config.decoder, config.audio, fusion_width, rngs=rngs)

    def masks(
        self, batch: int, image_noise: jax.Array | None, audio_noise: jax.Array | None, rng: jax.Array | None = None
    ) -> tuple[Mask, Mask]:
        """Masks of both streams from the given noise, or from `rng` where there is none."""
        streams, noises = (self.config.image, self.config.audio), (image_noise, audio_noise)
        require(rng is not None or all(n is not None for n in noises), "masking needs `rng` or noise for both streams")
        keys = (None, None) if rng is None else jax.random.split(rng)
        noises = (
            mask_noise(key, batch, stream.tokens) if noise is None else noise
            for key, stream, noise in zip(keys, streams, noises, strict=True)
        )
        return tuple(random_mask(noise, stream.keep) for noise, stream in zip(noises, streams, strict=True))

    def losses(
        self,
        image: jax.Array,
        audio: jax.Array,
        image_noise: jax.Array | None = None,
        audio_noise: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Image and audio loss of each clip, [B] each: what training uses, predicting at masked patches only."""
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        tokens = self.encoder(image, audio, image_mask.keep, audio_mask.keep)
        image_prediction = self.image_decoder(tokens.image, tokens.fusion, *image_mask[:2])
        audio_prediction = self.audio_decoder(tokens.audio, tokens.fusion, *audio_mask[:2])
        image_target = take(targets(image, self.config.image), image_mask.removed)
        audio_target = take(targets(audio, self.config.audio), audio_mask.removed)
        return masked_error(image_prediction, image_target), masked_error(audio_prediction, audio_target)

    def __call__(
        self,
        image: jax.Array,
        audio: jax.Array,
        image_noise: jax.Array | None = None,
        audio_noise: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> Output:
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        tokens = self.encoder(image, audio, image_mask.keep, audio_mask.keep)
        image_prediction = self.image_decoder(tokens.image, tokens.fusion, image_mask.keep)
        audio_prediction = self.audio_decoder(tokens.audio, tokens.fusion, audio_mask.keep)
        streams = (
            (image, image_prediction, image_mask, self.config.image),
            (audio, audio_prediction, audio_mask, self.config.audio),
        )
        image_loss, audio_loss = (
            masked_error(take(prediction, mask.removed), take(targets(x, config), mask.removed)).mean()
            for x, prediction, mask, config in streams
        )
        return Output(image_loss, audio_loss, image_prediction, audio_prediction, image_mask.mask, audio_mask.mask)
