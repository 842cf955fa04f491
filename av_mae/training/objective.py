"""What a training step minimises, and of which model. A task of its own is a subclass of Objective."""

import abc
from collections.abc import Iterable

import jax
from flax import nnx

from av_mae import models
from av_mae.training.optimizer import Length, Multipliers, pretrained_multipliers

Rows = dict[str, jax.Array]
# Forward and backward pass cost three forward passes.
PASSES = 3


class Objective(abc.ABC):
    """A model and its loss, for `TrainStep`. Everything here is pure and traced under jit.

    `flops`: matrix products of one clip, forward and backward, in FLOPs; 0 where they are not counted.
    """

    flops: float = 0.0

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with random weights."""

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """Random numbers of one step, [batch_size, …] each: row b is for clip b of the global batch."""
        return {}

    def prepare(self, rows: Rows) -> Rows:
        """The fields of a whole batch and those of `draw` → what `losses` takes, before the rows are split for gradient
        accumulation: the place for what joins rows."""
        return rows

    @abc.abstractmethod
    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        """Loss [b] of each row of (a part of) a batch that `prepare` made, and further figures [b]."""

    def trained(self, name: str) -> bool:
        """Whether the parameter of this dotted name is trained; others stay as they are, without optimizer state."""
        return True

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        """What the learning rates of single parameters are multiplied by; others have the full rate."""
        return {}

    def run_layers(self, model: nnx.Module, run) -> None:
        """Lets the model's layers be run by `run` (models/stack.py)."""
        model.encoder.run = run


class Pretraining(Objective):
    """Masked reconstruction: the sum of both streams' losses, each times its `loss_weight` (paper section 3.3: 1).

    `pretrained` streams ('image', 'audio') come from unimodal encoders: their learning rates rise over the first half.
    """

    def __init__(self, config: models.AVMAEConfig, pretrained: Iterable[str] = ()):
        self.config, self.pretrained = config, tuple(pretrained)
        self.flops = PASSES * models.closed_form_flops(config)

    def build(self, rngs: nnx.Rngs) -> models.AVMAE:
        return models.AVMAE(self.config, rngs=rngs)

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """Mask noise of both streams, [B, patches]."""
        image, audio = jax.random.split(key)
        return {"image_noise": models.mask_noise(image, batch_size, self.config.image.tokens),
                "audio_noise": models.mask_noise(audio, batch_size, self.config.audio.tokens)}

    def losses(self, model: models.AVMAE, rows: Rows) -> tuple[jax.Array, Rows]:
        image = models.normalize_image(rows["image"])
        image_loss, audio_loss = model.losses(image, rows["audio"], rows["image_noise"], rows["audio_noise"])
        loss = self.config.image.loss_weight * image_loss + self.config.audio.loss_weight * audio_loss
        return loss, {"image_loss": image_loss, "audio_loss": audio_loss}

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return pretrained_multipliers(params, self.pretrained, length)

    def run_layers(self, model: models.AVMAE, run) -> None:
        model.encoder.run = model.image_decoder.run = model.audio_decoder.run = run
