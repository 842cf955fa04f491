"""Targets and losses of the heads, as pure functions in at least float32. A loss has one value for each clip."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from av_mae.models.config import SeparatorConfig
from av_mae.models.layers import at_least_float32


def class_targets(
    labels: Int[Array, " B"] | Shaped[Array, "B classes"], classes: int, smoothing: float = 0.0
) -> Float[Array, "B classes"]:
    """Targets of the classes, in float32.

    Args:
      labels: class numbers, or 1 for each class that holds and 0 for others.
      classes: number of classes.
      smoothing: each target t becomes t (1 - smoothing) + smoothing / classes.
    """
    targets = jax.nn.one_hot(labels, classes) if labels.ndim == 1 else labels.astype(jnp.float32)
    return targets * (1 - smoothing) + smoothing / classes


def binary_errors(logits: Float[Array, "*N"], targets: Shaped[Array, "*N"]) -> Float[Array, "*N"]:
    """Binary cross-entropy of each logit with its target in 0…1."""
    x, t = at_least_float32(logits), at_least_float32(targets)
    return jax.nn.softplus(x) - x * t


def softmax_cross_entropy(
    logits: Float[Array, "B classes"],
    targets: Float[Array, "B classes"],
    class_weights: Float[Array, " classes"] | None = None,
) -> Float[Array, " B"]:
    """-Σ weight · target · log softmax(logits) over the classes, which is not divided by the sum of weights.

    Args:
      logits: of the classes.
      targets: probabilities of the classes.
      class_weights: weights of the classes; `None` means 1.
    """
    surprise = -targets * jax.nn.log_softmax(at_least_float32(logits))
    return (surprise if class_weights is None else surprise * class_weights).sum(-1)


def binary_cross_entropy(
    logits: Float[Array, "B classes"],
    targets: Float[Array, "B classes"],
    class_weights: Float[Array, " classes"] | None = None,
) -> Float[Array, " B"]:
    """Mean over the classes of weight · binary cross-entropy. Arguments are those of `softmax_cross_entropy`."""
    errors = binary_errors(logits, targets)
    return (errors if class_weights is None else errors * class_weights).mean(-1)


def log_odds(frequency: Float[Array, " classes"]) -> Float[Array, " classes"]:
    """Head biases at the start of fine-tuning: ln((f + 1e-3) / (1 - f + 1e-3)) for the frequency f of a class."""
    return jnp.log((frequency + 1e-3) / (1 - frequency + 1e-3))


def separation_mask(
    mixture: Float[Array, "B mels frames"], source: Float[Array, "B mels frames"], mask: str
) -> Float[Array, "B mels frames"]:
    """The mask of a source S in a mixture M, in 0…1.

    Args:
      mixture: log10 of the power; standardised spectrograms must be turned back before.
      source: the same of the source.
      mask: 'binary' (S > M), 'ratio' (S / (S + M + 1e-5)) or 'share' (S / M). DeepAVFusion has the first two. A source
        that is alone is .5 in 'ratio' and 1 in 'share'. Relative to that, a source 10 dB below the mixture is twice as
        far above silence in 'ratio'.
    """
    mixture, source = (jnp.power(10.0, at_least_float32(x)) for x in (mixture, source))
    if mask == "binary":
        return (source > mixture).astype(jnp.float32)
    if mask == "share":
        return jnp.clip(source / mixture, 0, 1)
    return jnp.clip(source / (source + mixture + 1e-5), 0, 1)


def separation_loss(
    logits: Float[Array, "B mels frames"],
    mixture: Float[Array, "B mels frames"],
    source: Float[Array, "B mels frames"],
    head: SeparatorConfig,
) -> Float[Array, " B"]:
    """Mean binary cross-entropy of mask logits with the mask of `separation_mask`.

    Args:
      logits: of the mask.
      mixture: log10 of the mixture's power M.
      source: log10 of the source's power.
      head: kind of the mask. Where it is weighted, each error counts ln(1 + M), clipped to [1e-3, 10]; the mean is not
        divided by the sum of these weights.
    """
    errors = binary_errors(logits, separation_mask(mixture, source, head.mask))
    if head.weighted:
        power = jnp.power(10.0, at_least_float32(mixture))
        errors = errors * jnp.clip(jnp.log1p(power), 1e-3, 10)
    return errors.mean((1, 2))


def segmentation_loss(
    logits: Float[Array, "B height width classes"], target: Shaped[Array, "B height width"]
) -> Float[Array, " B"]:
    """Mean cross-entropy over the pixels.

    With one class it is binary, and the target 0 or 1. With several, the target is a class number (int).
    """
    if logits.shape[-1] == 1:
        return binary_errors(logits[..., 0], target).mean((1, 2))
    chances = jax.nn.log_softmax(at_least_float32(logits))
    return -jnp.take_along_axis(chances, target[..., None], axis=-1)[..., 0].mean((1, 2))


def _valid_pairs(
    scores: Float[Array, "B B"], valid: Bool[Array, " B"]
) -> tuple[Float[Array, "B B"], Bool[Array, "B B"]]:
    """Scores with -inf wherever an invalid clip would be compared with another, and which pairs match."""
    matching = jnp.eye(len(valid), dtype=bool)
    compared = (valid[:, None] & valid) | matching
    return jnp.where(compared, at_least_float32(scores), -jnp.inf), matching


def contrastive_loss(scores: Float[Array, "B B"], valid: Bool[Array, " B"], temperature: float) -> Float[Array, " B"]:
    """Symmetric InfoNCE: the mean of two cross-entropies, of a clip's audio among all and of its image among all.

    Args:
      scores: of each image (row) with each audio (column).
      valid: which clips count. An invalid clip is compared with none, and its loss is 0.
      temperature: what scores are divided by.
    """
    scores, matching = _valid_pairs(scores, valid)
    logits = scores / temperature
    own = jnp.where(matching, logits, 0).sum(1)
    return (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) / 2 - own


def contrastive_top1(scores: Float[Array, "B B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """How often a clip's own audio, and its own image, scores highest among valid clips: 0, 1/2 or 1."""
    scores, _ = _valid_pairs(scores, valid)
    own = jnp.arange(len(valid))
    return ((scores.argmax(1) == own).astype(jnp.float32) + (scores.argmax(0) == own)) / 2
