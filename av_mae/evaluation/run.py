"""From a pretraining run's folder to its model."""

from av_mae import loading, models
from av_mae.config import TrainConfig
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.training.stored import open_checkpoint


def load_run(path: str) -> tuple[TrainConfig, models.AVMAE]:
    """The recipe of a pretraining checkpoint, and its model as `av_mae.load` gives it.

    path: a run's workdir (its newest checkpoint), its `checkpoints`, or one of them. Raises UserError when there is
    none, it cannot be read, or it holds another kind of model.
    """
    if not path:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    stored = open_checkpoint(path)
    if stored.kind != kinds.PRETRAINING:
        raise UserError(f"init={path} must be a pretraining checkpoint, with decoders; it holds: {stored.kind}")
    return stored.config, loading.load(path)
