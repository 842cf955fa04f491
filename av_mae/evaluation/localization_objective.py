"""Training of the localizer: no boxes, only which image and which sound belong together."""

import dataclasses

import jax
from flax import nnx

from av_mae import models
from av_mae.errors import UserError
from av_mae.models.flops import encoder_flops, linear
from av_mae.models.objectives import contrastive_loss, contrastive_top1
from av_mae.training.objective import PASSES, Objective, Rows
from av_mae.training.optimizer import Length, Multipliers


def reads_other_stream(name: str) -> bool:
    """Whether the parameter of this dotted name belongs to fusion, which the localizer does without."""
    return name.startswith("encoder.fusion_") or ".bridges." in name


class Localization(Objective):
    """Symmetric contrastive loss over all pairs of images and sounds of the batch (of each part of it, where gradients
    are accumulated). The encoder learns at `encoder_rate` times the learning rate of the head; at 0 it is frozen.

    Figure: `contrastive_top1`, how often the own sound, or image, scores highest in the batch.

    Raises:
      UserError: encoder_rate is negative.
    """

    def __init__(self, config: models.AVMAEConfig, head: models.LocalizerConfig, encoder_rate: float = 0.5):
        if encoder_rate < 0:
            raise UserError(f"encoder_rate={encoder_rate} must be at least 0 (0: the encoder stays as it is)")
        self.config, self.head, self.encoder_rate = config, head, encoder_rate
        unfused = dataclasses.replace(config, fusion=models.FusionConfig(kind="none"))
        projections = (linear(config.image.tokens, config.image.width, head.width)
                       + linear(1, config.audio.width, head.width))
        self.flops = PASSES * (encoder_flops(unfused, masked=False) + projections)

    def build(self, rngs: nnx.Rngs) -> models.Localizer:
        return models.Localizer(self.config, self.head, rngs=rngs)

    def losses(self, model: models.Localizer, rows: Rows) -> tuple[jax.Array, Rows]:
        scores = model.pairwise(models.normalize_image(rows["image"]), rows["audio"])
        return (contrastive_loss(scores, rows["valid"], self.head.temperature),
                {"contrastive_top1": contrastive_top1(scores, rows["valid"])})

    def trained(self, name: str) -> bool:
        frozen = self.encoder_rate == 0 and name.startswith("encoder.")
        return not frozen and not reads_other_stream(name)

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return {name: self.encoder_rate for name in params if name.startswith("encoder.")}
