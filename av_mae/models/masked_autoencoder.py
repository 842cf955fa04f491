"""The masked autoencoder: mask, encode with early fusion, decode, compare (paper section 3)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from av_mae.errors import UserError
from av_mae.models.config import AVMAEConfig, DecoderConfig, StreamConfig, fit_window
from av_mae.models.encoder import Encoder, Mask, in_turn, mask_noise, patchify, random_mask, take, with_channel
from av_mae.models.layers import MLP, Attention, Block, Initial, LayerNorm, Linear, at_least_float32


def targets(x: Float[Array, "B ..."], config: StreamConfig) -> Float[Array, "B N P"]:
    """What the decoder predicts: the patches of the inputs, in at least float32.

    Where the stream says so, each patch is normalised with its mean and its unbiased variance + 1e-6.
    """
    patches = at_least_float32(patchify(with_channel(x, config), config.patch_size))
    if not config.normalize_targets:
        return patches
    mean = patches.mean(-1, keepdims=True)
    return (patches - mean) / jnp.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)


def masked_error(prediction: Float[Array, "B M P"], target: Float[Array, "B M P"]) -> Float[Array, " B"]:
    """Mean squared error of each clip over its masked patches and their values, in at least float32."""
    return jnp.square(at_least_float32(prediction) - at_least_float32(target)).mean((1, 2))


def relative_position_index(window: tuple[int, int]) -> Int[np.ndarray, "N N"]:
    """For each two positions of a window, (dy + rows - 1) · (2 columns - 1) + (dx + columns - 1)."""
    positions = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 2)
    dy, dx = np.moveaxis(positions[:, None] - positions[None], -1, 0)
    index: np.ndarray = (dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1
    return index


def shift_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Float[np.ndarray, "windows N N"]:
    """Bias of a shifted window's attention: -100 between positions that were not neighbours before the cyclic shift.

    Args:
      grid: patches as (rows, columns).
      window: patches of a window as (rows, columns).
      shift: cyclic shift of the grid as (rows, columns).

    Returns:
      float32, 0 between neighbours.
    """
    bands = [
        np.digitize(np.arange(n), [n - w, n - s]) if s else np.zeros(n, int)
        for n, w, s in zip(grid, window, shift, strict=True)
    ]
    region = bands[0][:, None] * 3 + bands[1][None]
    region = rearrange(region, "(a h) (b w) -> (a b) (h w)", h=window[0], w=window[1])
    return np.where(region[:, :, None] != region[:, None, :], -100.0, 0.0).astype(np.float32)


class SwinBlock(nnx.Module):
    """Swin transformer block on a grid of patches, with fusion tokens in every window.

    Fusion tokens have the same norm, projections and MLP as the patches, without relative bias and shift mask. Their
    attention outputs are averaged over the windows. A grid no larger than the window on its shorter side has windows
    of that side, unshifted.

    Args:
      width: of the tokens, D.
      heads: attention heads.
      mlp_ratio: hidden width of the MLP in multiples of the width.
      grid: patches as (rows, columns).
      window: patches of a window as (rows, columns).
      shifted: whether the windows are shifted by half a window.
      rngs: random keys for the weights.

    Raises:
      UserError: the window does not divide the grid.
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

    def __call__(
        self, x: Float[Array, "B N D"], fusion: Float[Array, "B F D"], predicted: Int[Array, "B M"] | None = None
    ) -> tuple[Float[Array, "B _ D"], Float[Array, "B F D"]]:
        """Updates patches and fusion tokens; with `predicted`, only the patches of these indices are returned."""
        y, f = self.attend_windows(self.norm1(x), self.norm1(fusion))
        if predicted is not None:
            x, y = take(x, predicted), take(y, predicted)
        x, fusion = x + y, fusion + f
        return x + self.mlp(self.norm2(x)), fusion + self.mlp(self.norm2(fusion))

    def attend_windows(
        self, x: Float[Array, "B N D"], fusion: Float[Array, "B F D"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B F D"]]:
        """Attention outputs of normed patches and fusion tokens, those of fusion tokens averaged over windows."""
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

    def bias(self, fusions: int, batch: int) -> Float[Array, "windows H N N"]:
        """Relative bias and shift mask among the tokens of each window, 0 wherever a fusion token is part.

        The first axis is batch × windows of shifted windows, else 1.
        """
        bias: Array = jnp.moveaxis(self.relative_bias[...][relative_position_index(self.window)], -1, 0)[None]
        if any(self.shift):
            mask = jnp.asarray(shift_mask(self.grid, self.window, self.shift))[:, None]
            bias = jnp.tile(bias + mask.astype(bias.dtype), (batch, 1, 1, 1))
        return jnp.pad(bias, [(0, 0), (0, 0), (fusions, 0), (fusions, 0)])


class Decoder(nnx.Module):
    """Predicts the patches of one stream from its visible tokens and the fusion tokens.

    Args:
      config: sizes and kind of the decoder.
      stream: the stream that it predicts.
      fusion_width: width of the encoder's fusion tokens; `None` for an encoder without them.
      rngs: random keys for the weights.
    """

    def __init__(self, config: DecoderConfig, stream: StreamConfig, fusion_width: int | None, *, rngs: nnx.Rngs):
        width = config.width
        self.embed = Linear(stream.width, width, rngs=rngs)
        same = fusion_width is None or fusion_width == stream.width
        self.fusion_embed = None if same else Linear(fusion_width or width, width, rngs=rngs)
        self.mask_token = Initial("normal", (1, 1, width), 0.02).parameter(rngs)
        self.positions = Initial("positions", (1, stream.tokens, width), grid=stream.grid).parameter()

        def block(number: int) -> Block | SwinBlock:
            if config.kind == "plain":
                return Block(width, config.heads, config.mlp_ratio, eps=1e-5, rngs=rngs)
            windows = {"grid": stream.grid, "window": config.window}
            return SwinBlock(width, config.heads, config.mlp_ratio, **windows, shifted=number % 2 == 1, rngs=rngs)

        self.blocks: nnx.List[Any] = nnx.List(block(number) for number in range(config.depth))
        self.norm = LayerNorm(width, eps=1e-5)
        self.predict = Linear(width, stream.patch_values, rngs=rngs)
        self.kind = config.kind
        self.tokens = stream.tokens
        self.run = in_turn

    def __call__(
        self,
        tokens: Float[Array, "B K D"],
        fusion: Float[Array, "B F Df"],
        keep: Int[Array, "B K"] | None = None,
        removed: Int[Array, "B M"] | None = None,
    ) -> Float[Array, "B _ P"]:
        """Predicts patches.

        Args:
          tokens: the stream's tokens from the encoder.
          fusion: fusion tokens from the encoder.
          keep: indices of the patches that the tokens stand for; `None` means all N, in order.
          removed: the other indices. If given, only these patches are predicted, and the last block computes queries
            and MLP only there (a Swin block only its MLP, since its windows need all queries).

        Returns:
          Predictions of the patches `removed`, or of all N patches.
        """
        visible = self.embed(tokens)
        fusion = (self.fusion_embed or self.embed)(fusion) if fusion.shape[1] else visible[:, :0]
        if keep is None:
            keep = jnp.broadcast_to(jnp.arange(self.tokens, dtype=jnp.int32), visible.shape[:2])
        masked = removed
        if masked is None:  # all indices that are not in `keep`, ascending
            hides = jnp.ones((len(keep), self.tokens), jnp.int32).at[jnp.arange(len(keep))[:, None], keep].set(0)
            masked = jnp.argsort(-hides, axis=1, stable=True)[:, : self.tokens - keep.shape[1]].astype(jnp.int32)
        positions = self.positions[...][0]
        visible = visible + positions[keep]
        hidden = self.mask_token[...] + positions[masked]
        *blocks, last = self.blocks
        unsort = jnp.argsort(jnp.concatenate([keep, masked], axis=1), axis=1)
        x: Any
        if self.kind == "swin":  # windows need the tokens at their positions on the grid
            x = take(jnp.concatenate([visible, hidden], axis=1), unsort), fusion
            x, _ = self.run(lambda block, x, _: (block(*x), None), blocks, x, [None] * len(blocks))
            (x, _), _ = self.run(lambda block, x, _: (block(*x, removed), None), [last], x, [None])
        else:  # attention does not depend on the order of tokens, so they stay as [fusion ; visible ; hidden]
            x = jnp.concatenate([fusion, visible, hidden], axis=1)
            x, _ = self.run(lambda block, x, _: (block(x), None), blocks, x, [None] * len(blocks))
            read = fusion.shape[1] + (0 if removed is None else visible.shape[1])
            x, _ = self.run(lambda block, x, _: (block(*x), None), [last], (x[:, read:], x[:, :read]), [None])
            x = take(x, unsort) if removed is None else x
        return self.predict(self.norm(x))


class Reconstruction(NamedTuple):
    """Predictions, and errors of each clip (see `masked_error`), of 'image' and 'audio' where they were decoded.

    Predictions are of the masked patches, in the order of the mask, or of all patches.
    """

    predictions: dict[str, Float[Array, "B _ _"]]
    errors: dict[str, Float[Array, " B"]]


class Output(NamedTuple):
    """Losses are means over the clips; predictions are of all patches; masks are 1 where a patch was removed."""

    image_loss: Float[Array, ""]
    audio_loss: Float[Array, ""]
    image_prediction: Float[Array, "B I Pi"]
    audio_prediction: Float[Array, "B A Pa"]
    image_mask: Float[Array, "B I"]
    audio_mask: Float[Array, "B A"]


class AVMAE(nnx.Module):
    """Audio-visual masked autoencoder with early fusion: `.encoder`, `.image_decoder` and `.audio_decoder`.

    All methods take normalised images [B, H, W, 3] and log-mels [B, mels, frames] or [B, mels, frames, 1].
    """

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        fusion_width = None if config.fusion.kind == "none" else config.fusion_width
        self.image_decoder = Decoder(config.decoder, config.image, fusion_width, rngs=rngs)
        self.audio_decoder = Decoder(config.decoder, config.audio, fusion_width, rngs=rngs)

    def masks(
        self,
        batch: int,
        image_noise: Float[Array, "B I"] | None,
        audio_noise: Float[Array, "B A"] | None,
        rng: Array | None = None,
    ) -> tuple[Mask, Mask]:
        """Random masks of image and audio.

        Args:
          batch: number of clips.
          image_noise: decides which image patches are removed (see `random_mask`); `None` draws it from `rng`.
          audio_noise: the same of the audio.
          rng: random key.

        Raises:
          UserError: neither noise nor `rng` is given for a stream.
        """
        keys = (None, None) if rng is None else jax.random.split(rng)

        def mask(key: Array | None, noise: Array | None, stream: StreamConfig) -> Mask:
            if noise is None:
                if key is None:
                    raise UserError("masking needs `rng` or noise for both streams")
                noise = mask_noise(key, batch, stream.tokens)
            return random_mask(noise, stream.keep)

        return mask(keys[0], image_noise, self.config.image), mask(keys[1], audio_noise, self.config.audio)

    def reconstruct(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        *,
        image_mask: Mask | None = None,
        audio_mask: Mask | None = None,
        decode: Sequence[str] = ("image", "audio"),
        everywhere: bool = False,
    ) -> Reconstruction:
        """Masks, encodes, decodes and compares with the targets.

        Args:
          image: normalised images.
          audio: log-mels.
          image_mask: which image patches are hidden; `None` leaves all visible, and there is nothing to decode.
          audio_mask: the same of the audio.
          decode: the masked streams that are decoded.
          everywhere: whether all patches are predicted, instead of the masked ones alone. Errors are those of the
            masked patches either way.
        """
        keep = [None if mask is None else mask.keep for mask in (image_mask, audio_mask)]
        tokens = self.encoder(image, audio, keep[0], keep[1])
        streams = {
            "image": (self.config.image, image, image_mask, tokens.image, self.image_decoder),
            "audio": (self.config.audio, audio, audio_mask, tokens.audio, self.audio_decoder),
        }
        found = Reconstruction({}, {})
        for name, (config, x, mask, visible, decoder) in streams.items():
            if mask is None or name not in decode:
                continue
            prediction = decoder(visible, tokens.fusion, mask.keep, None if everywhere else mask.removed)
            found.predictions[name] = prediction
            masked = take(prediction, mask.removed) if everywhere else prediction
            found.errors[name] = masked_error(masked, take(targets(x, config), mask.removed))
        return found

    def losses(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        image_noise: Float[Array, "B I"] | None = None,
        audio_noise: Float[Array, "B A"] | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Image and audio loss of each clip, as training uses them. Arguments are those of `__call__`."""
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        errors = self.reconstruct(image, audio, image_mask=image_mask, audio_mask=audio_mask).errors
        return errors["image"], errors["audio"]

    def __call__(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        image_noise: Float[Array, "B I"] | None = None,
        audio_noise: Float[Array, "B A"] | None = None,
        rng: Array | None = None,
    ) -> Output:
        """Reconstructs randomly masked clips.

        Args:
          image: normalised images.
          audio: log-mels.
          image_noise: decides which image patches are removed (see `random_mask`); `None` draws it from `rng`.
          audio_noise: the same of the audio.
          rng: random key.

        Raises:
          UserError: neither noise nor `rng` is given for a stream, or an input does not have the size of its stream.
        """
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        prediction, error = self.reconstruct(
            image, audio, image_mask=image_mask, audio_mask=audio_mask, everywhere=True
        )
        return Output(
            error["image"].mean(),
            error["audio"].mean(),
            prediction["image"],
            prediction["audio"],
            image_mask.mask,
            audio_mask.mask,
        )
