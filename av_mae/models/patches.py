"""From inputs to patches, from noise to masks, from patches to targets and losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae.models.config import StreamConfig, require
from av_mae.models.layers import at_least_float32

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def normalize_image(image: jax.Array) -> jax.Array:
    """uint8 [..., 3] → float32 with ImageNet's mean and deviation."""
    return (image.astype(jnp.float32) / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION


def with_channel(x: jax.Array, config: StreamConfig) -> jax.Array:
    """Adds the channel axis that a spectrogram [B, mels, frames] may lack, and checks x against the stream."""
    x = x[..., None] if x.ndim == 3 else x
    expected = (*config.size, config.channels)
    require(x.ndim == 4 and x.shape[1:] == expected, f"input shape {x.shape} must be (B, {expected})")
    return x


def patchify(x: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] → [B, N, P], patches row-major, values in (row, column, channel) order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch[0], patch[0], w // patch[1], patch[1], c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch[0] * patch[1] * c)


def unpatchify(patches: jax.Array, config: StreamConfig) -> jax.Array:
    """Inverse of `patchify`: [B, N, P] → [B, H, W, C]."""
    (rows, columns), (height, width) = config.grid, config.patch_size
    x = patches.reshape(-1, rows, columns, height, width, config.channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *config.size, config.channels)


class Mask(NamedTuple):
    """keep [B, K] and removed [B, M] are patch ids (int32) in the order of their noise; mask [B, N] is 1 if removed."""

    keep: jax.Array
    removed: jax.Array
    mask: jax.Array


def mask_noise(key: jax.Array, batch: int, tokens: int) -> jax.Array:
    """float32 [batch, tokens], uniform in [0, 1)."""
    return jax.random.uniform(key, (batch, tokens))


def random_mask(noise: jax.Array, keep: int) -> Mask:
    """Keeps the `keep` patches of least noise [B, N] in each clip (paper section 3.3)."""
    order = jnp.argsort(noise, axis=1).astype(jnp.int32)
    rank = jnp.argsort(order, axis=1)
    return Mask(order[:, :keep], order[:, keep:], (rank >= keep).astype(jnp.float32))


def take(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, M] of x [B, N, D] → [B, M, D]."""
    return jnp.take_along_axis(x, ids[..., None], axis=1, mode="clip")


def targets(x: jax.Array, config: StreamConfig) -> jax.Array:
    """Reconstruction targets [B, N, P] of inputs [B, H, W, C], in at least float32.

    Normalised per patch with the unbiased variance + 1e-6 where the stream says so.
    """
    patches = at_least_float32(patchify(with_channel(x, config), config.patch_size))
    if not config.normalize_targets:
        return patches
    mean = patches.mean(-1, keepdims=True)
    return (patches - mean) / jnp.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)


def masked_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of [B, M, P] over masked patches and values, in at least float32: [B]."""
    return jnp.square(at_least_float32(prediction) - at_least_float32(target)).mean((1, 2))
