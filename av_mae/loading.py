"""From a checkpoint, or the name of one, to its model, and from a batch to embeddings.

Names stand in small TOML files that a user or a lab extends, each entry with its path, checksum and licence:

    [demo]
    path = "runs/demo"          # a work directory, checkpoint or file of DeepAVFusion; relative to the TOML file
    sha256 = "…"                # `sha256` of the model's card.json
    licence = "Apache-2.0"
    figures = {"accuracy/joint" = 0.85}

The files are those of the environment variable AV_MAE_REGISTRY (separated as PATH is), then `av_mae/registry.toml` in
the user's configuration folder; the first that has a name wins.
"""

import dataclasses
import hashlib
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae import models
from av_mae.checkpoint import open_checkpoint
from av_mae.checkpoint_files import COMMITTED, find_checkpoint
from av_mae.config import SoundConfig
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models.encoder import WithEncoder
from av_mae.storage import Folder, is_url

VARIABLE = "AV_MAE_REGISTRY"
PARTS = ("model", "meta")  # items of a checkpoint that its model depends on
FIELDS = {"path": str, "sha256": str, "licence": str, "figures": dict}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model: its path, its checksum, its licence, and what it scored, by the metric's name."""

    path: str
    sha256: str
    licence: str
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


def entries() -> dict[str, Entry]:
    """All registered models by name.

    Raises:
      UserError: AV_MAE_REGISTRY names a file that does not exist, a file is not TOML, or an entry lacks a field.
    """
    files = [pathlib.Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{VARIABLE} names {missing[0]}, which is not there")
    home = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config", "av_mae", "registry.toml")
    known: dict[str, Entry] = {}
    for file in [*files, home] if home.is_file() else files:
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"registry {file} cannot be read: {error}") from error
        for name, value in values.items():
            known.setdefault(name, _entry(file, name, value))
    return known


def _entry(file: pathlib.Path, name: str, value: object) -> Entry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    given: dict[str, Any] = {"figures": {}} | fields
    wrong = [field for field, kind in FIELDS.items() if not isinstance(given.get(field), kind)]
    wrong += sorted(set(fields) - set(FIELDS))
    if wrong:
        raise UserError(
            f"registry {file}: [{name}] needs path, sha256 and licence (text), and may have figures "
            f"(a table); wrong: {', '.join(wrong)}"
        )
    return Entry(**{**fields, "path": str(file.parent / fields["path"])})


def resolve(path: str | os.PathLike) -> str:
    """`path` itself if it exists, else the path of the registered model of this name.

    Raises:
      UserError: neither exists, or the model's checksum is not the registered one.
    """
    if is_url(path) or os.path.exists(path):
        return os.fspath(path)
    known = entries()
    if str(path) not in known:
        names = f"; registered names are {', '.join(known)}" if known else ""
        raise UserError(
            f"there is no checkpoint in {str(path)!r}: name a work directory, its checkpoints/ or one of them{names}"
        )
    entry = known[str(path)]
    found = checksum(entry.path)
    if found != entry.sha256:
        raise UserError(
            f"{path}: {entry.path} is not the model that was registered: its sha256 is {found}, the "
            f"registry says {entry.sha256}; restore the model, or correct the entry"
        )
    return entry.path


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of the model in a checkpoint: its files, by name and contents.

    Raises:
      UserError: `path` is neither a file nor holds a checkpoint.
    """
    digest = hashlib.sha256()
    if not is_url(path) and os.path.isfile(path):
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    checkpoint = find_checkpoint(os.fspath(path))
    folder = Folder(checkpoint)
    for file in (file for part in PARTS for file in sorted(folder.files(part), key=lambda name: name.split("/"))):
        if not file.endswith(COMMITTED):  # which a copy on a store has, and the same checkpoint here has not
            digest.update(file.encode() + b"\0")
            with folder.open(file) as opened:
                hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


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
        made, a file of DeepAVFusion whose configuration can be told without options, or a name from a registry.

    Returns:
      AVMAE, a head's model (Classifier, Separator, Segmenter, Localizer), or models.kinds.EncoderModel: float32, on the
      default device. `.config` is its configuration, `.head` that of its head, and `.sound` that of its log-mels, for
      `preprocess.load`.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, it is not the one that was registered, or it holds a
        unimodal stream, which is no whole model.
    """
    path = resolve(path)
    if not is_url(path) and pathlib.Path(path).is_file():
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
