"""Visual sound localization without boxes: a trained head, and two maps of any pretrained model (TASKS.md: Localizer).

All maps are [B, H, W] in at least float32, higher where it sounds, bilinear from the patch grid to the image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.models.config import AVMAEConfig, LocalizerConfig, StreamConfig, require
from av_mae.models.encoder import Encoder
from av_mae.models.layers import Linear, at_least_float32
from av_mae.models.masked_autoencoder import AVMAE
from av_mae.models.patches import Mask, masked_error, random_mask, take, targets


class Localizer(nnx.Module):
    """localizer(image, audio) → similarities [B, H, W] in -1…1 of each place with the sound.

    The streams are encoded without fusion tokens: fused ones carry a signature of their clip, by which pairs are told
    apart without looking at what sounds. Inputs as for the encoder.
    """

    def __init__(self, config: AVMAEConfig, head: LocalizerConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        self.encoder = Encoder(config, rngs=rngs)
        self.image_projection = Linear(config.image.width, head.width, rngs=rngs)
        self.audio_projection = Linear(config.audio.width, head.width, rngs=rngs)

    def embed(self, image: jax.Array, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unit vectors of each image token [B, I, W] and of the mean audio token [B, W]."""
        tokens = self.encoder(image, audio, fused=False)
        return on_sphere(self.image_projection(tokens.image)), on_sphere(self.audio_projection(tokens.audio.mean(1)))

    def __call__(self, image: jax.Array, audio: jax.Array) -> jax.Array:
        places, sounds = self.embed(image, audio)
        return upsample(jnp.einsum("biw,bw->bi", places, sounds), self.config.image)

    def pairwise(self, image: jax.Array, audio: jax.Array) -> jax.Array:
        """Scores [B, B] of each image (row) with each sound (column): the maximum of their map over the patch grid."""
        places, sounds = self.embed(image, audio)
        return jnp.einsum("biw,cw->bci", places, sounds).max(-1)


def on_sphere(x: jax.Array) -> jax.Array:
    """x [..., W] divided by its length, in at least float32."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def upsample(values: jax.Array, stream: StreamConfig) -> jax.Array:
    """Values [B, N] of patches → [B, H, W], bilinear with half-pixel centres."""
    return jax.image.resize(values.reshape(-1, *stream.grid), (len(values), *stream.size), "bilinear")


def finer(heat: Callable[[jax.Array], jax.Array], image: jax.Array, patch: tuple[int, int], shifts: int) -> jax.Array:
    """The mean of the maps `heat(image)` [B, H, W] of an image moved by shifts × shifts parts of a patch, each moved back.

    One map has the resolution of the patch grid; the mean knows where in a patch something begins. shifts 1: one map.
    """
    middle = (np.arange(shifts) + 0.5) / shifts - 0.5
    moves = np.stack(np.meshgrid(*(np.round(middle * size).astype(int) for size in patch), indexing="ij"), axis=-1)
    return jax.lax.map(lambda by: moved(heat(moved(image, by, patch)), -by, patch), moves.reshape(-1, 2)).mean(0)


def moved(x: jax.Array, by: jax.Array, most: tuple[int, int]) -> jax.Array:
    """x [B, H, W, …] moved up and left by `by` [2] pixels, at most `most`; edges are repeated."""
    rows, columns = most
    padded = jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), *((0, 0) for _ in x.shape[3:])), mode="edge")
    return jax.lax.dynamic_slice(padded, (0, rows + by[0], columns + by[1], *(0 for _ in x.shape[3:])), x.shape)


def require_fusion(config: AVMAEConfig, what: str) -> None:
    require(config.fusion.kind != "none", f"{what} needs a model with fusion tokens, fusion kind='none' has none")


def attention_map(model: nnx.Module, image: jax.Array, audio: jax.Array) -> jax.Array:
    """How strongly fusion and image-aggregation tokens attend to each place: [B, H, W], averaged over tokens, heads
    and layers.

    model: any with an encoder, trained for localization or not. Fusion tokens of 'factorized' attend through
    aggregation tokens; in 'dense' and 'bilinear' the weights of pairs are summed over the sound's tokens.

    Raises:
      UserError: the model has no fusion tokens.
    """
    require_fusion(model.config, "an attention map")
    encoder, maps = model.encoder, []
    tokens = encoder.start(image, audio)[:3]
    for number, block in enumerate(encoder.fusion_blocks):
        if block is not None:
            image, audio, fusion = tokens
            maps.append(block.image_weights(fusion, image, audio).mean(1))
        tokens = encoder.layer(encoder.parts(number), tokens)
    return upsample(jnp.stack(maps).mean(0), model.config.image)


def occlusion_noise(keys: jax.Array, masks: int, stream: StreamConfig) -> jax.Array:
    """Noise of `masks` masks of each clip, from a key [B] of its own: float32 [B, masks, N]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (masks, stream.tokens)))(keys)


def sound_error(
    model: AVMAE, image: jax.Array, audio: jax.Array, image_keep: jax.Array | None, mask: Mask
) -> jax.Array:
    """Reconstruction error [B] of the masked sound where the image's patches `image_keep` [B, K] are seen."""
    tokens = model.encoder(image, audio, image_keep, mask.keep)
    prediction = model.audio_decoder(tokens.audio, tokens.fusion, *mask[:2])
    return masked_error(prediction, take(targets(audio, model.config.audio), mask.removed))


def occlusion_map(
    model: AVMAE, image: jax.Array, audio: jax.Array, audio_noise: jax.Array, chunk: int = 8
) -> jax.Array:
    """How much the error of the sound's reconstruction grows when an image token is hidden: [B, H, W].

    Costs masks × I passes through encoder and audio decoder, of which `chunk` are in memory at a time.

    Args:
      audio_noise: [B, masks, A], of the sound's masks, over which errors are averaged (`occlusion_noise`).

    Raises:
      UserError: the model has no fusion tokens, so that its sound knows nothing of the image.
    """
    config, (batch, masks, _) = model.config, audio_noise.shape
    require_fusion(config, "an occlusion map")
    others = jnp.arange(config.image.tokens - 1)

    def error(number: jax.Array, image_keep: jax.Array | None) -> jax.Array:
        return sound_error(model, image, audio, image_keep, random_mask(audio_noise[:, number], config.audio.keep))

    def error_without(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        token, number = pair
        return error(number, jnp.broadcast_to(others + (others >= token), (batch, len(others))))

    seen = jax.lax.map(lambda number: error(number, None), jnp.arange(masks)).mean(0)
    pairs = jnp.indices((config.image.tokens, masks)).reshape(2, -1)
    hidden = jax.lax.map(error_without, tuple(pairs), batch_size=min(chunk, pairs.shape[1]))
    return upsample(hidden.reshape(config.image.tokens, masks, batch).mean(1).T - seen[:, None], config.image)
