"""What trains a dense head together with its encoder (published protocols of separation and segmentation)."""

from collections.abc import Callable

import jax
from flax import nnx

from av_mae.models import kinds
from av_mae.task_config import TaskConfig
from av_mae.training.objective import Objective, Rows
from av_mae.training.optimizer import Length, Multipliers, encoder_multipliers
from av_mae.training.stored import Stored


class Finetuning(Objective):
    """A model of `kind` with the head of the recipe on the encoder of a checkpoint; `loss(model, rows)` gives [B].

    Learning rates: those of the encoder times `encoder_rate` (0: frozen), those of its layers by `layer_decay`.
    """

    def __init__(self, kind: str, config: TaskConfig, stored: Stored, loss: Callable[[nnx.Module, Rows], jax.Array]):
        self.kind, self.config, self.encoder_config, self.loss = kind, config, stored.config.model, loss

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return kinds.build_model(self.kind, self.encoder_config, self.config.head, rngs)

    def losses(self, model: nnx.Module, rows: Rows) -> tuple[jax.Array, Rows]:
        return self.loss(model, rows), {}

    def multipliers(self, params: Rows, length: Length) -> Multipliers:
        return encoder_multipliers(params, self.config.encoder_rate, self.config.layer_decay, self.encoder_config.layers)

    def trained(self, name: str) -> bool:
        return self.config.encoder_rate > 0 or not name.startswith("encoder.")
