"""From a checkpoint to its model, and from a batch to embeddings."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae import models, registry
from av_mae.checkpoint import open_checkpoint
from av_mae.config import SoundConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models.encoder import WithEncoder


class LoadedModel(WithEncoder, Protocol):
    """A model as `load` gives it."""

    config: models.AVMAEConfig
    sound: SoundConfig


class Encoding(NamedTuple):
    """Tokens after the final norms, and their means over the tokens [B, D] of 'image', 'audio' and 'fusion'."""

    tokens: models.Tokens
    features: dict[str, jax.Array]


def load(path: str | os.PathLike) -> LoadedModel:
    """The model of a checkpoint.

    Args:
      path: a run's work directory (its newest checkpoint), its `checkpoints`, a single checkpoint, what av_mae.convert
        made, a file of DeepAVFusion whose configuration can be told without options, or a name from a registry
        (av_mae.registry).

    Returns:
      AVMAE, a head's model (Classifier, Separator, Segmenter, Localizer), or models.kinds.EncoderModel: float32, on the
      default device. `.config` is its configuration, `.head` that of its head, and `.sound` that of its log-mels, for
      `preprocess.load`.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, it is not the one that was registered, or it holds a
        unimodal stream, which is no whole model.
    """
    path = registry.resolve(path)
    if pathlib.Path(path).is_file():
        from av_mae.convert.deepavfusion import load_published

        model: Any = load_published(path)
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


def encode(model: WithEncoder, batch: Mapping[str, jax.Array]) -> Encoding:
    """Tokens and pooled features of a batch, all patches visible. Compiled once per model structure and batch shape.

    Args:
      model: any model with an `.encoder`.
      batch: `image` [B, H, W, 3], uint8 or normalised float, and `audio` [B, mels, frames] or [B, mels, frames, 1],
        log-mels standardised as in the run that trained the model. Other entries are ignored.
    """
    return _encode(model.encoder, jnp.asarray(batch["image"]), jnp.asarray(batch["audio"]))


def forward(encoder: models.Encoder, image: jax.Array, audio: jax.Array, return_layers: bool = False) -> Encoding:
    """`encode` as a pure function; with `return_layers`, the tokens after each layer are in the result's tokens."""
    image = models.normalize_image(image) if image.dtype == jnp.uint8 else image
    tokens = encoder(image, audio, return_layers=return_layers)
    return Encoding(tokens, models.pool(tokens))


_encode = nnx.jit(forward)


def load_run(path: str) -> tuple[TrainConfig, models.AVMAE]:
    """The recipe and the model of a pretraining checkpoint.

    Args:
      path: a run's workdir (its newest checkpoint), its `checkpoints`, or a single checkpoint.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it holds another kind of model.
    """
    if not path:
        raise UserError("no checkpoint: set --config.init=DIR to a run's workdir or one of its checkpoints")
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != kinds.PRETRAINING:
        raise UserError(f"init={path} must be a pretraining checkpoint, with decoders; it holds: {checkpoint.kind}")
    model: Any = load(path)
    return checkpoint.config, model
