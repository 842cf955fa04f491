"""Starting a stream of a run from a unimodal encoder: a MAE of images, or an AudioMAE.

Class token, positions and decoder of the unimodal model are left out; the run keeps the sin-cos positions of its own
grid. Patches are taken as they are: AudioMAE counts time in rows, and the published system does not turn them either.
"""

import pathlib

import numpy as np

from av_mae.errors import UserError
from av_mae.models import AVMAEConfig, kinds
from av_mae.published.infer import Found, identify
from av_mae.published.source import Published, complain
from av_mae.training.checkpoint import note
from av_mae.training.stored import open_checkpoint
from av_mae.weight_files import open_weights


def stream_arrays(path: str, stream: str, config: AVMAEConfig) -> dict[str, np.ndarray]:
    """What the `stream` ('image' or 'audio') of a model starts with, by dotted path in the model ('encoder.image.…').

    path: a published file of a unimodal encoder, or what av_mae.convert made of one.

    Raises:
      UserError: it cannot be read, is no unimodal encoder of this stream, or does not fit the configuration.
    """
    kind = next(kind for kind, name in kinds.STREAMS.items() if name == stream)
    read = read_file if pathlib.Path(path).is_file() else read_checkpoint
    return {f"encoder.{stream}.{name}": x for name, x in read(path, kind, config).items()}


def check_kind(path: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(f"init_{kinds.STREAMS[wanted]}={path} must be a unimodal {kinds.STREAMS[wanted]} encoder, but "
                        f"it holds: {found}" + ("; use init for a checkpoint of both streams"
                                                if found == kinds.PRETRAINING else ""))


def read_file(path: str, kind: str, config: AVMAEConfig) -> dict[str, np.ndarray]:
    file = open_weights(path)
    check_kind(path, identify(file.tensors, path)[0], kind)
    published = Published(file, Found(kind, config, prefix=""))
    nonfinite = published.survey().nonfinite
    if nonfinite:
        note(f"warning: {path} has {complain(nonfinite)}")
    return {name: published.read(name) for name in published.shapes}


def read_checkpoint(path: str, kind: str, config: AVMAEConfig) -> dict[str, np.ndarray]:
    stored = open_checkpoint(path)
    check_kind(path, stored.kind, kind)
    return {name: np.asarray(x) for name, x in stored.load(config)[1].items()}
