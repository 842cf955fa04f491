"""A tiny checkpoint and the inputs that tests embed: a prepared set, a folder of media, lists."""

import functools
import pathlib

import fake_clips
import made_media
import numpy as np
from tiny_training import MODEL, first_state, make_step, recipe

from av_mae import loading, search
from av_mae.checkpoint import Checkpoints
from av_mae.config import DataConfig, SoundConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.export import embeddings, tables
from av_mae.models.config import AVMAEConfig
from av_mae.prepare import shards

SOUND = SoundConfig(rate=8000, n_fft=400, hop=125, mels=32, log_floor=1e-3)  # windows of half a second
STREAMS = ("image", "audio", "fusion")


load = functools.cache(loading.load)


def write_checkpoint(workdir: pathlib.Path, model: AVMAEConfig = MODEL, change: float = 0.0) -> pathlib.Path:
    """A work directory with the checkpoint of a model that has never been trained."""
    config = recipe(model, data=DataConfig(sound=SOUND))
    state = first_state(make_step(config))
    state.params["encoder.image.norm.scale"] += change
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, config, position=0, skipped=0)
    checkpoints.close()
    return workdir


def write_set(folder: pathlib.Path, clips: int, seconds: float = 1.3, broken: tuple[int, ...] = ()) -> pathlib.Path:
    """A prepared set whose split `test` has this many clips; in broken ones the sound cannot be read."""

    def record(index: int) -> dict:
        known = fake_clips.record("c", index, size=(48, 72), seconds=seconds)
        del known["label"]
        known |= {"labels": [index % 3 - 1] if index % 3 else []} | ({"sound": b"no sound"} if index in broken else {})
        return known

    folder.mkdir()
    splits = {"train": lambda: iter([record(0)]), "test": lambda: (record(index) for index in range(clips))}
    shards.write_set(folder, "made_up", "made up", ["even", "odd"], splits, clips)
    return folder


def write_media(folder: pathlib.Path, names: list[str], seconds: float = 2.0) -> pathlib.Path:
    """A folder of mp4 files with numbered frames and different parts of one sound."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = np.stack([made_media.numbered_frame(10 * number + frame) for frame in range(round(5 * seconds))])
        made_media.write(str(path), frames, made_media.hum(number + np.arange(round(16000 * seconds)) / 16000))
    return folder


def expected(checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What `av_mae.encode` makes of the clips of a prepared set, one by one: {stream: [n, D]} and their ids."""
    model = load(checkpoint)
    source = DataConfig(path=str(folder), split="test", sound=SOUND)
    found: dict[str, list] = {name: [] for name in (*STREAMS, "id", "label", "start")}
    with open_evaluation_data(source, model.config.image.size, model.config.audio.size, 1, np.arange(1)) as data:
        for batch in data:
            if not batch["valid"][0]:
                continue
            features = loading.encode(model, batch).features
            for name in found:
                found[name].append(np.asarray(features[name] if name in features else batch[name])[0])
    return {name: np.stack(values) for name, values in found.items()}


def export(checkpoint: pathlib.Path, data: str | pathlib.Path, output: pathlib.Path, **options) -> dict:
    """Exports with small batches and shards unless `options` say otherwise; returns the result."""
    options = embeddings.Options(**{"batch_size": 4, "shard_clips": 6, **options})
    return embeddings.export_embeddings(load(checkpoint), str(checkpoint), str(data), output, options)


def read(output: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of all shards, in the order of their names, by pandas; unknown labels are None."""
    import pandas

    frame = pandas.concat([pandas.read_parquet(path) for path in sorted((output / tables.FOLDER).glob("*.parquet"))])
    return {name: np.array([_value(x) for x in frame[name]]) for name in frame}


def _value(x):
    if isinstance(x, np.ndarray):
        return np.stack(x) if x.dtype == object else x
    return None if x != x else x


def made_index(folder, vectors: np.ndarray, shard_clips: int, dtype: str = "float32") -> search.Index:
    """An index of given vectors."""
    settings = {"clips": len(vectors), "shard_clips": shard_clips, "classes": [], "model": "m"}
    layout = tables.Layout(settings, None, False, {"audio": (vectors.shape[1],)}, dtype)
    tables.begin_output(folder, settings, {"checkpoint": "", "data": ""})
    shards = -(-len(vectors) // shard_clips)
    for shard in range(shards):
        writer = tables.ShardWriter(tables.shard_path(folder, shard, shards), layout)
        positions = range(shard * shard_clips, min(len(vectors), (shard + 1) * shard_clips))
        rows = np.empty(len(positions), object)
        rows[:] = [tables.Row(position, f"clip{position}", "", 0.0, None) for position in positions]
        writer.add(rows, {"audio": vectors[list(positions)]})
        writer.close()
    return search.Index(folder)
