"""Held-out clips for evaluations: read once, in stored order, failed ones left out and named."""

import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from av_mae.config import DataConfig, EvaluationDataConfig, SoundConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError
from av_mae.models.config import AVMAEConfig
from av_mae.progress import Progress


class Clips(NamedTuple):
    """The clips of one set that could be read, [n] each.

    image uint8 [n, H, W, 3], audio float32 [n, mels, frames] (standardised log-mels), label int32, id str, and place
    int64, the clip's place in the stored set, failed clips counted in. `skipped` names those that failed.
    """

    image: np.ndarray
    audio: np.ndarray
    label: np.ndarray
    id: np.ndarray
    place: np.ndarray
    skipped: list[str]


def set_names(data: EvaluationDataConfig) -> dict[str, str]:
    """Name → path of each set: the folder's name, or the path where two folders are called alike."""
    paths = [path.strip() for path in data.path.split(",") if path.strip()]
    if not paths:
        raise UserError("no data: set --config.data.path=DIR[,DIR] to prepared sets "
                        "(python -m av_mae.prepare makes them)")
    names = [pathlib.Path(path).name for path in paths]
    return {path if names.count(name) > 1 else name: path for path, name in zip(paths, names, strict=True)}


def load_clips(path: str, data: EvaluationDataConfig, sound: SoundConfig, model: AVMAEConfig,
               batch_size: int) -> Clips:
    """Reads one set's clips (at most `data.clips` places of it) as the model takes them.

    Raises UserError when the set cannot be opened, or none of its clips can be read (naming the first error).
    """
    source = DataConfig(path=path, split=data.split, workers=data.workers, sound=sound)
    limit = data.clips or sys.maxsize
    batches, place = [], 0
    with open_evaluation_data(source, model.image.size, model.audio.size, batch_size,
                              np.arange(batch_size)) as clips:
        total = min(limit, clips.clips)
        with Progress(total, f"reading {pathlib.Path(path).name}") as progress:
            for batch in clips:
                places = np.arange(place, place + batch_size)
                batches.append(_rows(batch | {"place": places}, places < total))
                progress.update(min(batch_size, total - place))
                place += batch_size
                if place >= total:
                    break
    return _join(batches, path)


def map_batches(function: Callable[..., dict[str, np.ndarray]], arrays: tuple[np.ndarray, ...],
                batch_size: int) -> dict[str, np.ndarray]:
    """Applies `function(*rows)` → {name: [batch_size, …]} to arrays [n, …] batch by batch.

    The last batch is padded with zeros, so that one shape is compiled; what comes out for padding is dropped.
    """
    clips, parts = len(arrays[0]), []
    for start in range(0, clips, batch_size):
        rows = [array[start:start + batch_size] for array in arrays]
        missing = batch_size - len(rows[0])
        rows = [np.concatenate([row, np.zeros((missing, *row.shape[1:]), row.dtype)]) for row in rows]
        parts.append({name: np.asarray(value)[:batch_size - missing] for name, value in function(*rows).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(batch: dict, chosen: np.ndarray) -> dict:
    return {name: np.array(values[chosen]) for name, values in batch.items()}


def _join(batches: list[dict], path: str) -> Clips:
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    valid, errors = joined["valid"], joined["error"]
    skipped = [f"{clip}: {error}" if clip else str(error)
               for clip, error, fine in zip(joined["id"], errors, valid, strict=True) if error and not fine]
    if not valid.any():
        raise UserError(f"none of the {len(valid)} clips of {path} can be read; the first error: "
                        f"{skipped[0] if skipped else 'unknown'}")
    chosen = {field: joined[field][valid] for field in Clips._fields if field != "skipped"}
    return Clips(**chosen, skipped=skipped)
