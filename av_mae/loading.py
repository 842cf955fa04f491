"""From a pretraining run's folder to its model."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae import models, registry
from av_mae.checkpoint import open_checkpoint
from av_mae.config import SoundConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.models import kinds


class Encoding(NamedTuple):
    """tokens after the final norms (`models.Tokens`), and their means: features {'image', …} → [B, D]."""

    tokens: models.Tokens
    features: dict[str, jax.Array]


def load(path: str | os.PathLike) -> nnx.Module:
    """The model of a checkpoint: float32, on the default device, with its configuration as `.config` and that of its
    log-mel features as `.sound` (for `preprocess.load`).

    Args:
      path: a run's work directory (its newest checkpoint), its `checkpoints`, one of them, what av_mae.convert made,
        a published file whose configuration can be told without options, or a name from a registry (av_mae.registry).

    Returns:
      AVMAE, Classifier, Separator or Segmenter (with `.head`), or models.kinds.EncoderModel, whatever is there.

    Raises:
      UserError: there is no such checkpoint, it cannot be read or is not the one that was registered, or it holds one
        unimodal stream, which is no model.
    """
    path = registry.resolve(path)
    if pathlib.Path(path).is_file():
        from av_mae.convert.source import load_published

        model = load_published(path)
        model.sound = SoundConfig(mels=model.config.audio.size[0])
        return model
    checkpoint = open_checkpoint(os.fspath(path))
    if checkpoint.kind in kinds.STREAMS:
        stream = kinds.STREAMS[checkpoint.kind]
        raise UserError(
            f"{path} holds a unimodal {stream} encoder, which is no whole model: start a run from it with "
            f"--config.init_{stream}={path}"
        )
    definition, arrays = checkpoint.load()
    model = definition.merge(arrays)
    model.sound = checkpoint.config.data.sound
    return model


def encode(model: nnx.Module, batch: Mapping[str, jax.Array]) -> Encoding:
    """Tokens and pooled features of a batch, all patches visible; compiled once per model structure and batch shape.

    Args:
      model: whatever has an `.encoder`.
      batch: `image` [B, H, W, 3] (uint8, or float as the model takes it: ImageNet's mean and deviation) and `audio`
        [B, mels, frames(, 1)] (log-mel, standardised as in the run that trained the model). Other entries are left.
    """
    return _encode(model.encoder, jnp.asarray(batch["image"]), jnp.asarray(batch["audio"]))


def forward(encoder: models.Encoder, image: jax.Array, audio: jax.Array, return_layers: bool = False) -> Encoding:
    """What `encode` computes, as a pure function; `return_layers`: with the tokens after each layer."""
    image = models.normalize_image(image) if image.dtype == jnp.uint8 else image
    tokens = encoder(image, audio, return_layers=return_layers)
    return Encoding(tokens, models.pool(tokens))


_encode = nnx.jit(forward)


def load_run(path: str) -> tuple[TrainConfig, models.AVMAE]:
    """The recipe of a pretraining checkpoint, and its model as `av_mae.load` gives it.

    path: a run's workdir (its newest checkpoint), its `checkpoints`, or one of them. Raises UserError when there is
    none, it cannot be read, or it holds another kind of model.
    """
    if not path:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != kinds.PRETRAINING:
        raise UserError(f"init={path} must be a pretraining checkpoint, with decoders; it holds: {checkpoint.kind}")
    return checkpoint.config, load(path)
