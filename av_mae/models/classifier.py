"""Linear classifiers of the pooled streams (published system; protocols: linear probe, fine-tuning)."""

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae.models.config import AVMAEConfig
from av_mae.models.convolutions import BatchNorm
from av_mae.models.encoder import Encoder, pool
from av_mae.models.head_config import ClassifierConfig
from av_mae.models.layers import Linear, at_least_float32

JOINT = "joint"


class Classifier(nnx.Module):
    """classifier(image, audio, train_rows=None) → {'image', 'audio', 'fusion'}: logits [B, classes].

    Without fusion tokens there is no 'fusion'; a head that concatenates the streams gives {'joint'} alone. Inputs as
    for the encoder. `train_rows` [B] is given in training: the clips over which input norms take their statistics.
    """

    def __init__(self, config: AVMAEConfig, head: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        self.encoder = Encoder(config, rngs=rngs)
        widths = {"image": config.image.width, "audio": config.audio.width}
        if config.fusion.kind != "none":
            widths["fusion"] = config.fusion_width
        self.streams = tuple(widths)
        self.norms = nnx.Dict({name: BatchNorm(width, eps=1e-6, affine=False)
                               for name, width in widths.items() if head.input_norm})
        read = {JOINT: sum(widths.values())} if head.concatenate else widths
        self.heads = nnx.Dict({name: Linear(width, head.classes, rngs=rngs) for name, width in read.items()})

    def classify(self, features: dict[str, jax.Array], train_rows: jax.Array | None = None) -> dict[str, jax.Array]:
        """Logits of pooled features [B, D] by stream: all that a frozen encoder leaves to do."""
        if self.head.input_norm:
            features = {name: self.norms[name](x, train_rows) for name, x in features.items()}
        if self.head.concatenate:  # in an order of its own: features that come out of a jit are sorted by name
            features = {JOINT: jnp.concatenate([features[name] for name in self.streams], axis=-1)}
        return {name: head(features[name]) for name, head in self.heads.items()}

    def __call__(self, image: jax.Array, audio: jax.Array,
                 train_rows: jax.Array | None = None) -> dict[str, jax.Array]:
        return self.classify(pool(self.encoder(image, audio)), train_rows)


def joint_score(logits: dict[str, jax.Array]) -> jax.Array:
    """The mean of the streams' logits, in at least float32: [B, classes]."""
    return at_least_float32(jnp.stack(list(logits.values()))).mean(0)
