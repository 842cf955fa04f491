"""The encoder as a function of arrays alone, weights inside, ready to be written as a program."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.config import SoundConfig
from av_mae.data.sound import mel_filter_bank
from av_mae.loading import forward

INPUTS, OUTPUTS = ("media", "tensors"), ("pooled", "tokens")


@dataclasses.dataclass(frozen=True)
class Program:
    """function(first, second) → {'image', 'audio', 'fusion'}: float32, means over tokens [B, D] or tokens [B, N, D].

    inputs: name → (shape of one row, dtype), in the order of the arguments.
    """

    function: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    inputs: dict[str, tuple[tuple[int, ...], str]]

    def specs(self, batch) -> list[jax.ShapeDtypeStruct]:
        """The arguments for a batch of this many rows, which may be a symbol."""
        return [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in self.inputs.values()]


def make_program(model: nnx.Module, inputs: str, outputs: str) -> Program:
    """The encoder of a model.

    inputs 'tensors': `image` float32 [B, H, W, 3] with ImageNet's mean and deviation and `audio` float32
    [B, mels, frames], a standardised log-mel. 'media': `image` uint8 [B, H, W, 3], a frame already cropped and
    resized to the model's size, and `waveform` float32 [B, samples] in -1…1 at the model's rate, as long as the
    model's window. outputs: 'pooled' or 'tokens'.
    """
    encoder, sound, config = model.encoder, model.sound, model.config

    def from_tensors(image: jax.Array, audio: jax.Array) -> dict[str, jax.Array]:
        tokens, features = forward(encoder, image, audio)
        return features if outputs == "pooled" else {name: getattr(tokens, name) for name in features}

    def from_media(image: jax.Array, waveform: jax.Array) -> dict[str, jax.Array]:
        return from_tensors(image, log_mel(waveform, sound))

    size = (*config.image.size, 3)
    if inputs == "tensors":
        return Program(from_tensors, {"image": (size, "float32"), "audio": (tuple(config.audio.size), "float32")})
    samples = config.audio.size[1] * sound.hop
    return Program(from_media, {"image": (size, "uint8"), "waveform": ((samples,), "float32")})


def log_mel(waveform: jax.Array, sound: SoundConfig) -> jax.Array:
    """data.sound.log_mel of a batch: waveforms [B, samples] → [B, mels, samples // hop], samples above n_fft / 2."""
    half, count = sound.n_fft // 2, waveform.shape[1] // sound.hop
    padded = jnp.concatenate([waveform[:, half:0:-1], waveform, waveform[:, -2:-half - 2:-1]], axis=1)
    frames = padded[:, sound.hop * np.arange(count)[:, None] + np.arange(sound.n_fft)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    spectrum = jnp.fft.rfft(frames * window.astype(np.float32))
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    mel = jnp.einsum("btf,fm->bmt", power, mel_filter_bank(sound), precision=jax.lax.Precision.HIGHEST)
    logarithm = jnp.log(mel + np.float32(sound.log_floor)) * np.float32(1 / (math.log(10) * sound.std))
    return logarithm - np.float32(sound.mean / sound.std)
