"""The whole model: mask, encode with early fusion, decode, compare (paper section 3)."""

from typing import NamedTuple

import jax
from flax import nnx

from av_mae.models.config import AVMAEConfig, require
from av_mae.models.decoder import Decoder
from av_mae.models.encoder import Encoder
from av_mae.models.patches import Mask, mask_noise, masked_error, random_mask, take, targets


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

    def masks(self, batch: int, image_noise: jax.Array | None, audio_noise: jax.Array | None,
              rng: jax.Array | None = None) -> tuple[Mask, Mask]:
        """Masks of both streams from the given noise, or from `rng` where there is none."""
        streams, noises = (self.config.image, self.config.audio), (image_noise, audio_noise)
        require(rng is not None or all(n is not None for n in noises),
                "masking needs `rng` or noise for both streams")
        keys = (None, None) if rng is None else jax.random.split(rng)
        noises = (mask_noise(key, batch, stream.tokens) if noise is None else noise
                  for key, stream, noise in zip(keys, streams, noises, strict=True))
        return tuple(random_mask(noise, stream.keep) for noise, stream in zip(noises, streams, strict=True))

    def losses(self, image: jax.Array, audio: jax.Array, image_noise: jax.Array | None = None,
               audio_noise: jax.Array | None = None, rng: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Image and audio loss of each clip, [B] each: what training uses, predicting at masked patches only."""
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        tokens = self.encoder(image, audio, image_mask.keep, audio_mask.keep)
        image_prediction = self.image_decoder(tokens.image, tokens.fusion, *image_mask[:2])
        audio_prediction = self.audio_decoder(tokens.audio, tokens.fusion, *audio_mask[:2])
        image_target = take(targets(image, self.config.image), image_mask.removed)
        audio_target = take(targets(audio, self.config.audio), audio_mask.removed)
        return masked_error(image_prediction, image_target), masked_error(audio_prediction, audio_target)

    def __call__(self, image: jax.Array, audio: jax.Array, image_noise: jax.Array | None = None,
                 audio_noise: jax.Array | None = None, rng: jax.Array | None = None) -> Output:
        image_mask, audio_mask = self.masks(image.shape[0], image_noise, audio_noise, rng)
        tokens = self.encoder(image, audio, image_mask.keep, audio_mask.keep)
        image_prediction = self.image_decoder(tokens.image, tokens.fusion, image_mask.keep)
        audio_prediction = self.audio_decoder(tokens.audio, tokens.fusion, audio_mask.keep)
        streams = ((image, image_prediction, image_mask, self.config.image),
                   (audio, audio_prediction, audio_mask, self.config.audio))
        image_loss, audio_loss = (
            masked_error(take(prediction, mask.removed), take(targets(x, config), mask.removed)).mean()
            for x, prediction, mask, config in streams)
        return Output(image_loss, audio_loss, image_prediction, audio_prediction, image_mask.mask, audio_mask.mask)
