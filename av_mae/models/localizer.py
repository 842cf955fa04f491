"""Visual sound localization without boxes: a trained head, and two maps of any pretrained model.

All maps are [B, H, W] in at least float32, higher where something sounds, and bilinear from the patch grid to the
image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from av_mae.models.config import AVMAEConfig, LocalizerConfig, StreamConfig, require
from av_mae.models.encoder import Encoder, Mask, WithEncoder, random_mask
from av_mae.models.layers import Linear, at_least_float32
from av_mae.models.masked_autoencoder import AVMAE


class Localizer(nnx.Module):
    """Similarities of each position of an image with the audio, in -1…1.

    Both streams are encoded without fusion tokens. Fused tokens would carry a signature of their clip, by which
    matching pairs are told apart without looking at what sounds.

    Args:
      config: of the encoder.
      head: width of the space in which image and audio are compared.
      rngs: random keys for the weights.
    """

    def __init__(self, config: AVMAEConfig, head: LocalizerConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        self.encoder = Encoder(config, rngs=rngs)
        self.image_projection = Linear(config.image.width, head.width, rngs=rngs)
        self.audio_projection = Linear(config.audio.width, head.width, rngs=rngs)

    def embed(
        self, image: Float[Array, "B height width 3"], audio: Float[Array, "B mels frames *channel"]
    ) -> tuple[Float[Array, "B I D"], Float[Array, "B D"]]:
        """Unit vectors of each image token and of the mean audio token."""
        tokens = self.encoder(image, audio, fused=False)
        return on_sphere(self.image_projection(tokens.image)), on_sphere(self.audio_projection(tokens.audio.mean(1)))

    def __call__(
        self, image: Float[Array, "B height width 3"], audio: Float[Array, "B mels frames *channel"]
    ) -> Float[Array, "B height width"]:
        """The map of each clip; inputs as for the encoder."""
        images, audios = self.embed(image, audio)
        return upsample(jnp.einsum("bid,bd->bi", images, audios), self.config.image)

    def pairwise(
        self, image: Float[Array, "B height width 3"], audio: Float[Array, "B mels frames *channel"]
    ) -> Float[Array, "B B"]:
        """Scores of each image (row) with each audio (column): the maximum of their map over the patch grid."""
        images, audios = self.embed(image, audio)
        return jnp.einsum("bid,cd->bci", images, audios).max(-1)


def on_sphere(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Vectors divided by their length, in at least float32."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def upsample(values: Float[Array, "B N"], stream: StreamConfig) -> Float[Array, "B rows columns"]:
    """Values of patches at the resolution of the stream's input, bilinear with half-pixel centres."""
    maps: Array = jax.image.resize(values.reshape(-1, *stream.grid), (len(values), *stream.size), "bilinear")
    return maps


def finer(
    heat: Callable[[Array], Array],
    image: Float[Array, "B height width C"],
    patch: tuple[int, int],
    shifts: int,
) -> Float[Array, "B height width"]:
    """The mean of maps of a moved image, each moved back.

    One map has the resolution of the patch grid. The mean also shows where in a patch something begins.

    Args:
      heat: makes the maps [B, H, W] of images.
      image: normalised images.
      patch: (rows, columns) in pixels.
      shifts: the image is moved by shifts × shifts parts of a patch; 1 gives `heat(image)`.
    """
    middle = (np.arange(shifts) + 0.5) / shifts - 0.5
    moves = np.stack(np.meshgrid(*(np.round(middle * size).astype(int) for size in patch), indexing="ij"), axis=-1)
    maps: Array = jax.lax.map(lambda by: moved(heat(moved(image, by, patch)), -by, patch), moves.reshape(-1, 2))
    return maps.mean(0)


def moved(
    x: Float[Array, "B height width *C"], by: Int[Array, "2"], most: tuple[int, int]
) -> Float[Array, "B height width *C"]:
    """x moved up and left by `by` (rows, columns) pixels, at most `most`; edges are repeated."""
    rows, columns = most
    padded = jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), *((0, 0) for _ in x.shape[3:])), mode="edge")
    return jax.lax.dynamic_slice(padded, (0, rows + by[0], columns + by[1], *(0 for _ in x.shape[3:])), x.shape)


def require_fusion(config: AVMAEConfig, what: str) -> None:
    """Raises UserError if the model has no fusion tokens, which `what` needs."""
    require(config.fusion.kind != "none", f"{what} needs a model with fusion tokens, fusion kind='none' has none")


def attention_map(
    model: WithEncoder, image: Float[Array, "B height width 3"], audio: Float[Array, "B mels frames *channel"]
) -> Float[Array, "B height width"]:
    """How strongly fusion and image-aggregation tokens attend to each position of the image.

    The map is the mean over tokens, heads and layers. Fusion tokens of 'factorized' attend through aggregation tokens.
    In 'dense' and 'bilinear' the weights of pairs are summed over the audio tokens.

    Args:
      model: any model with an encoder, trained for localization or not.
      image: normalised images.
      audio: log-mels.

    Raises:
      UserError: the model has no fusion tokens.
    """
    require_fusion(model.config, "an attention map")
    encoder, maps = model.encoder, []
    tokens = encoder.start(image, audio)
    for number, block in enumerate(encoder.fusion_blocks):
        if block is not None:
            images, audios, fusion = tokens
            maps.append(block.image_weights(fusion, images, audios).mean(1))
        tokens = encoder.layer(encoder.parts(number), tokens)
    return upsample(jnp.stack(maps).mean(0), model.config.image)


def occlusion_noise(keys: Array, masks: int, stream: StreamConfig) -> Float[Array, "B masks N"]:
    """Noise in [0, 1) for `masks` masks of each clip, from the clip's own key in `keys` [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (masks, stream.tokens)))(keys)


def occlusion_map(
    model: AVMAE,
    image: Float[Array, "B height width 3"],
    audio: Float[Array, "B mels frames *channel"],
    audio_noise: Float[Array, "B masks A"],
    chunk: int = 8,
) -> Float[Array, "B height width"]:
    """How much the error of the reconstructed audio grows when an image token is hidden.

    Costs masks × I passes through encoder and audio decoder.

    Args:
      model: a pretrained model.
      image: normalised images.
      audio: log-mels.
      audio_noise: of the audio's masks, over which errors are averaged (`occlusion_noise`).
      chunk: passes that are in memory at a time.

    Raises:
      UserError: the model has no fusion tokens, so that its audio knows nothing of the image.
    """
    config, (batch, masks, _) = model.config, audio_noise.shape
    require_fusion(config, "an occlusion map")
    tokens = config.image.tokens

    def error(number: Array, image_mask: Mask | None) -> Array:
        mask = random_mask(audio_noise[:, number], config.audio.keep)
        found = model.reconstruct(image, audio, image_mask=image_mask, audio_mask=mask, decode=("audio",))
        return found.errors["audio"]

    def error_without(pair: tuple[Array, Array]) -> Array:
        token, number = pair
        hide = (jnp.arange(tokens) == token).astype(jnp.float32)
        return error(number, random_mask(jnp.broadcast_to(hide, (batch, tokens)), tokens - 1))

    seen = jax.lax.map(lambda number: error(number, None), jnp.arange(masks)).mean(0)
    pairs = jnp.indices((tokens, masks)).reshape(2, -1)
    hidden = jax.lax.map(error_without, (pairs[0], pairs[1]), batch_size=min(chunk, pairs.shape[1]))
    return upsample(hidden.reshape(tokens, masks, batch).mean(1).T - seen[:, None], config.image)
