"""A checkpoint and the model in it, of whatever kind.

The meta of a checkpoint names its `kind` (models.kinds) where that is not pretraining, and the `head`'s configuration.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.models import AVMAEConfig, kinds
from av_mae.training.checkpoint import Arrays, find_checkpoint, load_config, load_params, read_meta
from av_mae.training.step import ModelDefinition, define_model


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a checkpoint lies, its recipe, the kind of its model and the configuration of its head (or None)."""

    folder: pathlib.Path
    config: TrainConfig
    kind: str
    head: Any

    def load(self, config: AVMAEConfig | None = None) -> tuple[ModelDefinition, Arrays]:
        """The model's definition, and its arrays on this process's first device: definition.merge(arrays) is the model.

        config: that the model must have, if it is not simply the checkpoint's own.

        Raises:
          UserError: the checkpoint cannot be read, or is one of another model.
        """
        config = config or self.config.model
        definition, *shapes = define_model(lambda rngs: kinds.build_model(self.kind, config, self.head, rngs))
        device = SingleDeviceSharding(jax.local_devices()[0])
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
                    for part in shapes for name, x in part.items()}
        return definition, load_params(str(self.folder), abstract)


def open_checkpoint(path: str) -> Stored:
    """The checkpoint that `path` names: one itself, or the newest of a work directory or its `checkpoints`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    config, folder = load_config(path), find_checkpoint(path)
    meta = read_meta(folder)
    kind = meta.get("kind", kinds.PRETRAINING)
    head = recipes.from_dict(meta.get("head") or {}, kinds.HEADS[kind][1]) if kind in kinds.HEADS else None
    return Stored(folder, config, kind, head)
