"""Targets and losses of the heads as pure functions in at least float32; a loss is [B], one value a clip."""

import jax
import jax.numpy as jnp

from av_mae.models.config import SeparatorConfig
from av_mae.models.layers import at_least_float32


def class_targets(labels: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """Labels int [B], or [B, classes] with 1 for each class that holds → float32 [B, classes].

    Smoothing moves each target t to t (1 - smoothing) + smoothing / classes.
    """
    targets = jax.nn.one_hot(labels, classes) if labels.ndim == 1 else labels.astype(jnp.float32)
    return targets * (1 - smoothing) + smoothing / classes


def binary_errors(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy of each logit with its target in [0, 1], of the same shape."""
    x, t = at_least_float32(logits), at_least_float32(targets)
    return jax.nn.softplus(x) - x * t


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array, class_weights: jax.Array | None = None) -> jax.Array:
    """-Σ weight · target · log softmax over the classes: logits, targets [B, classes], weights [classes] → [B].

    The mean over clips is not divided by the sum of weights.
    """
    surprise = -targets * jax.nn.log_softmax(at_least_float32(logits))
    return (surprise if class_weights is None else surprise * class_weights).sum(-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, class_weights: jax.Array | None = None) -> jax.Array:
    """Mean over the classes of weight · binary cross-entropy: logits, targets [B, classes], weights [classes] → [B]."""
    errors = binary_errors(logits, targets)
    return (errors if class_weights is None else errors * class_weights).mean(-1)


def log_odds(frequency: jax.Array) -> jax.Array:
    """Where head biases start in fine-tuning: ln((f + 1e-3) / (1 - f + 1e-3)) for the class frequency f [classes]."""
    return jnp.log((frequency + 1e-3) / (1 - frequency + 1e-3))


def separation_mask(mixture: jax.Array, source: jax.Array, mask: str) -> jax.Array:
    """The 'binary' (S > M), 'ratio' (S / (S + M + 1e-5)) or 'share' (S / M) mask in 0…1, float32 [B, mels, frames].

    mixture and source [B, mels, frames] are log10 of power: standardised ones must be turned back before. The first
    two are the published ones. A source that is alone is .5 in 'ratio' and 1 in 'share'; one 10 dB below the mixture
    is twice as far above silence in 'ratio', relative to that.
    """
    mixture, source = (jnp.power(10.0, at_least_float32(x)) for x in (mixture, source))
    if mask == "binary":
        return (source > mixture).astype(jnp.float32)
    if mask == "share":
        return jnp.clip(source / mixture, 0, 1)
    return jnp.clip(source / (source + mixture + 1e-5), 0, 1)


def separation_loss(logits: jax.Array, mixture: jax.Array, source: jax.Array, head: SeparatorConfig) -> jax.Array:
    """Binary cross-entropy of mask logits [B, mels, frames] with the mask of `separation_mask`: [B].

    Where `head` says weighted, each error counts ln(1 + M), clipped to [1e-3, 10]; the mean is over all elements and
    not divided by the weights' sum.
    """
    errors = binary_errors(logits, separation_mask(mixture, source, head.mask))
    if head.weighted:
        power = jnp.power(10.0, at_least_float32(mixture))
        errors = errors * jnp.clip(jnp.log1p(power), 1e-3, 10)
    return errors.mean((1, 2))


def segmentation_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy over the pixels of logits [B, H, W, classes] with target [B, H, W]: [B].

    One class: binary, the target 0 or 1. Several: softmax, the target a class number (int).
    """
    if logits.shape[-1] == 1:
        return binary_errors(logits[..., 0], target).mean((1, 2))
    chances = jax.nn.log_softmax(at_least_float32(logits))
    return -jnp.take_along_axis(chances, target[..., None], axis=-1)[..., 0].mean((1, 2))


def _valid_pairs(scores: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores [B, B] with -inf wherever an invalid clip would be compared with another, and which pairs match."""
    matching = jnp.eye(len(valid), dtype=bool)
    compared = (valid[:, None] & valid) | matching
    return jnp.where(compared, at_least_float32(scores), -jnp.inf), matching


def contrastive_loss(scores: jax.Array, valid: jax.Array, temperature: float) -> jax.Array:
    """Symmetric InfoNCE: scores [B, B] of each image (row) with each sound (column), valid bool [B] → [B].

    The mean of a clip's two cross-entropies, for its sound among all sounds and for its image among all images.
    Invalid clips count in nothing; their own loss is 0.
    """
    scores, matching = _valid_pairs(scores, valid)
    logits = scores / temperature
    own = jnp.where(matching, logits, 0).sum(1)
    return (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) / 2 - own


def contrastive_top1(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """How often a clip's own sound, and its own image, scores highest among valid clips: [B], each 0, 1/2 or 1."""
    scores, _ = _valid_pairs(scores, valid)
    own = jnp.arange(len(valid))
    return ((scores.argmax(1) == own).astype(jnp.float32) + (scores.argmax(0) == own)) / 2
