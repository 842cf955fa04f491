"""From a pretraining run's folder to its model."""

import jax
from jax.sharding import SingleDeviceSharding

from av_mae import models
from av_mae.config import TrainConfig
from av_mae.errors import UserError
from av_mae.training.checkpoint import load_config, load_params
from av_mae.training.step import define_model


def load_run(path: str) -> tuple[TrainConfig, models.AVMAE]:
    """The recipe and the float32 model of a checkpoint, on the first device.

    path: a run's workdir (its newest checkpoint), its `checkpoints`, or one of them. Raises UserError when there is
    none, or it cannot be read.
    """
    if not path:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    config = load_config(path)
    definition, shapes = define_model(config.model)
    device = SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in shapes.items()}
    return config, definition.merge(load_params(path, abstract))
