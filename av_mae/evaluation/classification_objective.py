"""What trains a classifier: linear probe (frozen encoder) and fine-tuning (published system; TASKS' protocols)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae import models
from av_mae.models import objectives
from av_mae.models.config import require
from av_mae.models.encoder import stochastic_depth
from av_mae.models.flops import encoder_flops
from av_mae.models.head_config import ClassificationSettings
from av_mae.models.layers import Initial
from av_mae.training.objective import PASSES, Objective, Rows
from av_mae.training.optimizer import Length, Multipliers, encoder_multipliers


def row_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A random key for each number [n], of `key` and the number alone: uint32 [n, words], an array like any other."""
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))


def degrade(image: jax.Array, deviation: float, keys: jax.Array) -> jax.Array:
    """Normalised images [B, H, W, 3] with white noise, each drawn from its key in `keys` of `row_keys`, [B, words]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(jax.random.wrap_key_data(keys))
    return image + deviation * noise


def mix_reversed(x: jax.Array, share: jax.Array) -> jax.Array:
    """share · x + (1 - share) · x in reversed order of rows: x [B, …], share [B]."""
    share = share.reshape(-1, *(1,) * (x.ndim - 1))
    return share * x + (1 - share) * x[::-1]


def class_weights(frequency: np.ndarray) -> np.ndarray:
    """1 / frequency by class, with mean 1 over the classes that occur; a class without clips has weight 0."""
    occurs = frequency > 0
    weights = np.where(occurs, 1 / np.where(occurs, frequency, 1), 0)
    return weights / weights[occurs].mean()


class Classification(Objective):
    """Cross-entropy of `models.Classifier`'s joint score, softmax or binary.

    Batches carry `label`: int [B], or with `multi_label` [B, classes] of 0 and 1. Mixup takes each clip together with
    the one at its place in the reversed batch, one share for the whole step; a clip whose partner is not valid stays as
    it is. Images are degraded before.

    Args:
      config: the encoder's sizes.
      head: classes, and whether features are normalised.
      settings: how it is trained.
      frequency: share of the training clips that have each class, [classes]; needed for `balanced` and `log_odds`.
      encoder_rate: multiplies the encoder's learning rates; 0: it is frozen and sees every clip as in evaluation.
      layer_decay: see `encoder_multipliers`.
      image_noise: deviation of white noise on normalised images.

    Raises:
      UserError: frequencies that are missing, of another number than the classes, all 0 or outside 0 … 1; stochastic
        depth in a frozen encoder.
    """

    def __init__(self, config: models.AVMAEConfig, head: models.ClassifierConfig, settings: ClassificationSettings, *,
                 frequency: np.ndarray | None = None, encoder_rate: float = 1.0, layer_decay: float = 1.0,
                 image_noise: float = 0.0):
        self.encoder_config, self.head, self.settings = config, head, settings
        self.encoder_rate, self.layer_decay, self.image_noise = encoder_rate, layer_decay, image_noise
        self.frozen = encoder_rate == 0
        require(not (self.frozen and settings.drop_path),
                f"drop_path={settings.drop_path} drops layers of an encoder that is trained: with encoder_rate=0 it "
                "is frozen; set drop_path=0")
        frequency = self._checked(frequency)
        self.bias = tuple(np.asarray(objectives.log_odds(frequency)).tolist()) if settings.log_odds else 0.0
        self.class_weights = class_weights(frequency).astype(np.float32) if settings.balanced else None
        widths = [config.image.width, config.audio.width]
        widths += [config.fusion_width] if config.fusion.kind != "none" else []
        heads = 2 * sum(widths) * head.classes
        self.flops = (1 if self.frozen else PASSES) * encoder_flops(config, masked=False) + PASSES * heads

    def _checked(self, frequency: np.ndarray | None) -> np.ndarray | None:
        if not (self.settings.balanced or self.settings.log_odds):
            return None
        require(frequency is not None, "balanced and log_odds need the classes' frequency in the training clips")
        frequency, classes = np.asarray(frequency, float), self.head.classes
        require(frequency.shape == (classes,), f"frequency of shape {frequency.shape} must be one share for each of "
                                               f"{classes} classes")
        require(0 <= frequency.min() and 0 < frequency.max() <= 1,
                f"frequencies must lie in 0 … 1, some above 0, got {frequency.min()} … {frequency.max()}")
        return frequency

    def build(self, rngs: nnx.Rngs) -> models.Classifier:
        model = models.Classifier(self.encoder_config, self.head, rngs=rngs)
        for head in model.heads.values():
            head.bias = Initial("constant", (self.head.classes,), self.bias).parameter()
        return model

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """`share` [B] of mixup, `depth_noise` [B, layers, 2, 2] and `noise_keys` [B, words], each where it is used."""
        mixup, depth, noise = jax.random.split(key, 3)
        rows = {}
        if self.settings.mixup:
            rows["share"] = jnp.full(batch_size, jax.random.beta(mixup, self.settings.mixup, self.settings.mixup))
        if self.settings.drop_path:
            rows["depth_noise"] = jax.random.uniform(depth, (batch_size, self.encoder_config.layers, 2, 2))
        if self.image_noise:
            rows["noise_keys"] = row_keys(noise, jnp.arange(batch_size))
        return rows

    def prepare(self, rows: Rows) -> Rows:
        """The rows with what the model sees, degraded and mixed: `image` float32 [B, H, W, 3], normalised, and `audio`;
        and with what it should say, `target` [B, classes]."""
        image, audio = models.normalize_image(rows["image"]), rows["audio"]
        targets = objectives.class_targets(rows["label"], self.head.classes)
        if self.image_noise:
            image = degrade(image, self.image_noise, rows["noise_keys"])
        if self.settings.mixup:
            share = jnp.where(rows["valid"] & rows["valid"][::-1], rows["share"], 1.0)
            image, audio, targets = (mix_reversed(x, share) for x in (image, audio, targets))
        return rows | {"image": image, "audio": audio, "target": targets}

    def features(self, model: models.Classifier, image: jax.Array, audio: jax.Array, rows: Rows) -> Rows:
        """Pooled features [B, D] by stream."""
        if self.frozen:
            return jax.lax.stop_gradient(models.pool(model.encoder(image, audio)))
        factors = None
        if self.settings.drop_path:
            factors = stochastic_depth(rows["depth_noise"], self.settings.drop_path, self.encoder_config)
        return models.pool(model.encoder(image, audio, factors=factors))

    def losses(self, model: models.Classifier, rows: Rows) -> tuple[jax.Array, Rows]:
        """Loss and `accuracy`, whether the class of the highest score holds (has most of the clip, with mixup): [B]."""
        features, targets = self.features(model, rows["image"], rows["audio"], rows), rows["target"]
        score = models.joint_score(model.classify(features, rows["valid"]))
        entropy = objectives.binary_cross_entropy if self.settings.multi_label else objectives.softmax_cross_entropy
        smooth = objectives.class_targets(targets, self.head.classes, self.settings.label_smoothing)
        best = jnp.take_along_axis(targets, score.argmax(-1)[:, None], axis=-1)[:, 0]
        return entropy(score, smooth, self.class_weights), {"accuracy": best > 0.5}

    def trained(self, name: str) -> bool:
        return not (self.frozen and name.startswith("encoder."))

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return encoder_multipliers(params, self.encoder_rate, self.layer_decay, self.encoder_config.layers)
